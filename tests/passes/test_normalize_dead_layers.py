"""Layers with zero weights become constants: the numbers stay, and what only they feed is gone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import counts
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.signature import Images
from tests.helpers.tiny import SIGNATURE, program_of

HEAD = "start = Conv <pads = [1,1,1,1]> (sample, w_in, b) "
TAIL = " epsilon = Conv <pads = [1,1,1,1]> (end, w_out)"
# The middle between `start` and `end`, and the layers that are left of it.
MIDDLES: dict[str, tuple[str, dict[str, int]]] = {
    "a branch": ("dead = Conv (start, zero, b) end = Add (start, dead)", {"Conv": 2}),
    "a branch without a bias": ("dead = Conv (start, zero) end = Add (dead, start)", {"Conv": 2, "Add": 0}),
    "a difference": ("dead = Conv (start, zero) end = Sub (start, dead)", {"Conv": 2, "Sub": 0}),
    "a chain": (
        "dead = Conv (start, zero, b) s = Sigmoid (dead) a = Mul (dead, s) c = Conv <pads = [1,1,1,1]> (a, w, b) "
        "n = GroupNormalization <num_groups = 2> (c, b, b) end = Add (start, n)",
        {"Conv": 2, "GroupNormalization": 0},
    ),
    "transposed": (
        "dead = ConvTranspose <strides = [2,2], output_padding = [1,1]> (start, zero, b) "
        "p = AveragePool <kernel_shape = [2,2], strides = [2,2]> (dead) end = Add (start, p)",
        {"Conv": 2, "ConvTranspose": 0},
    ),
    "a Concat": (
        "dead = Conv (start, zero, b) j = Concat <axis = 1> (dead, start) end = Conv (j, w_joined)",
        {"Conv": 3, "Expand": 1},
    ),
    "a gate": (
        "g = GlobalAveragePool (start) f = Flatten (g) z = Gemm <transB = 1> (f, zero_rows) u = Unsqueeze (z, axes) "
        "c = Conv <pads = [1,1,1,1]> (start, w, b) gated = Mul (c, u) end = Add (start, gated)",
        {"Conv": 3, "Gemm": 0},
    ),
    "tokens": (
        "r = Reshape (start, rows) t = Transpose <perm = [0, 2, 1]> (r) m = MatMul (t, zero_rows) a = Add (m, b) "
        "q = MatMul (a, rows_w) s = Add (t, q) v = Transpose <perm = [0, 2, 1]> (s) end = Reshape (v, images)",
        {"Conv": 2, "MatMul": 0},
    ),
    "two": ("d = Conv (start, zero, b) e = Conv (start, zero) p = Mul (d, e) end = Add (start, p)", {"Conv": 2}),
}


def program(middle: str, size: str = "8") -> Program:
    rng = np.random.default_rng(4)

    def normal(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return (rng.standard_normal(shape) / 4).astype(np.float32)

    constants = {
        "w_in": normal(4, 2, 3, 3),
        "w": normal(4, 4, 3, 3),
        "w_out": normal(2, 4, 3, 3),
        "b": normal(4),
        "zero": np.zeros((4, 4, 1, 1), np.float32),
        "zero_rows": np.zeros((4, 4), np.float32),
        "w_joined": normal(4, 8, 1, 1),
        "rows_w": normal(4, 4),
        "axes": np.array([2, 3]),
        "rows": np.array([0, 4, -1]),
        "images": np.array([0, 4, 8, 8]),
    }
    shape = f"float[batch,2,{size},{size}]"
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    g ({shape} sample, int64[batch] timestep) => ({shape} epsilon) {{ {HEAD} {middle} {TAIL} }}""")
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items() if n in read)
    return program_of(ir.from_proto(proto), shape=(2, 8, 8))


def outputs(model: ir.Model, context: Context) -> Images:
    x = np.random.default_rng(8).standard_normal((3, 2, 8, 8)).astype(np.float32)
    with Executor(model, context.folder, threads=1) as executor:
        return np.asarray(executor.call(SIGNATURE, x, 666)["epsilon"], np.float32)


@pytest.mark.parametrize("case", MIDDLES)
def test_dead_layers_and_what_only_they_feed_are_gone(context: Context, case: str) -> None:
    middle, left = MIDDLES[case]
    before = program(middle)
    after = pipeline.run_passes(before, [Normalize()], context)
    kinds = counts(after.graph)
    assert {op: kinds[op] for op in left} == left
    assert "became constants" in after.history[-1].note
    np.testing.assert_allclose(outputs(after.model, context), outputs(before.model, context), atol=2e-6)


@pytest.mark.parametrize("case", ["a branch", "a chain", "a Concat"])
def test_an_open_size_stays_right(context: Context, case: str) -> None:
    before = program(MIDDLES[case][0], "side")
    after = pipeline.run_passes(before, [Normalize()], context)
    np.testing.assert_allclose(outputs(after.model, context), outputs(before.model, context), atol=2e-6)


def test_a_network_that_lives_or_returns_a_constant_is_kept(context: Context) -> None:
    before = program("end = Conv <pads = [1,1,1,1]> (start, w)")
    assert counts(pipeline.run_passes(before, [Normalize()], context).graph)["Conv"] == 3
    value = before.graph.initializers["w_out"]
    value.const_value = ir.tensor(np.zeros((2, 4, 3, 3), np.float32), name="w_out")
    after = pipeline.run_passes(before, [Normalize()], context)
    assert counts(after.graph)["Conv"] == 3


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-steps", "w8a8-constant"])
@pytest.mark.parametrize("size", ["8", "side"])
def test_a_layer_that_reads_zeros_compiles(context: Context, recipe: str, size: str) -> None:
    """With an open size the Conv behind the dead one stays, and reads a value whose range has no width."""
    dead = (
        "dead = Conv (start, zero) c = Conv <pads = [1,1,1,1]> (dead, w, b) f = Conv <pads = [1,1,1,1]> (start, w, b) "
    )
    before = program(dead + "s = Add (c, f) e = Sigmoid (s) end = Mul (s, e)", size)
    after = pipeline.run_passes(before, RECIPES[recipe].passes, context)
    want, got = outputs(before.model, context), outputs(lower(after), context)
    assert 10 * np.log10(np.square(want).mean() / (np.square(want - got).mean() + 1e-9)) > 30
