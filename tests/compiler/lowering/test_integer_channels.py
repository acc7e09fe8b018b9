"""Convolutions with an output scale for each channel: the integers of a numpy reference, from a QLinearConv."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor, feeds
from mezzotint.compiler.core.formats import INT8, Format, dequantize, quantize, scale_for_range
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import counts, is_constant, name_of, numpy_of
from mezzotint.compiler.graph.ops import Layer, layers, time_table
from mezzotint.compiler.lowering.integer import lower_integer
from mezzotint.compiler.lowering.lower import lower
from mezzotint.compiler.scales.timetable import deployed_rows
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.fold_time import FoldTime
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.runtime.session import open_session
from mezzotint.runtime.signature import Images
from tests.compiler.audit.test_versions import OLDEST, OLDEST_FOLDER, build_and_run
from tests.helpers.layers import CONV, TIMED, layer_program
from tests.helpers.tiny import SIGNATURE

GROUPS = (0, 1, 1)
CALLS = range(len(GROUPS))
LOUDNESS = np.array([0.03, 1.0, 6.0, 0.3], np.float32)  # of the output's channels
BODIES = {"bare": "epsilon = Conv <pads = [1, 1, 1, 1]> (sample, conv_w)", "bias": CONV, "timed": TIMED}


@dataclass(frozen=True)
class Case:
    """One convolution: its bias, which parameters are tables, and the bits of input and output."""

    bias: str
    x_table: bool = False
    y_table: bool = True
    bits: int = 8

    def __str__(self) -> str:
        words = [self.bias, f"{self.bits}bits", "x_rows" if self.x_table else "x_static"]
        return "-".join(words + ([] if self.y_table else ["y_static"]))


CASES = [Case(bias, rows, True, bits) for bias in BODIES for rows in (False, True) for bits in (8, 6)]
CASES += [Case(bias, rows, False) for bias in BODIES for rows in (False, True)]


def pictures(call: int) -> Images:
    """The inputs of a call, quieter from call to call."""
    loud = (1.0, 0.3, 0.2)[call]
    return (np.random.default_rng(call).standard_normal((8, 4, 4, 4)) * loud + 0.1).astype(np.float32)


def convolved(x: Images, w: Images) -> npt.NDArray[np.float64]:
    """A 3x3 convolution with a border of zeros."""
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.asarray(np.einsum("bihwkl,oikl->bohw", windows, w.astype(np.float64), optimize=True), np.float64)


def the_layer(program: Program) -> Layer:
    (layer,) = layers(program.graph)
    return layer


@dataclass(frozen=True)
class Reference:
    """The numpy reference of a case: the parameters before quantization, and the quantizers."""

    w: Images
    biases: Images  # [calls, C]
    x: Quantizer
    weight: Quantizer
    y: Quantizer

    def integers(self, call: int) -> npt.NDArray[np.int64]:
        """Return the float convolution of the dequantized input and weight, quantized for each channel."""
        (xs, xz), (ys, yz) = (row_of(q, call) for q in (self.x, self.y))
        x = dequantize(quantize(pictures(call), xs, xz, self.x.format), xs, xz)
        ws, wz = self.weight.scale, self.weight.zero_point
        w = dequantize(quantize(self.w, ws, wz, INT8, axis=0), ws, wz, axis=0)
        exact = convolved(x, w) + self.biases[call][:, None, None]
        q = np.rint(exact / ys[:, None, None].astype(np.float64)) + yz[:, None, None].astype(np.int64)
        return np.asarray(np.clip(q, self.y.format.qmin, self.y.format.qmax), np.int64)


def row_of(q: Quantizer, call: int) -> tuple[Images, npt.NDArray[np.uint8]]:
    return (q.scale[GROUPS[call]], q.zero_point[GROUPS[call]]) if q.table else (q.scale, q.zero_point)


def rows(extremes: npt.NDArray[np.float32], table: bool) -> npt.NDArray[np.float32]:
    """The extremes `[calls, 2, ...]` of each group, or those of all calls."""
    groups = [[k for k in CALLS if GROUPS[k] == g] for g in range(max(GROUPS) + 1)] if table else [list(CALLS)]
    joint = np.stack([np.stack([extremes[g, 0].min(axis=0), extremes[g, 1].max(axis=0)]) for g in groups])
    return joint if table else joint[0]


def quantizer(extremes: npt.NDArray[np.float32], table: bool, fmt: Format, axis: int | None) -> Quantizer:
    ends = rows(extremes, table)
    scale, zero = scale_for_range(ends[..., 0, :], ends[..., 1, :], fmt)
    if axis is None:
        scale, zero = scale[..., 0], zero[..., 0]
    return Quantizer(fmt, scale, zero, "test", axis, table)


def quantized(case: Case, context: Context) -> tuple[Program, Reference]:
    """Return the graph with its quantizers, and the reference: ranges are those of the calls' own values."""
    program = layer_program(BODIES[case.bias])
    loud = program.graph.initializers["conv_w"]
    loud.const_value = ir.tensor(numpy_of(loud) * LOUDNESS[:, None, None, None], name="conv_w")
    program = pipeline.run_passes(program, [Normalize(), FreezeTime(), FoldTime()], context)
    layer = the_layer(program)
    assert layer.weight is not None
    w = numpy_of(layer.weight)
    biases = np.zeros((len(CALLS), 4), np.float32)
    if layer.bias is not None:
        timed = time_table(layer.bias)
        assert (timed is not None) == (case.bias == "timed")
        table = numpy_of(timed[0] if timed else layer.bias).reshape(-1, 4)
        steps = deployed_rows(program)
        order = [steps.index(t) if timed else 0 for t in program.deployment.timesteps]
        biases = table[order]
    fmt = Format(case.bits)
    x_ends = np.array([[[pictures(k).min()], [pictures(k).max()]] for k in CALLS], np.float32)
    outputs = [convolved(pictures(k), w) + biases[k][:, None, None] for k in CALLS]
    y_ends = np.stack([np.stack([y.min(axis=(0, 2, 3)), y.max(axis=(0, 2, 3))]) for y in outputs]).astype(np.float32)
    limit = np.abs(w).max(axis=(1, 2, 3))
    known = Reference(
        w,
        biases,
        quantizer(x_ends, case.x_table, fmt, None),
        Quantizer(INT8, *scale_for_range(-limit, limit, INT8), "test", axis=0),
        quantizer(y_ends, case.y_table, fmt, 1),
    )
    names = [name_of(v) for v in (layer.activations[0], layer.weight, layer.output)]
    plan = Plan({Site(n): q for n, q in zip(names, (known.x, known.weight, known.y), strict=True)}, groups=GROUPS)
    steps_left = [InsertQdq(islands=(), lowering="integer"), CleanQdq()]
    return pipeline.run_passes(replace(program, plan=plan), steps_left, context), known


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Program, Reference, ir.Model]]:
    """Every case, lowered."""
    found = {}
    for case in CASES:
        program, known = quantized(case, Context(tmp_path_factory.mktemp("case"), threads=1))
        found[str(case)] = (program, known, lower_integer(program))
    return found


