"""dilate_weights: a golden pair, exactness, the ranges of rows stay, and what the note says."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import NotExact
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import Layer, layers
from mezzotint.compiler.rescaling import scaling
from mezzotint.compiler.rescaling.scaling import Factors
from mezzotint.passes.dilate_weights import DilateWeights
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.files import make_pass
from mezzotint.passes.recipes.parts import FAST
from tests.conftest import Check
from tests.helpers.channels import with_channels
from tests.helpers.tiny import tiny_program

INPUTS = Observe(groups=0, channels="inputs")
EVERYWHERE: dict[str, Any] = {"gain": -100.0, "run_time": True, "run_time_gain": -100.0, "islands": ()}


@pytest.mark.parametrize(("case", "symmetric"), [("norm", True), ("two_ends", False)])
def test_dilation_moves_into_a_norm(check_golden: Check, case: str, symmetric: bool) -> None:
    prepare = with_channels("normed", -1, (1, 1, 16, 2))
    after = check_golden(
        DilateWeights(symmetric=symmetric, islands=(), activation_bits=4), case, shape=(4, 4, 4), prepare=prepare
    )
    note = after.history[-1].note
    assert note.startswith("1 of 1 values scaled (1 norm), ")
    assert note.endswith("; 50% of their channels have s > 1, 3.50 on average" if symmetric else "on average")


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_tiny_denoiser_stays_exact_and_so_do_the_ranges(context: Context, symmetric: bool) -> None:
    program = pipeline.run_passes(tiny_program(), [*FAST, INPUTS], context)
    after = pipeline.run_passes(program, [DilateWeights(symmetric=symmetric, **EVERYWHERE)], context)
    assert after.history[-1].note.startswith("12 of 12 values scaled (1 linear, 10 run_time, 1 value), ")
    now = {layer.name: layer for layer in layers(after.graph) if layer.weight is not None}
    divided = ("down", "v")  # what the factors of the one linear site and of the one value site went into
    weighted = [layer for layer in layers(program.graph) if layer.weight is not None]
    assert len(weighted) == len(now) >= 12
    for layer in weighted:
        before, behind = rows_of(layer), rows_of(now[layer.name])
        assert np.all(np.abs(behind) >= np.abs(before) * (1 - 1e-6)) == (layer.name not in divided)
        if layer.name not in divided:
            np.testing.assert_allclose(_limits(behind), _limits(before), rtol=1e-7)
            with pytest.raises(AssertionError):
                np.testing.assert_allclose(_limits(behind * np.float32(1.01)), _limits(before), rtol=1e-7)


def rows_of(layer: Layer) -> npt.NDArray[np.float32]:
    """A layer's weight as `[rows, rest]`."""
    assert layer.weight is not None and layer.weight_axis is not None
    weight = np.moveaxis(numpy_of(layer.weight), layer.weight_axis, 0)
    return weight.reshape(len(weight), -1)


def _limits(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(np.abs(rows).max(axis=1))


def test_a_factor_that_is_one_percent_off_is_refused(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    program = pipeline.run_passes(tiny_program(), [*FAST, INPUTS], context)
    true = scaling.multiplied_weight

    def off(layer: Layer, factors: Factors) -> Any:
        return true(layer, factors) * np.float32(1.01)

    monkeypatch.setattr(scaling, "multiplied_weight", off)
    with pytest.raises(NotExact):
        pipeline.run_passes(program, [DilateWeights(**EVERYWHERE)], context)


def test_what_does_not_pay_is_left_alone(context: Context) -> None:
    program = pipeline.run_passes(tiny_program(), [*FAST, INPUTS], context)
    after = pipeline.run_passes(program, [DilateWeights(gain=50.0, islands=())], context)
    note = after.history[-1].note
    assert note.startswith("0 of 12 values scaled; left alone: ") and "gains too little" in note
    assert "no rescaling is exact" in note and "channels have" not in note


def test_options_of_a_recipe_file() -> None:
    made = make_pass("dilate_weights", {"symmetric": False, "run_time": True, "gain": 1})
    assert made == DilateWeights(symmetric=False, run_time=True, gain=1.0)
