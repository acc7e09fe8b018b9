"""LoRAs fused before the export, beside the same matrices applied in the forward pass, and beside peft."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.lora import fuse
from mezzotint.compiler.frontend.lora_files import LoraFile, check_loras
from mezzotint.compiler.frontend.module_weights import exported_weights
from mezzotint.runtime.errors import CompileWarning
from tools.tiny_models import TINY

EXACT = 1e-5
Matrices = dict[str, tuple[torch.Tensor, torch.Tensor]]
UNET, SD3, FLUX = "UNet2DConditionModel, upscaler", "SD3Transformer2DModel", "FluxTransformer2DModel"
RANK = 3


def matrices(model: Any, *ends: str, seed: int = 0) -> Matrices:
    """Return A and B for the layers whose names end so, as peft makes them: the kernel of a convolution is in A."""
    generator = torch.Generator().manual_seed(seed)
    found: Matrices = {}
    for name, layer in model.named_modules():
        if name.endswith(ends) and getattr(layer, "weight", None) is not None:
            rows, *rest = layer.weight.shape
            down = torch.randn(RANK, *rest, generator=generator)
            up = 0.1 * torch.randn(rows, RANK, *(1 for _ in rest[1:]), generator=generator)
            found[name] = (down, up)
    assert found
    return found


def of_peft(found: Matrices, prefix: str) -> dict[str, torch.Tensor]:
    pairs = {f"{prefix}{name}": pair for name, pair in found.items()}
    downs = {f"{name}.lora_A.weight": down for name, (down, _) in pairs.items()}
    return downs | {f"{name}.lora_B.weight": up for name, (_, up) in pairs.items()}


def of_kohya(found: Matrices, alpha: float) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, (down, up) in found.items():
        flat = "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": torch.tensor(alpha),
        }
    return tensors


def saved(tensors: Mapping[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return file


def beside(model: Any, *parts: tuple[Matrices, float]) -> Any:
    """Return a copy that applies the matrices in its forward pass, one after the other, and fuses nothing."""
    other = copy.deepcopy(model)
    for found, scale in parts:
        for name, (down, up) in found.items():
            layer = other.get_submodule(name)

            def add(layer: Any, given: Any, output: Any, a: Any = down, b: Any = up, scale: float = scale) -> Any:
                if a.ndim == 2:
                    return output + scale * given[0] @ a.T @ b.T
                convolve = torch.nn.functional.conv2d
                return output + scale * convolve(convolve(given[0], a, stride=layer.stride, padding=layer.padding), b)

            layer.register_forward_hook(add)
    return other


def outputs(model: Any, name: str) -> np.ndarray[Any, Any]:
    from mezzotint.compiler.frontend.torch_example import example_of

    tiny = TINY[name]
    example = example_of(model, tiny.size, torch.float32, tiny.asked)
    with torch.no_grad():
        found: np.ndarray[Any, Any] = example.denoiser(model)(*example.tensors.values()).numpy()
    return found


def difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


def change_of(name: str, changed: torch.nn.Module, model: torch.nn.Module) -> torch.Tensor:
    key = f"{name}.weight"
    change: torch.Tensor = changed.state_dict()[key] - model.state_dict()[key]
    return change


@pytest.mark.parametrize(
    ("name", "ends", "prefix"),
    [(UNET, ("to_q", "to_out.0", "conv1", "proj_in"), "unet."), (SD3, ("to_q", "add_k_proj", "norm1.linear"), "")],
)
def test_a_fused_network_computes_what_the_matrices_add(
    name: str, ends: tuple[str, ...], prefix: str, tmp_path: Path
) -> None:
    model = TINY[name].build()
    first, second = matrices(model, *ends), matrices(model, *ends[:1], seed=1)
    files = [saved(of_peft(m, prefix), tmp_path / f"{i}.safetensors") for i, m in enumerate((first, second))]
    before = outputs(model, name)
    wanted = outputs(beside(model, (first, 0.7), (second, -0.4)), name)

    with exported_weights(model, (LoraFile(files[0], 0.7), LoraFile(files[1], -0.4))) as rows:
        found = outputs(model, name)

    assert difference(found, wanted) < EXACT < 0.01 < difference(before, wanted)
    assert [(row["name"], row["weight"], row["layers"]) for row in rows] == [
        ("0.safetensors", 0.7, len(first)),
        ("1.safetensors", -0.4, len(second)),
    ]
    assert np.array_equal(outputs(model, name), before), "the caller's module is as it was"


def test_formats_of_kohya_and_of_old_diffusers_are_those_of_peft(tmp_path: Path) -> None:
    model = TINY[UNET].build()
    found = matrices(model, "to_q", "to_out.0")
    alpha = 6.0
    formats = {
        "kohya": of_kohya(found, alpha),
        "attention processors": {
            f"unet.{name.removesuffix('.to_out.0').removesuffix('.to_q')}.processor."
            f"{'to_q' if name.endswith('to_q') else 'to_out'}_lora.{part}.weight": pair[part == "up"]
            for name, pair in found.items()
            for part in ("down", "up")
        },
        "settings": of_peft(found, "unet."),
    }
    settings = {"unet.lora_alpha": 1.0, "unet.r": RANK, "unet.alpha_pattern": {"to_q": 2.0, "to_out.0": 2.0}}
    metadata = {"settings": {"lora_adapter_metadata": json.dumps(settings)}}
    scales = {"kohya": alpha / RANK, "attention processors": 1.0, "settings": 2.0 / RANK}
    for kind, tensors in formats.items():
        file = saved(tensors, tmp_path / f"{kind}.safetensors", metadata.get(kind))
        other = copy.deepcopy(model)
        assert fuse(other, LoraFile(file)) == len(found), kind
        for name, (down, up) in found.items():
            change = change_of(name, other, model)
            torch.testing.assert_close(change, scales[kind] * (up @ down), atol=1e-6, rtol=0)


def test_joined_layers_of_flux_are_taken_apart(tmp_path: Path) -> None:
    """kohya's scripts train the joined projections of the original Flux, which diffusers has as three layers."""
    model = TINY[FLUX].build()
    width = model.state_dict()["transformer_blocks.0.attn.to_q.weight"].shape[0]
    down, up = torch.randn(RANK, width), torch.randn(3 * width, RANK)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.5)}
    other = copy.deepcopy(model)

    fuse(other, LoraFile(saved(tensors, tmp_path / "flux.safetensors"), 0.5))

    changes = (0.5 * 1.5 / RANK * (up @ down)).split(width)
    for layer, wanted in zip(("to_q", "to_k", "to_v"), changes, strict=True):
        change = change_of(f"transformer_blocks.0.attn.{layer}", other, model)
        torch.testing.assert_close(change, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [UNET, SD3])