def results(program: Program, lowered: ir.Model, context: Context) -> Iterator[Images]:
    with Executor(lowered, context.folder, threads=1) as executor:
        for call in CALLS:
            yield executor.call(SIGNATURE, pictures(call), program.deployment.timesteps[call])["epsilon"]


def check_integers(known: Reference, call: int, got: Images) -> None:
    """The output lies on the grids of the channels, with the same integers except for a few near a rounding edge."""
    scale, zero = (part[:, None, None] for part in row_of(known.y, call))
    steps = got / scale
    integers = np.rint(steps)
    np.testing.assert_allclose(steps, integers, rtol=0, atol=1e-3)
    off = integers + zero - known.integers(call)
    assert np.abs(off).max() <= 1
    assert np.mean(off != 0) < 0.01


def louder(q: Quantizer, channel: int) -> Quantizer:
    """One channel's scale one per cent larger."""
    scale = q.scale.copy()
    scale[..., channel] *= np.float32(1.01)
    return replace(q, scale=scale)


@pytest.mark.parametrize("name", map(str, CASES))
def test_the_integers_are_those_of_numpy(
    name: str, made: dict[str, tuple[Program, Reference, ir.Model]], context: Context
) -> None:
    program, known, lowered = made[name]
    for call, got in zip(CALLS, results(program, lowered, context), strict=True):
        check_integers(known, call, got)
        for channel in range(4):
            with pytest.raises(AssertionError):
                check_integers(replace(known, y=louder(known.y, channel)), call, got)


