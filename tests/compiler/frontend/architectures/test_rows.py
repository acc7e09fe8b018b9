"""Every registered class, made tiny: its inputs fit the module, its folder loads, its export agrees with torch, and the
W8A8 file runs on integer kernels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from mezzotint import compile_model
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.architectures.registry import ROWS
from mezzotint.compiler.frontend.from_torch import PARITY, load_model
from mezzotint.compiler.frontend.network_inputs import network_inputs
from mezzotint.compiler.frontend.torch_example import example_of
from tests.helpers.models import SMALL
from tools.models_page import RESULTS
from tools.tiny_models import TINY
from tools.tiny_unets import TOKENS

COMPILED = (
    "UNet2DConditionModel, SDXL with LCM, ControlNet and T2I-Adapter",
    "UNet1DModel",
    "QwenImageTransformer2DModel",
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "Lumina2Transformer2DModel",
)
"""Of each rank of a sample and each patch of the exporter one, here or in tests/mezzotint/test_stand_ins.py.

`tools/models_page.py --measure` compiles all.
"""
ATTENTIONS = {
    "QwenImageTransformer2DModel": (8, "1 of 1"),
    "WanTransformer3DModel": (8, "2 of 2"),
    "HunyuanVideoTransformer3DModel": (1024, "0 of 2"),
    "Lumina2Transformer2DModel": (1024, "0 of 3"),
}
"""The tokens from which fuse_attention takes an attention in this test, and how many it finds behind rotary embeddings,
norms of the heads, concatenations and masks."""
TIME_ALONE = {"QwenImageTransformer2DModel", "WanTransformer3DModel"}
"""Their modulation depends on the timestep alone; that of SD 3 and Flux on pooled text, too."""
NEVER_IN_A_FOLDER = {"UNet2DConditionModel, IP-Adapter"}  # its weights are another file


def test_every_row_has_a_tiny_model() -> None:
    assert {tiny.cls for tiny in TINY.values()} == set(ROWS)


@pytest.mark.parametrize("name", TINY)
def test_the_page_of_models_has_what_a_row_gave(name: str) -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))[name]
    assert found["parity"] < PARITY and found["integer"] > found["float"]


@pytest.mark.parametrize("name", TINY)
def test_the_inputs_of_a_row_are_those_of_its_module(name: str, tmp_path: Path) -> None:
    """The module runs on them, each of them matters to its output, and a folder's configuration gives the same ones."""
    tiny = TINY[name]
    module = tiny.build()
    example = example_of(module, tiny.size, torch.float32, tiny.asked)
    denoiser = example.denoiser(module)

    with torch.no_grad():
        output = denoiser(*example.tensors.values())
        known = example.known
        assert output.isfinite().all() and output.shape[0] == 2
        for i, (input_name, tensor) in enumerate(example.tensors.items()):
            value = known.conditions.get(input_name)
            if value is not None and (value.classes == 1 or value.kind != "number"):
                continue  # one class; masks are tested by the export
            changed = list(example.tensors.values())
            changed[i] = 1 - tensor if tensor.dtype is torch.int64 else 0.5 - tensor
            assert not torch.equal(denoiser(*changed), output), f"{input_name} changes nothing"
    if name in NEVER_IN_A_FOLDER:
        return
    module.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = load_model(tmp_path)
    got = loaded.state_dict()
    assert all(torch.equal(value, got[key]) for key, value in module.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert network_inputs(tiny.cls, config, tiny.size, tiny.asked) == known


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if ROWS[tiny.cls].traced])
def test_the_call_that_is_exported_follows_prompts_of_any_length(name: str) -> None:
    """It is made for one length, and computes with torch what the module does at others."""
    tiny = TINY[name]
    module = tiny.build()
    example = example_of(module, tiny.size, torch.float32, tiny.asked)
    traced, known = example.traceable(module), example.known
    for more in (-3, 0, 20):
        sizes = {n: (known.conditions[n].sizes[0] + more, *known.conditions[n].sizes[1:]) for n in known.open_lengths}
        other = example_of(module, tiny.size, torch.float32, {**tiny.asked, **sizes})
        with torch.no_grad():
            want = other.denoiser(module)(*other.tensors.values())
            with example.patched(module):
                got = traced(*other.tensors.values())
        assert torch.allclose(got, want, rtol=0, atol=PARITY / 20 * float(want.abs().max())), more


FIXED = ("UNetSpatioTemporalConditionModel", "HunyuanDiT2DModel", "UNet2DConditionModel, DeepFloyd IF")


@pytest.mark.parametrize("name", TINY)
def test_prompts_have_an_open_length_where_the_exporter_allows_it(name: str) -> None:
    """docs/models.json has the parities at two other lengths, and the SQNR at one."""
    tiny = TINY[name]
    known = example_of(tiny.build(), tiny.size, torch.float32, tiny.asked).known
    texts = {n for n, value in known.conditions.items() if len(value.sizes) == 2 and n.startswith(("encoder", "cap_"))}
    assert bool(known.open_lengths) == (bool(texts) and name not in FIXED)
    assert name in FIXED or texts <= known.open_lengths.keys()
    found = json.loads(RESULTS.read_text(encoding="utf-8"))[name]
    assert known.open_lengths or "lengths" not in found
    if "lengths" in found:
        own, other = found["length_db"]
        assert found["length_parity"] < PARITY and other > own - 6


