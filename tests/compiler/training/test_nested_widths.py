"""Nested widths: the integers of a narrow file are those of the widest one, rounded again or cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import PassError, RecipeError
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.torch_graph.quantizers import Quantizer
from mezzotint.passes.distill import Distill
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from tests.helpers.tiny import context_in, tiny_program
from tests.passes.test_distill import QUICK, integers_of, trained, unjudged  # noqa: F401  a fixture

WIDTHS = (8, 4, 2)
NESTED: dict[str, Any] = {**QUICK, "iterations": 2, "checks": 1, "weight_steps": 0.2, "samples": 4, "held_out": 1}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Program]:
    """The tiny denoiser with weights of 8, 4 and 2 bits."""
    context, found = context_in(tmp_path_factory.mktemp("programs")), {}
    for bits in WIDTHS:
        passes = with_options(RECIPES["w8a8"], {"choose_scales.weight_bits": bits}).passes
        found[bits] = pipeline.run_passes(tiny_program(steps=2), passes, context)
    return found


def read_at(integers: np.ndarray, way: str, bits: int) -> np.ndarray:
    """Return what the formula makes of integers of 8 bits."""
    shifted = integers / 2 ** (8 - bits)
    narrow = np.rint(shifted) if way == "rounded" else np.sign(integers) * (np.abs(integers).astype(int) >> (8 - bits))
    end = 2 ** (bits - 1) - 1
    return np.asarray(np.clip(narrow, -end, end))


@pytest.mark.parametrize("way", ["rounded", "cut"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_quantizer_reads_the_integers_of_8_bits(way: str, bits: int) -> None:
    part = Quantizer(torch.tensor(0.5), torch.tensor(0.0), -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)
    part.nest(2.0 ** (8 - bits), cut=way == "cut")
    wide = np.arange(-127, 128)
    for away in (-0.4, 0.0, 0.4):  # of the widest step: the first rounding takes it away
        weights = torch.tensor((wide + away) * 0.5 / 2 ** (8 - bits), dtype=torch.float32)
        np.testing.assert_array_equal(part.integers(weights).numpy(), read_at(wide, way, bits))
    assert (read_at(wide, "rounded", 4) != read_at(wide, "cut", 4)).mean() > 0.4


@pytest.mark.usefixtures("unjudged")
@pytest.mark.parametrize(("way", "scales", "narrow"), [("rounded", "both", (4, 2)), ("cut", "activations", (4,))])
def test_files_of_all_widths_have_the_integers_of_one(
    programs: dict[int, Program], context: Context, way: Any, scales: Any, narrow: tuple[int, ...]
) -> None:
    """They are trained alone, and come out as one training: every loss, scale and integer."""
    options = {**NESTED, "nested": way, "scales": scales}
    after = {bits: trained(programs[bits], context, **options) for bits in (8, *narrow)}
    assert "the mean of 3 widths by their shares" in after[4].history[-1].note
    wide = find_weights(after[8].graph)
    for bits in narrow:
        assert after[bits].training[-1].losses == after[8].training[-1].losses
        for one, other in zip(wide, find_weights(after[bits].graph), strict=True):
            np.testing.assert_array_equal(other.scale(), one.scale() * 2.0 ** (8 - bits))
            np.testing.assert_array_equal(integers_of(other), read_at(integers_of(one), way, bits))
    largest = np.concatenate([np.abs(integers_of(weight)).max(axis=1) for weight in wide])
    assert (largest != 127).any(), "the start has 127 in each row, and weights moved"


def test_the_loss_is_the_mean_by_shares(programs: dict[int, Program], context: Context) -> None:
    options = {**NESTED, "nested": "rounded", "weight_steps": 1e-9, "float_shares": 1e-9}
    losses = []
    alone_with = [[1.0 if width == other else 1e-12 for other in WIDTHS] for width in WIDTHS]
    choices = [(), (1.0, 2.0, 1.0), *map(tuple, alone_with)]
    for shares in choices:
        after = trained(programs[2], context, **options, nested_shares=shares)
        losses.append(np.log(after.training[-1].losses))
    even, weighted, *alone = losses
    np.testing.assert_allclose(even, np.mean(alone, axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(weighted, np.average(alone, axis=0, weights=[1, 2, 1]), rtol=1e-3, atol=1e-4)


def test_more_bits_than_the_widest_are_refused(programs: dict[int, Program], context: Context) -> None:
    with pytest.raises(PassError, match="has 4 bits, and the widest of the nested widths 2"):
        trained(programs[4], context, **NESTED, nested="cut", nested_widths=(2,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nested_widths": (8, 8)}, r"nested_widths is \[8, 8\]"),
        ({"nested_widths": (1,)}, r"nested_widths is \[1\]"),
        ({"nested_shares": (1.0, -1.0, 1.0)}, r"nested_shares is \[1.0, -1.0, 1.0\]"),
        ({"nested": "cut", "weights": "none"}, "those of weights that move"),
        ({"nested": "cut", "blocks": 1.0}, "blocks is that of one width"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distill(**options)


def test_each_width_has_a_share(programs: dict[int, Program]) -> None:
    """Before anything runs, and not before both options are set."""
    fit = Distill(nested="cut", nested_shares=(1.0,))
    with pytest.raises(RecipeError, match="3 widths, and nested_shares 1 shares"):
        fit.check((), programs[8].deployment)