@pytest.mark.parametrize("name", map(str, CASES))
def test_the_grids_are_filled(name: str, made: dict[str, tuple[Program, Reference, ir.Model]]) -> None:
    """Guards the comparison above: each channel uses most of a grid of its own."""
    known = made[name][1]
    spans = np.ptp(np.stack([known.integers(call) for call in CALLS]), axis=(0, 1, 3, 4))
    assert (spans >= 0.95 * known.y.format.qmax).all()
    assert len(np.unique(known.y.zero_point)) > 1 and np.ptp(np.log(known.y.scale)) > 3


@pytest.mark.parametrize("name", map(str, CASES))
def test_the_kernel_is_a_plain_integer_convolution(
    name: str, made: dict[str, tuple[Program, Reference, ir.Model]], context: Context
) -> None:
    program, known, lowered = made[name]
    (conv,) = (node for node in lowered.graph if node.op_type == "QLinearConv")
    assert conv.inputs[6] is not None and conv.inputs[7] is not None
    assert numpy_of(conv.inputs[6]) == 1 and numpy_of(conv.inputs[7]) == 128
    assert is_constant(conv.inputs[8]) == (not (known.x.table or known.y.table) and "timed" not in name)
    (dequantize_node,) = (node for node in lowered.graph if node.op_type == "DequantizeLinear")
    assert dequantize_node.attributes["axis"].as_int() == 1
    assert counts(lowered.graph)["QuantizeLinear"] == 1  # of the sample
    file = context.folder / "built.onnx"
    open_session(store.write(lowered, context.folder, "lowered"), threads=1, optimized=file)
    kernels = [node.op_type for node in onnx.load(file).graph.node]
    assert kernels.count("QLinearConv") == 1
    assert not {"Conv", "FusedConv", "NchwcConv"} & set(kernels)
    assert program.plan is not None and not program.plan.islands


@pytest.mark.parametrize("name", ["bias-8bits-x_static", "timed-8bits-x_rows"])
@pytest.mark.parametrize("ending", ["_bias_table", "scales_table"])
def test_a_table_in_the_graph_that_is_off_is_seen(
    name: str, ending: str, made: dict[str, tuple[Program, Reference, ir.Model]], context: Context
) -> None:
    """One channel of it: the biases hold the zero points, and the scales stand behind the kernel as well."""
    program, known, lowered = made[name]
    planted = lowered.clone()
    value = next(v for n, v in planted.graph.initializers.items() if n.endswith(ending))
    table = numpy_of(value).copy()
    table[:, -1] = table[:, -1] * 1.01
    value.const_value = ir.tensor(table, name=value.name)

    def check() -> None:
        for call, got in zip(CALLS, results(program, planted, context), strict=True):
            check_integers(known, call, got)

    with pytest.raises(AssertionError):
        check()


def test_zero_points_that_do_not_fit_into_the_bias_are_refused(context: Context) -> None:
    """Zero points go into the bias: where the grid is too fine for them the form is refused; `lower` makes room."""
    program, known = quantized(Case("bare"), context)
    fine = program.model.clone()
    for name in ("sample_scale", "conv_w_scale"):
        value = fine.graph.initializers[name]
        value.const_value = ir.tensor(numpy_of(value) * np.float32(1e-5), name=name)
    with pytest.raises(PassError, match="does not fit into int32"):
        lower_integer(program.with_model(fine))
    assert "QLinearConv" in counts(lower(program.with_model(fine)).graph)
    assert known.y.table


def test_the_oldest_onnxruntime_computes_the_same(
    made: dict[str, tuple[Program, Reference, ir.Model]], tmp_path: Path
) -> None:
    assert OLDEST_FOLDER.is_dir(), f"onnxruntime {OLDEST} is not in {OLDEST_FOLDER}; run: make venv"
    models: dict[str, Path] = {}
    for name, (program, _, lowered) in made.items():
        inputs = {name_of(v): v for v in lowered.graph.inputs}
        for call in CALLS:
            file = tmp_path / f"{name}-{call}.onnx"
            models[file.stem] = store.write(lowered, tmp_path, file.stem)
            given = feeds(inputs, SIGNATURE, pictures(call), program.deployment.timesteps[call], {})
            np.savez(file.with_suffix(".npz"), allow_pickle=False, **given)
    out = tmp_path / "built"
    out.mkdir()
    assert build_and_run(models, out, [OLDEST_FOLDER]) == OLDEST
    for name, (_, known, _) in made.items():
        for call in CALLS:
            got = np.load(out / f"{name}-{call}.npy")
            check_integers(known, call, got)
            with pytest.raises(AssertionError):
                check_integers(replace(known, y=louder(known.y, 1)), call, got)