@pytest.mark.filterwarnings("ignore::mezzotint.runtime.errors.CompileWarning")  # parameters that no output needs
@pytest.mark.parametrize("name", COMPILED)
def test_a_row_is_exported_and_runs_on_integer_kernels(name: str, tmp_path: Path) -> None:
    """The import compares the graph with torch at three timesteps; acceptance compares the file with the graph."""
    tiny = TINY[name]
    options: dict[str, Any] = {**SMALL, "scheduler": "flow" if tiny.flow else "ddpm-linear", "steps": 2, "threads": 1}
    conditions = tiny.conditions(2)
    tokens, fused = ATTENTIONS.get(name, (1024, None))
    options["settings"] = {"fuse_attention.tokens": tokens}

    bundle = compile_model(
        tiny.build(), tmp_path / "b", recipe="w8a8", conditions=conditions, size=tiny.size, **options
    )

    note = next(record.note for record in bundle.manifest.history if record.name == "fuse_attention")
    assert fused is None or note == f"{fused} attentions fused"

    kernels, acceptance = bundle.manifest.kernels, bundle.manifest.acceptance
    assert kernels.integer > kernels.floating, kernels
    assert set(bundle.signature.conditions) == set(conditions)
    lengths = bundle.manifest.calibration.sizes  # residuals of a ControlNet have open heights and widths, too
    assert lengths.get("tokens") == (TOKENS if "encoder_hidden_states" in conditions else None)
    if name in TIME_ALONE | {"SD3Transformer2DModel", "FluxTransformer2DModel"}:  # a row an image is a Gemm
        rows = [node.name for node in onnx.load(bundle.model_path).graph.node if node.op_type == "Gemm"]
        assert bool(rows) == (name not in TIME_ALONE), "modulation by the timestep alone is a table"
    assert acceptance is not None and all(group.sqnr_db is None or group.sqnr_db > 10 for group in acceptance.groups)
    assert bundle.signature.timestep_unit == (ROWS[tiny.cls].unit if tiny.flow else "steps")


@pytest.mark.parametrize(
    ("cls", "config", "complaint"),
    [
        ("UNet2DConditionModel", {"addition_embed_type": "sound"}, "addition_embed_type 'sound'"),
        ("UNet2DConditionModel", {"class_embed_type": "sound"}, "class_embed_type 'sound'"),
        ("UNet2DConditionModel", {"encoder_hid_dim_type": "sound"}, "encoder_hid_dim_type 'sound'"),
        ("UNet2DConditionModel", {"encoder_hid_dim_type": "ip_image_proj"}, "IP-Adapter, whose weights"),
        ("UNet2DConditionModel", {"addition_embed_type": "image"}, "'encoder_hid_dim' is None"),
        ("UNet2DConditionModel", {"addition_embed_type": "text_time"}, "says no sizes of text_embeds"),
    ],
)
def test_a_configuration_without_known_inputs_is_refused(cls: str, config: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint) as caught:
        network_inputs(cls, config, (8, 8), {}, "config.json")
    assert caught.value.where == "config.json" and caught.value.hint


def test_residuals_are_those_of_a_controlnet_and_an_adapter() -> None:
    """Shapes against the networks of diffusers that compute them."""
    from diffusers import ControlNetModel, T2IAdapter

    config = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "cross_attention_dim": 8,
    }
    net = ControlNetModel(**config, norm_num_groups=4, attention_head_dim=4, conditioning_embedding_out_channels=(8, 8))
    adapter = T2IAdapter(3, channels=[8, 16, 16], num_res_blocks=1, downscale_factor=2)
    x, tokens = torch.randn(1, 4, 16, 8), torch.randn(1, 5, 8)
    with torch.no_grad():
        skips, middle = net(x, torch.tensor([3]), tokens, torch.randn(1, 3, 32, 16), return_dict=False)
        blocks = adapter(torch.randn(1, 3, 32, 16))
    asked = {"mid_block_additional_residual": (1,), "down_intrablock_additional_residuals_0": (1,)}

    found = network_inputs("UNet2DConditionModel", config, (16, 8), asked).conditions

    expected = {f"down_block_additional_residuals_{i}": tensor for i, tensor in enumerate(skips)}
    expected |= {f"down_intrablock_additional_residuals_{i}": tensor for i, tensor in enumerate(blocks)}
    expected["mid_block_additional_residual"] = middle
    residuals = {name: value.sizes for name, value in found.items() if "residual" in name}
    assert residuals == {name: tuple(tensor.shape[1:]) for name, tensor in expected.items()}


@pytest.mark.parametrize("cls", ["DiTTransformer2DModel", "ZImageTransformer2DModel"])
def test_a_tiny_model_hides_no_layer_behind_zeros(cls: str) -> None:
    assert all(bool(p.any()) and bool(p.isfinite().all()) for p in TINY[cls].build().parameters())