def test_peft_fuses_the_same(name: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra has it)")
    model: Any = TINY[name].build()
    trained, theirs, ours = (copy.deepcopy(model) for _ in range(3))
    options = {"lora_alpha": 6, "alpha_pattern": {"to_k": 1.0}, "rank_pattern": {"to_k": 2}}
    trained.add_adapter(peft.LoraConfig(r=RANK, target_modules=["to_q", "to_k"], init_lora_weights=False, **options))
    prefix = "unet" if name == UNET else "transformer"
    tensors = {f"{prefix}.{key}": value for key, value in peft.get_peft_model_state_dict(trained).items()}
    file = saved(tensors, tmp_path / "trained.safetensors")
    theirs.load_lora_adapter(str(file), prefix=prefix)
    theirs.fuse_lora(lora_scale=0.7)

    assert fuse(ours, LoraFile(file, 0.7)) > 1

    for key, value in theirs.state_dict().items():
        if "lora_" not in key:
            torch.testing.assert_close(ours.state_dict()[key.replace(".base_layer", "")], value, atol=1e-6, rtol=0)


def test_what_is_trained_beside_the_denoiser_is_told(tmp_path: Path) -> None:
    model = TINY[UNET].build()
    found = of_peft(matrices(model, "to_q"), "unet.")
    encoder = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 4)}
    file = saved({**found, **encoder}, tmp_path / "both.safetensors")

    with pytest.warns(CompileWarning, match="1 tensors of this LoRA change a text encoder"):
        fuse(model, LoraFile(file))
    with pytest.warns(CompileWarning), pytest.raises(ModelError, match="changes nothing of the denoiser"):
        fuse(model, LoraFile(saved(encoder, tmp_path / "encoder.safetensors")))


REFUSED: list[tuple[str, dict[str, torch.Tensor], str]] = [
    ("mid_block.nowhere.lora_A.weight", {"mid_block.nowhere.lora_B.weight": torch.ones(4, 2)}, "'mid_block.nowhere'"),
    ("proj_out.lora_A.weight", {}, "tensors that nothing here reads: 'proj_out.lora_A.weight'"),
    ("proj_out.lora_A.weight", {"proj_out.lora_B.weight": torch.ones(5, 2)}, "'proj_out' has the shape"),
    ("proj_out.lora_A.weight", {"proj_out.lora_B.weight": torch.ones(5, 3)}, "the ranks 2 and 3"),
    ("proj_out.lora_A.weight", {"proj_out.lora_magnitude_vector": torch.ones(4)}, "the file is DoRA"),
    ("proj_out.lokr_w1", {}, "the file is LoKr"),
    ("proj_out.weight", {}, "no tensor of a LoRA"),
]


@pytest.mark.parametrize(("key", "more", "complaint"), REFUSED, ids=[case[2] for case in REFUSED])
def test_a_lora_of_something_else_is_refused(
    key: str, more: dict[str, torch.Tensor], complaint: str, tmp_path: Path
) -> None:
    model = TINY[SD3].build()
    before = copy.deepcopy(model.state_dict())
    file = saved({key: torch.ones(2, 16), **more}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=complaint) as caught:
        fuse(model, LoraFile(file))
    assert caught.value.where == str(file)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_safetensors_files_are_read(tmp_path: Path) -> None:
    pickle, text = tmp_path / "lora.bin", tmp_path / "lora.safetensors"
    torch.save({"lora": torch.ones(1)}, pickle)
    text.write_text("lora")
    for file, complaint in (
        (pickle, "a pickle"),
        (text, "no safetensors file"),
        (tmp_path / "none.safetensors", "the LoRA"),
    ):
        with pytest.raises(ModelError, match=complaint):
            check_loras([LoraFile(file)])
