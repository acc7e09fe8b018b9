"""equalize_weights: both sides of a pair get equal ranges, the function stays, and refusals have reasons."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import NotExact, RecipeError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import Layer, layer_of, layers
from mezzotint.compiler.rescaling import sites
from mezzotint.compiler.rescaling.edits import apply_edit
from mezzotint.compiler.rescaling.scaling import column_ranges, row_lengths, row_ranges
from mezzotint.compiler.rescaling.sites import RescalingSite, find_sites
from mezzotint.passes.equalize_weights import EqualizeWeights
from mezzotint.passes.normalize import Normalize
from tests.conftest import Check
from tests.helpers import golden
from tests.helpers.factors import BLOCK, END, factor_program
from tests.helpers.tiny import context_in

SHAPES = {"attention": (4, 4), "relu": (2, 4, 4)}
PAD = "<pads = [1, 1, 1, 1]>"


@pytest.mark.parametrize("case", golden.cases("equalize_weights"))
def test_golden(check_golden: Check, case: str) -> None:
    after = check_golden(EqualizeWeights(), case, shape=SHAPES[case])
    assert (
        after.history[-1].note.split(";")[0]
        == {
            "attention": "1 values and 1 products equalized in 2 sweeps, 1 refused",
            "relu": "1 values and 0 products equalized in 2 sweeps, 2 refused",
        }[case]
    )


def run(program: Program, folder: Path, step: EqualizeWeights | None = None) -> Program:
    return pipeline.run_passes(program, [Normalize(), step or EqualizeWeights()], context_in(folder))


def first_layer(program: Program) -> Layer:
    return next(iter(layers(program.graph)))


def sides(site: RescalingSite) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The ranges of a linear site's only producer and only reader."""
    layer = layer_of(site.edits[0].node)
    assert layer is not None
    return row_ranges(layer), column_ranges(site.readers[0])


def test_ranges_are_equal_afterwards(tmp_path: Path) -> None:
    """A chain, whose middle layer is in two pairs, converges to equal ranges in both."""
    body = f"p = Conv {PAD} (sample, k0, b0) q = Conv {PAD} (p, k1) r = Relu (q) epsilon = Conv {PAD} (r, k2, b1)"
    program = factor_program(body)
    before = [np.abs(np.log(a / b)).max() for f in find_sites(program.graph) if not f.reason for a, b in [sides(f)]]
    after = run(program, tmp_path, EqualizeWeights(bound=1e-6, sweeps=100))
    found = [site for site in find_sites(after.graph) if not site.reason]
    assert len(found) == 2 and min(before) > 0.2
    for site in found:
        first, second = sides(site)
        np.testing.assert_allclose(first, second, rtol=1e-4)


def test_a_norm_counts_as_a_producer_only_where_it_is_wished(tmp_path: Path) -> None:
    body = f"{BLOCK} n = LayerNormalization <axis = -1> (x, g0, b0) y = MatMul (n, w0) {END}"
    without = run(factor_program(body), tmp_path, EqualizeWeights(norms=False))
    assert without.history[-1].note == "0 values and 0 products equalized in 0 sweeps, 0 refused"
    site = next(f for f in find_sites(run(factor_program(body), tmp_path).graph) if f.kind == "norm")
    gain, shift = (np.abs(numpy_of(v)) for v in site.edits[0].node.inputs[1:] if v is not None)
    np.testing.assert_allclose(3 * gain + shift, column_ranges(site.readers[0]), rtol=2e-3)


def test_an_adaptive_norm_counts_the_rows_of_its_layer(tmp_path: Path) -> None:
    body = f"""{BLOCK} mod = Gemm (cond, wide, wide_b) sc, sh = Split <axis = 1, num_outputs = 2> (mod)
        scale = Unsqueeze (sc, axis1) shift = Unsqueeze (sh, axis1) more = Add (scale, one)
        normal = LayerNormalization <axis = -1> (x, g0) scaled = Mul (normal, more) n = Add (scaled, shift)
        y = MatMul (n, w0) {END}"""
    program = factor_program(body, conditions=("cond",))
    rows = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    context = context_in(tmp_path, conditions={"cond": rows})
    after = pipeline.run_passes(program, [Normalize(), EqualizeWeights()], context)
    (site,) = [f for f in find_sites(after.graph) if not f.reason]
    assert site.kind == "adaln"
    layer = layer_of(site.edits[0].node)
    assert layer is not None and layer.bias is not None
    lengths, bias = row_lengths(layer), numpy_of(layer.bias)
    made = 3 * (lengths[:4] + np.abs(bias[:4] + 1)) + lengths[4:] + np.abs(bias[4:])
    np.testing.assert_allclose(made / column_ranges(site.readers[0]), np.ones(4), rtol=0.5)


def test_no_factor_is_beyond_the_limit(tmp_path: Path) -> None:
    program = factor_program(f"p = Conv {PAD} (sample, k0) epsilon = Conv {PAD} (p, k1)")
    quiet = program.graph.initializers["k0"]
    array = np.array(numpy_of(quiet))
    array[0] *= 1e-6
    array[1] = 0
    quiet.const_value = ir.tensor(array, name="k0")
    before = row_ranges(first_layer(program))
    after = row_ranges(first_layer(run(program, tmp_path, EqualizeWeights(limit=10.0))))
    np.testing.assert_allclose(after[0], before[0] * 10, rtol=1e-5)
    assert after[1] == 0


def test_what_was_refused_is_known_with_its_reason(tiny: Program, context: Context) -> None:
    after = pipeline.run_passes(tiny, [Normalize(), EqualizeWeights()], context)
    assert "SiLU" in after.refused["b1_a1"]
    assert after.history[-1].note.endswith(f"{len(after.refused)} refused")


def test_edits_that_are_one_percent_off_are_refused(
    tiny: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = apply_edit
    monkeypatch.setattr(sites, "apply_edit", lambda g, n, edit, m, a: true(g, n, edit, m * 1.01, a))
    with pytest.raises(NotExact, match="equalize_weights changed the function"):
        pipeline.run_passes(tiny, [Normalize(), EqualizeWeights()], context)


@pytest.mark.parametrize(("option", "value"), [("sweeps", 0), ("bound", 0.0), ("limit", 1.0), ("limit", np.inf)])
def test_options_that_make_no_sense(option: str, value: float) -> None:
    with pytest.raises(RecipeError, match=rf"equalize_weights\.{option}"):
        EqualizeWeights(**{option: value})  # type: ignore[arg-type]
