"""lower_transposed: the same numbers for generated kernels, strides, pads and groups; reasons; integer kernels."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import along
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import counts, is_constant, numpy_of
from mezzotint.compiler.graph.require import inputs
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.lower_transposed import LowerTransposed
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.runtime.session import open_session
from mezzotint.runtime.signature import Images
from tests.helpers.tiny import SIGNATURE, context_in, program_of

SIZES = (5, 4)


def program(
    attributes: str, weight: tuple[int, ...], *, bias: bool = True, sizes: str = "5,4", group: int = 1
) -> Program:
    """Sample [batch, 4, 5, 4], or [batch, 4, 20] for one dimension, through one transposed convolution."""
    rng = np.random.default_rng(1)
    flat = len(weight) == 3
    constants: dict[str, Any] = {
        "w": rng.standard_normal(weight).astype(np.float32),
        "b": rng.standard_normal(weight[1] * group).astype(np.float32),
        "row": np.array([0, 4, -1]),
        "columns": np.array([0, 0, 1, -1]),
    }
    node = f"ConvTranspose <group = {group}, {attributes}> ({'x' if flat else 'sample'}, w{', b' if bias else ''})"
    body = (
        f"x = Reshape (sample, row) [up] y = {node} epsilon = Reshape (y, columns)"
        if flat
        else f"[up] epsilon = {node}"
    )
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,{sizes}] sample, int64[batch] timestep) => (float[batch,c,h,v] epsilon) {{ {body} }}""")
    read = {name for item in proto.graph.node for name in item.input}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items() if n in read)
    return program_of(ir.from_proto(proto), shape=(4, *SIZES))


def outputs(model: ir.Model, context: Context) -> Images:
    x = np.random.default_rng(2).standard_normal((2, 4, *SIZES)).astype(np.float32)
    with Executor(model, context.folder, threads=1) as executor:
        return np.asarray(executor.call(SIGNATURE, x, 0)["epsilon"], np.float32)


