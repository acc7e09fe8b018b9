"""Weights as they come: variants, shards, checkpoints of one file, modules in half precision."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.from_torch import load_model
from mezzotint.compiler.frontend.module_weights import exported_weights
from mezzotint.compiler.frontend.weight_files import chosen_variant, variants
from mezzotint.runtime.errors import CompileWarning
from tools.tiny_models import TINY

TRANSFORMER = "SD3Transformer2DModel"


@pytest.fixture(scope="module")
def module() -> Any:
    return TINY[TRANSFORMER].build()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_the_only_variant_is_found_and_told(module: Any, tmp_path: Path) -> None:
    half = copy.deepcopy(module).half()
    half.save_pretrained(tmp_path, variant="fp16")
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]

    with pytest.warns(CompileWarning, match="the variant fp16, the only one here"):
        found = load_model(tmp_path)

    assert {value.dtype for value in found.state_dict().values()} == {torch.float32}
    assert same(found, half.float())
    assert same(load_model(tmp_path, "fp16"), found), "asked for, it is no news"


def test_plain_weights_come_first_and_variants_are_named(module: Any, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    copy.deepcopy(module).to(torch.bfloat16).save_pretrained(tmp_path, variant="bf16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3, "there are shards of both"
    assert variants(tmp_path) == [None, "bf16"]

    assert same(load_model(tmp_path), module)
    assert not same(load_model(tmp_path, "bf16"), module)
    with pytest.raises(ModelError, match=r"variant 'fp16': it has the plain ones, bf16"):
        load_model(tmp_path, "fp16")

    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    for file in tmp_path.glob("diffusion_pytorch_model-*"):
        file.unlink()
    shutil.copy(next(tmp_path.glob("*bf16-00001*")), tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(ModelError, match="several variants: bf16, fp16"):
        chosen_variant(tmp_path, None)


def test_a_shard_that_is_missing_is_an_error(module: Any, tmp_path: Path) -> None:
    module.save_pretrained(tmp_path, max_shard_size="20KB")
    next(tmp_path.glob("*-00002-of-*")).unlink()
    with pytest.raises(ModelError, match="cannot load the model"):
        load_model(tmp_path)


def of_ldm(key: str) -> str:
    """Return the name of a U-Net's weight in the layout of the first Stable Diffusion, for two levels of one layer."""
    for ours, theirs in (
        ("time_embedding.linear_1", "time_embed.0"),
        ("time_embedding.linear_2", "time_embed.2"),
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.0", "input_blocks.1.0"),
        ("down_blocks.0.attentions.0", "input_blocks.1.1"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("down_blocks.1.resnets.0", "input_blocks.3.0"),
        ("mid_block.resnets.0", "middle_block.0"),
        ("mid_block.attentions.0", "middle_block.1"),
        ("mid_block.resnets.1", "middle_block.2"),
        ("up_blocks.0.resnets.0", "output_blocks.0.0"),
        ("up_blocks.0.resnets.1", "output_blocks.1.0"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.1.conv"),
        ("up_blocks.1.resnets.0", "output_blocks.2.0"),
        ("up_blocks.1.attentions.0", "output_blocks.2.1"),
        ("up_blocks.1.resnets.1", "output_blocks.3.0"),
        ("up_blocks.1.attentions.1", "output_blocks.3.1"),
        ("conv_norm_out", "out.0"),
        ("conv_out", "out.2"),
        (".norm1.", ".in_layers.0." if "resnets" in key else ".norm1."),
        (".conv1.", ".in_layers.2."),
        (".time_emb_proj.", ".emb_layers.1."),
        (".norm2.", ".out_layers.0." if "resnets" in key else ".norm2."),
        (".conv2.", ".out_layers.3."),
        (".conv_shortcut.", ".skip_connection."),
    ):
        key = key.replace(ours, theirs)
    return f"model.diffusion_model.{key}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path, Any]]:
    """Return a checkpoint with a U-Net, an autoencoder's weight and another's, its configuration, and the network."""
    torch.manual_seed(3)
    net = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    folder = tmp_path_factory.mktemp("checkpoint")
    state = {of_ldm(name): value.half() for name, value in net.state_dict().items()}
    other = {"first_stage_model.decoder.conv_in.weight": torch.ones(2, 2), "cond_stage_model.x": torch.ones(1)}
    save_file({**state, **other}, folder / "model.safetensors")
    net.save_config(folder / "pipeline" / "unet")
    yield folder / "model.safetensors", folder / "pipeline" / "unet", net.half().float()


def test_a_checkpoint_in_the_first_layout(checkpoint: tuple[Path, Path, Any], tmp_path: Path) -> None:
    file, config, net = checkpoint
    assert same(load_model(config, checkpoint=file), net)

    state = load_file(file)
    missing = next(name for name in state if "middle_block.1" in name)
    save_file({name: value for name, value in state.items() if name != missing}, tmp_path / "less.safetensors")
    with pytest.raises(ModelError, match="lacks a weight of the network: 'mid_block") as caught:
        load_model(config, checkpoint=tmp_path / "less.safetensors")
    assert caught.value.where == str(tmp_path / "less.safetensors")


def test_a_class_without_a_layout_is_refused(checkpoint: tuple[Path, Path, Any], tmp_path: Path) -> None:
    TINY["DiTTransformer2DModel"].build().save_config(tmp_path)  # type: ignore[operator]
    with pytest.raises(ModelError, match="no single file of a DiTTransformer2DModel"):
        load_model(tmp_path, checkpoint=checkpoint[0])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_module_in_half_precision_is_widened_in_a_copy(kind: torch.dtype, module: Any) -> None:
    half = copy.deepcopy(module).to(kind)
    half.register_parameter("tied", half.proj_out.weight)
    before, wide = dict(half.named_parameters(remove_duplicate=False)), copy.deepcopy(half).float()

    with exported_weights(half, ()) as rows:
        assert rows == [] and same(half, wide)
        assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
        assert half.pos_embed.pos_embed.dtype == torch.float32, "a buffer"

    after = dict(half.named_parameters(remove_duplicate=False))
    assert all(after[name] is value for name, value in before.items())
    assert {value.dtype for value in half.state_dict().values()} == {kind}
