"""What the exporter needs changed computes the same as torch, and is undone behind the export."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint import compile_model
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.architectures.flux import open_batch
from mezzotint.compiler.frontend.architectures.patches import fill_flags, keep_epsilon, keep_sizes
from mezzotint.compiler.frontend.architectures.positions import centred_region
from mezzotint.compiler.frontend.architectures.registry import ROWS
from mezzotint.compiler.frontend.architectures.rotary import Rotation, real_rotary
from mezzotint.compiler.frontend.torch_example import quiet_exporter
from tools.tiny_models import TINY


def operations(function: Callable[[torch.Tensor], torch.Tensor], example: torch.Tensor) -> set[str]:
    """Return the operations of an export with an open batch."""

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(x)

    batch = {0: torch.export.Dim("batch", max=63)}
    with quiet_exporter():
        program = torch.onnx.export(Network(), (example,), dynamo=True, dynamic_shapes=((batch),), verbose=False)
    assert program is not None
    return {node.op_type for node in program.model.graph}


def test_a_squeeze_of_a_longer_axis_is_left_out() -> None:
    x = torch.randn(2, 4, 3)

    assert "Squeeze" in operations(lambda x: x.squeeze(1) + 1, x), "the symptom; without it the patch can go"
    with keep_sizes(None):
        assert "Squeeze" not in operations(lambda x: x.squeeze(1) + 1, x)
        assert x[:, :1].squeeze(1).shape == (2, 3) and x.squeeze(1).shape == x.shape


def test_flags_are_filled_without_a_choice_of_booleans() -> None:
    def filled(x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x, dtype=torch.bool).masked_fill(x > 0, False).float()

    x = torch.randn(2, 4)
    want = filled(x)
    assert "Where" in operations(filled, x), "the symptom"
    with fill_flags(None):
        assert "Where" not in operations(filled, x) and torch.equal(filled(x), want)
        flags = torch.tensor([False, True])
        assert flags.masked_fill(torch.tensor([True, False]), True).tolist() == [True, True]
        assert x.masked_fill(x > 0, 3.0).max() == 3


def test_a_tiny_epsilon_stays_in_the_graph() -> None:
    def ratio(x: torch.Tensor) -> torch.Tensor:
        return x / (x.relu() + 1e-15)

    x = torch.tensor([[0.0, 3.0]])
    assert not operations(ratio, x) & {"Add", "Clip", "Max"}, "the symptom: it divides 0 by 0"
    with keep_epsilon(None):
        assert operations(ratio, x) & {"Clip", "Max"}
        assert ratio(x).tolist() == [[0.0, 1.0]] and float((x + 1e-3).min()) == pytest.approx(1e-3)


@pytest.mark.parametrize("patched", [True, False])
def test_a_linear_attention_without_weight_is_zero(
    patched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sana's queries are all zero here: without its epsilon the graph has NaN where torch has 0."""
    tiny = TINY["SanaTransformer2DModel"]
    row = ROWS[tiny.cls]
    monkeypatch.setitem(ROWS, tiny.cls, replace(row, patches=row.patches if patched else ()))
    module: Any = tiny.build()
    with torch.no_grad():
        module.transformer_blocks[0].attn1.to_q.weight.zero_()
    options: dict[str, Any] = {"scheduler": "flow", "size": tiny.size, "conditions": tiny.conditions(2), "steps": 2}
    if not patched:
        with pytest.raises(ModelError, match="disagrees with torch"):
            compile_model(module, tmp_path / "b", recipe="float", **options)
        return
    bundle = compile_model(module, tmp_path / "b", recipe="float", **options)
    assert np.isfinite(bundle.sample(1, conditions=tiny.conditions(1), threads=1)).all()


def test_rotations_are_complex_products() -> None:
    pairs, turns = torch.randn(2, 3, 4, 2), torch.polar(torch.ones(2, 3, 4), torch.randn(2, 3, 4))
    want = torch.view_as_real(torch.view_as_complex(pairs) * turns)
    with real_rotary(None):
        got: Any = torch.view_as_complex(pairs) * Rotation.of(turns)  # type: ignore[operator]
        assert torch.allclose(torch.view_as_real(got), want, atol=1e-6)
    assert torch.view_as_complex(pairs).is_complex()


def test_the_time_of_chroma_is_the_same_with_an_open_batch() -> None:
    module: Any = TINY["ChromaTransformer2DModel"].build()
    time = torch.tensor([10.0, 700.0])
    want = module.time_text_embed(time)
    with open_batch(module):
        assert torch.allclose(module.time_text_embed(time), want, atol=1e-6)
        assert "forward" in vars(module.time_text_embed)
    assert "forward" not in vars(module.time_text_embed)


@pytest.mark.parametrize("patch", [keep_sizes, keep_epsilon, fill_flags, real_rotary])
def test_a_patch_is_undone_by_an_error(patch: Callable[[Any], AbstractContextManager[None]]) -> None:
    def changed() -> tuple[Any, ...]:
        tensor = torch.Tensor
        return tensor.squeeze, tensor.masked_fill, tensor.__add__, torch.view_as_complex, torch.view_as_real

    before = changed()
    with pytest.raises(RuntimeError), patch(None):
        assert changed() != before
        raise RuntimeError
    assert changed() == before


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 32), (20, 64)])
def test_a_region_is_that_of_diffusers(height: int, width: int) -> None:
    """In their words: resize the grid to fit into the base, keep its shape, centre it."""
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    assert centred_region(height, width, 30, 45) == get_resize_crop_region_for_grid((height, width), 45, 30)
