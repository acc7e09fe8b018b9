"""Components: the export, fidelity by token, and the names that programs for ONNX pipelines expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import T5Config, T5EncoderModel

from mezzotint.compiler.components.classes import COMPONENT_CLASSES, component_class, output_names, parts_of
from mezzotint.compiler.components.export import export_component, torch_outputs
from mezzotint.compiler.components.fidelity import LARGEST_DB, compared
from mezzotint.compiler.errors import ModelError

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
