"""Components: the export, fidelity by token, and the names that programs for ONNX pipelines expect."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderDC
from transformers import Qwen3Model, T5Config, T5EncoderModel

from mezzotint.compiler.components.classes import (
    COMPONENT_CLASSES,
    DECODER,
    ENCODER,
    LATENTS,
    PICTURE,
    ComponentClass,
    component_class,
    output_names,
    parts_of,
    with_states,
)
from mezzotint.compiler.components.compile import compile_component
from mezzotint.compiler.components.data import ComponentData, ComponentPasses
from mezzotint.compiler.components.export import export_component, torch_outputs
from mezzotint.compiler.components.fidelity import LARGEST_DB, compared
from mezzotint.compiler.components.recording import watching
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import ModelError
from mezzotint.runtime.diffusers.autoencoder import AutoencoderStandIn
from mezzotint.runtime.diffusers.text_encoder import TextEncoderStandIn
from mezzotint.runtime.errors import InputError
from tests.helpers.prompt_pipelines import qwen

ROW = COMPONENT_CLASSES["T5EncoderModel"]


def t5() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    module: Any = T5EncoderModel(T5Config(**sizes))
    return module.eval()


def prompts() -> dict[str, Any]:
    ids = np.random.default_rng(1).integers(0, 40, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_a_t5_is_exported_with_its_mask(tmp_path: Path) -> None:
    module, example = t5(), prompts()
    exported = export_component(module, ROW, "text_encoder", example, "t5")
    exported.check(tmp_path, 1, "t5")
    assert [value.name for value in exported.model.graph.inputs] == ["input_ids", "attention_mask"]
    [outputs] = torch_outputs(module, ROW, "text_encoder", exported.outputs, [example])
    assert np.allclose(outputs["last_hidden_state"], exported.expected["last_hidden_state"], atol=1e-5)
    exported.expected["last_hidden_state"][0] *= 1.01
    with pytest.raises(ModelError, match="disagrees with torch at last_hidden_state"):
        exported.check(tmp_path, 1, "t5")


def compiled(module: Any, row: ComponentClass, part: str, example: dict[str, Any], folder: Path) -> Path:
    """Write a component in float, and return its file."""
    (folder / part).mkdir()
    (work := folder / f"{part}-work").mkdir()
    passes = ComponentPasses((), lambda islands: (), 30.0)
    data = ComponentData([example], [example], "an example")
    entry = compile_component(module, row, part, data, passes, "float", folder / part, Context(work, threads=1))
    assert entry.worst_db > 100
    return folder / part / "model.onnx"


def test_a_decoder_gives_the_hidden_states_that_its_pipeline_reads(tmp_path: Path) -> None:
    """Its layers behind the last of them are not in the graph, and prompts of another length are taken."""
    module, example = qwen(12, Qwen3Model), prompts()
    pipe = SimpleNamespace(text_encoder=module, vae=SimpleNamespace(decode=None))
    with watching(pipe, ("text_encoder",)) as watched:
        assert len(module(torch.from_numpy(example["input_ids"]), output_hidden_states=True).hidden_states[-3:-1]) == 2
    row = with_states(COMPONENT_CLASSES["Qwen3Model"], "text_encoder", {"text_encoder": (1, 2)}, "here")
    assert watched.states == {"text_encoder": set(row.states)}
    with pytest.raises(ModelError, match="reads no hidden states"):
        with_states(COMPONENT_CLASSES["Qwen3ForCausalLM"], "text_encoder", {}, "here")

    file = compiled(module, row, "text_encoder", {**example, "attention_mask": example["attention_mask"] > 0}, tmp_path)

    assert not any("layers.2" in (node.name or "") for node in onnx.load(file, load_external_data=False).graph.node)
    stand_in = TextEncoderStandIn(file, "Qwen3Model", threads=1)
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    with torch.no_grad():
        want = module(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    found = stand_in(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    assert len(found) == len(want) == 4
    assert all(torch.allclose(found[i][mask], want[i][mask], atol=1e-5) for i in (1, 2, -2))
    with pytest.raises(InputError, match="hidden state -1 was not compiled: the pipeline read 1, 2"):
        found[-1]


def test_an_autoencoder_without_a_distribution_gives_latents(tmp_path: Path) -> None:
    """The features of its linear attention that are all negative divide zero by a tiny number, which stays."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"latent_channels": 4, "attention_head_dim": 4}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_block_types": "EfficientViTBlock", f"{half}_block_out_channels": (8,)}
        sizes |= {f"{half}_layers_per_block": (1,), f"{half}_qkv_multiscales": ((5,),)}
    module: Any = AutoencoderDC(**sizes).eval()
    row = COMPONENT_CLASSES["AutoencoderDC"]
    generator = torch.Generator().manual_seed(1)
    latents, pictures = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (3, 8, 8)))
    decoder, encoder = (
        compiled(module, row, part, {name: tensor.numpy()}, tmp_path)
        for part, name, tensor in ((DECODER, LATENTS, latents), (ENCODER, PICTURE, pictures))
    )
    vae = AutoencoderStandIn(decoder, encoder, "AutoencoderDC", threads=1)
    with torch.no_grad():
        want = module.decode(latents[:1, :, :6]).sample, module.encode(pictures[:1, :, :6]).latent
    assert torch.allclose(vae.decode(latents[:1, :, :6]).sample, want[0], atol=1e-5)
    assert torch.allclose(vae.encode(pictures[:1, :, :6]).latent, want[1], atol=1e-5)


def test_no_loud_token_hides_the_others() -> None:
    rng = np.random.default_rng(0)
    states = rng.standard_normal((1, 4, 8))
    states[:, 0] *= 1000
    noisy = states.copy()
    noisy[:, 1:] += 0.1 * rng.standard_normal((1, 3, 8))
    found = compared(
        [{"hidden_states.0": states, "hidden_states.1": states}],
        [{"hidden_states.0": states, "hidden_states.1": noisy}],
    )
    assert list(found) == ["hidden_states"] and 15 < found["hidden_states"] < 30
    assert compared([{"sample": states[0]}], [{"sample": states[0]}]) == {"sample": LARGEST_DB}


def test_names_are_those_of_onnx_pipelines() -> None:
    clip = COMPONENT_CLASSES["CLIPTextModelWithProjection"]
    names = ("text_embeds", "last_hidden_state", "hidden_states.0", "hidden_states.1", "hidden_states.2")
    assert output_names(clip, "text_encoder_2", {"num_hidden_layers": 2}) == names
    vae = COMPONENT_CLASSES["AutoencoderKL"]
    assert parts_of("vae", vae) == ("vae_decoder", "vae_encoder")
    assert [output_names(vae, part, {}) for part in parts_of("vae", vae)] == [("sample",), ("latent_parameters",)]
    with pytest.raises(ModelError, match="image_encoder is a CLIPVisionModel"):
        component_class("CLIPVisionModel", "image_encoder", "here")