def rewritten(normal: Program, context: Context) -> Program:
    """The program behind the pass, whatever the size and the role of its layer; without the pipeline's check."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("mezzotint.passes.lower_transposed._ROLES", ())
        return LowerTransposed(products=0).run(normal.with_model(normal.model.clone()), context)


def lowered(before: Program, context: Context) -> tuple[Program, float]:
    """The program behind the pass, and the largest difference."""
    after = rewritten(pipeline.run_passes(before, [Normalize()], context), context)
    want, got = outputs(before.model, context), outputs(after.model, context)
    assert want.shape == got.shape
    return after, float(np.abs(want - got).max() / max(1.0, np.abs(want).max()))


@st.composite
def layers(draw: st.DrawFn) -> tuple[str, tuple[int, ...], bool, int]:
    rank = draw(st.sampled_from([1, 2, 2]))
    few = st.integers(1, 3)
    kernel, strides = ([draw(few if i else st.integers(1, 4)) for _ in range(rank)] for i in range(2))
    dilations = [draw(st.sampled_from([1, 1, 2])) for _ in range(rank)]
    taps = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = [draw(st.integers(0, t - 1)) for t in taps * 2]
    extra = [draw(st.integers(0, s - 1)) for s in strides]
    # At least one element is left of the smallest side of the input.
    pads = [min(p, (SIZES[1] - 1) * strides[i % rank] // 2) for i, p in enumerate(pads)]
    text = f"kernel_shape = {kernel}, strides = {strides}, dilations = {dilations}, pads = {pads}"
    text += f", output_padding = {extra}"
    groups = draw(st.sampled_from([1, 2, 4]))
    return text, (4, draw(st.integers(1, 3)), *kernel), draw(st.booleans()), groups


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layers())
def test_any_layer_keeps_its_numbers(tmp_path_factory: pytest.TempPathFactory, layer: Any) -> None:
    attributes, weight, bias, group = layer
    context = context_in(tmp_path_factory.mktemp("up"))
    after, difference = lowered(program(attributes, weight, bias=bias, group=group), context)
    assert counts(after.graph)["ConvTranspose"] == 0, after.note
    assert difference < 1e-5


@pytest.mark.parametrize(
    ("attributes", "kernel", "kinds"),
    [
        ("strides = [2, 2], pads = [1, 1, 1, 1]", 4, {"Conv": 1, "DepthToSpace": 1, "Slice": 1}),
        ("strides = [2, 2]", 2, {"Conv": 1, "DepthToSpace": 1}),
        ("pads = [1, 1, 1, 1]", 3, {"Conv": 1}),
        ('strides = [2, 2], auto_pad = "SAME_UPPER"', 3, {"Conv": 1, "DepthToSpace": 1}),
        ('strides = [2, 2], auto_pad = "SAME_LOWER"', 3, {"Conv": 1, "DepthToSpace": 1, "Slice": 1}),
        ('strides = [2, 2], auto_pad = "VALID"', 2, {"Conv": 1, "DepthToSpace": 1}),
        ("strides = [2, 2], output_shape = [9, 8]", 3, {"Conv": 1, "DepthToSpace": 1, "Slice": 1}),
        ("strides = [3, 2]", 3, {"Conv": 1, "Transpose": 1, "Reshape": 2, "Slice": 1}),
    ],
)
def test_what_is_written(context: Context, attributes: str, kernel: int, kinds: dict[str, int]) -> None:
    after, difference = lowered(program(attributes, (4, 3, kernel, kernel)), context)
    assert dict(counts(after.graph)) == kinds
    assert difference < 1e-5
    (conv,) = (node for node in after.graph if node.op_type == "Conv")
    assert conv.name == "up" and after.refused == {}


@pytest.mark.parametrize("attributes", ["strides = [2, 2], pads = [1, 1, 1, 1]", "pads = [1, 1, 1, 1]"])
def test_an_open_size_is_no_hindrance(context: Context, attributes: str) -> None:
    after, difference = lowered(program(attributes, (4, 3, 4, 4), sizes="height,width"), context)
    assert counts(after.graph)["Conv"] == 1 and difference < 1e-5


def test_what_is_left_is_named_with_the_reason(context: Context) -> None:
    before = program("strides = [2, 3]", (4, 3, 3, 3), sizes="height,width")
    after = rewritten(pipeline.run_passes(before, [Normalize()], context), context)
    assert after.refused == {"up": "its strides differ, and its sizes are open"}
    assert "left: up (its strides differ" in after.note


def decoder(channels: int = 4, kernel: int = 4, group: int = 1) -> Program:
    """Two transposed convolutions, `up` in the middle and `late` as the penultimate layer."""
    up = f"ConvTranspose <group = {group}, strides = [2,2], pads = [1,1,1,1]>"
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,4,4,4] epsilon) {{
      a = Conv <pads = [1,1,1,1]> (sample, first, b) s = Sigmoid (a) h = Mul (a, s)
      c = Conv <pads = [1,1,1,1]> (h, w, b) d = Relu (c)
      [up] u = {up} (d, v, b) e = Sigmoid (u) f = Mul (u, e)
      i = Conv <pads = [1,1,1,1], strides = [2,2]> (f, w, b) j = Relu (i)
      [late] k = {up} (j, z, b) l = Relu (k)
      epsilon = Conv <pads = [1,1,1,1], strides = [2,2]> (l, last) }}""")
    rng = np.random.default_rng(1)
    c = channels
    up_shape = (c, c // group, kernel, kernel)
    shapes = {"first": (c, 4, 3, 3), "w": (c, c, 3, 3), "v": up_shape, "z": up_shape, "b": (c,), "last": (4, c, 3, 3)}
    arrays = {name: rng.standard_normal(shape) / np.sqrt(9 * c) for name, shape in shapes.items()}
    for i in range(group):  # groups of very different sizes: one scale for all of them would not do
        arrays["v"][i * c // group : (i + 1) * c // group] *= 4.0**i
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items())
    return program_of(ir.from_proto(proto), shape=(4, 4, 4))


@pytest.mark.parametrize(
    ("channels", "products", "reasons"),
    [
        (16, 256, ("fewer than 256 products", "island 'penultimate'")),
        (32, 256, (None, "island 'penultimate'")),
        (4, 0, (None, "island 'penultimate'")),
    ],
)
def test_islands_and_small_layers_keep_the_float_kernel(
    context: Context, channels: int, products: int, reasons: tuple[str | None, str]
) -> None:
    after = pipeline.run_passes(decoder(channels), [Normalize(), LowerTransposed(products)], context)
    assert all((why is None) == (name not in after.refused) for name, why in zip(("up", "late"), reasons, strict=True))
    assert all(why is None or why in after.refused[name] for name, why in zip(("up", "late"), reasons, strict=True))
    assert counts(after.graph)["ConvTranspose"] == len(after.refused)


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(RecipeError, match="products"):
        LowerTransposed(products=-1)


@pytest.mark.parametrize(
    ("recipe", "sources"),
    [
        ("w8a8", ("QLinearConv", "Transpose")),  # bytes
        ("w8a8-steps", ("DequantizeLinear",)),  # floats, for a scale of each channel does not survive the move
    ],
)
def test_it_runs_on_integers(context: Context, recipe: str, sources: tuple[str, ...]) -> None:
    """Between convolutions: DepthToSpace moves bytes where the output has one scale."""
    before = decoder(32)
    after = pipeline.run_passes(before, RECIPES[recipe].passes, context)
    file, built = context.folder / "file.onnx", context.folder / "built.onnx"
    ir.save(lower(after), file)
    open_session(file, threads=1, optimized=built)
    graph = ir.load(built).graph
    (conv,) = (node for node in graph if re.fullmatch("up(_token_.*)?", node.name or ""))
    (wide,) = (node for node in graph if node.op_type == "DepthToSpace")
    assert conv.op_type == "QLinearConv"
    source = None if wide.inputs[0] is None else wide.inputs[0].producer()
    assert source is not None and source.op_type in sources
    x = np.random.default_rng(2).standard_normal((2, 4, 4, 4)).astype(np.float32)
    with (
        Executor(before.model, context.folder, threads=1) as exact,
        Executor(lower(after), context.folder, threads=1) as ours,
    ):
        want, got = (np.asarray(e.call(SIGNATURE, x, 666)["epsilon"], np.float32) for e in (exact, ours))
    assert 10 * np.log10(np.square(want).mean() / np.square(want - got).mean()) > 25


@pytest.mark.parametrize(
    ("recipe", "group", "stored"),
    [("w8a8", 1, "vz"), ("w8a8", 2, "vz"), ("w8a8-steps", 2, "v"), ("weights", 1, "vz")],
)
def test_a_layer_that_stays_in_float_has_weights_of_8_bits(
    context: Context, recipe: str, group: int, stored: str
) -> None:
    """The file holds integers, and onnxruntime makes them float once. An island (`late`, by w8a8-steps) keeps float."""
    before = decoder(16, group=group)
    chosen = RECIPES["w8a8"] if recipe == "weights" else RECIPES[recipe]
    only_weights = {"choose_scales.activation_bits": "float", "choose_scales.weight_bits": 4}
    passes = with_options(chosen, only_weights if recipe == "weights" else {}).passes
    after = pipeline.run_passes(before, passes, context)
    model = lower(after)
    constants = {name: v.const_value for name, v in model.graph.initializers.items() if v.const_value is not None}
    floats = {name for name in ("v", "z") if name in constants}
    integers = [t for t in constants.values() if t.dtype == ir.DataType.INT8 and t.shape == (16, 16 // group, 4, 4)]
    assert floats == {"v", "z"} - set(stored) and len(integers) == len(stored)
    plan = after.require_plan()
    assert plan.islands["up"].endswith("its weights have 8 bits")
    quantizer, weight = plan.of("v", "up"), before.graph.initializers["v"].const_value
    assert quantizer is not None and weight is not None and quantizer.format.bits == 8
    file, built = context.folder / "file.onnx", context.folder / "built.onnx"
    ir.save(model, file)
    open_session(file, threads=1, optimized=built)
    graph = ir.load(built).graph
    kernels = [node for node in graph if node.op_type == "ConvTranspose"]
    assert len(kernels) == 2 and all(is_constant(v) for node in kernels for v in node.inputs[1:])
    used = {node.name: numpy_of(inputs(node, 2)[1]) for node in kernels}
    (kept,) = (array for name, array in used.items() if (name or "").startswith("up"))
    steps = np.abs(kept - weight.numpy()) / along(quantizer.scale, quantizer.axis, 4)
    inside = np.abs(weight.numpy()) <= 127 * along(quantizer.scale, quantizer.axis, 4)  # others are clipped
    assert steps[inside].max() < 0.5001 and inside.mean() > 0.95
    error = np.square(kept - weight.numpy()).reshape(group, -1).mean(1) / np.square(weight.numpy()).reshape(
        group, -1
    ).mean(1)
    assert 10 * np.log10(error.max()) < -38, "as much for the quiet group"
