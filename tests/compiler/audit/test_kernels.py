"""The nodes that onnxruntime runs on integers, counted in the graph that it built."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.lowering.qdq import lower_qdq
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.session import open_session
from tests.helpers.tiny import ATTENTIONS, CONVS, LINEARS, TIME_LAYERS, tiny_program

INTEGER_CONVS = ("QLinearConv",)
INTEGER_MATMULS = ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")
FLOAT_LAYERS = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits")


def w8a8(islands: tuple[str, ...] = ("first", "last"), leave_out: tuple[str, ...] = ()) -> list[Pass]:
    steps = [p for p in RECIPES["w8a8"].passes if p.name not in leave_out]
    return [replace(p, islands=islands) if isinstance(p, InsertQdq) else p for p in steps]


def built(program: Program, folder: Path) -> Counter[str]:
    """Operations of the graph that onnxruntime built for a program."""
    file = folder / "optimized.onnx"
    open_session(store.write(lower_qdq(program.model), folder, "lowered"), threads=2, optimized=file)
    return Counter(node.op_type for node in onnx.load(file, load_external_data=False).graph.node)


def of(kernels: Counter[str], names: tuple[str, ...]) -> int:
    return sum(kernels[name] for name in names)


@pytest.mark.parametrize("channels", [1, 4])
def test_all_layers_but_the_islands_are_integer_kernels(channels: int, context: Context) -> None:
    program = pipeline.run_passes(tiny_program(channels), w8a8(), context)
    assert program.plan is not None
    assert set(program.plan.islands) == {"conv_in", "conv_out"}
    kernels = built(program, context.folder)
    assert of(kernels, INTEGER_CONVS) == CONVS
    assert of(kernels, INTEGER_MATMULS) == LINEARS + ATTENTIONS
    assert of(kernels, FLOAT_LAYERS) == len(program.plan.islands)


def test_without_islands_nothing_stays_in_float(tiny: Program, context: Context) -> None:
    kernels = built(pipeline.run_passes(tiny, w8a8(islands=()), context), context.folder)
    assert of(kernels, INTEGER_CONVS) == CONVS + 2
    assert of(kernels, FLOAT_LAYERS) == 0


def test_attention_may_be_an_island(tiny: Program, context: Context) -> None:
    program = pipeline.run_passes(tiny, w8a8(islands=("first", "last", "attention")), context)
    kernels = built(program, context.folder)
    assert of(kernels, INTEGER_CONVS) == CONVS
    assert of(kernels, INTEGER_MATMULS) == LINEARS
    assert of(kernels, FLOAT_LAYERS) == 2 + ATTENTIONS


def test_the_time_layers_are_gone_only_when_frozen(tiny: Program, context: Context) -> None:
    program = pipeline.run_passes(tiny, w8a8(leave_out=("freeze_time",)), context)
    kernels = built(program, context.folder)
    assert of(kernels, INTEGER_CONVS) == CONVS
    assert of(kernels, INTEGER_MATMULS) == LINEARS + ATTENTIONS + TIME_LAYERS


def test_clean_qdq_is_not_needed_for_integer_kernels(tiny: Program, context: Context) -> None:
    program = pipeline.run_passes(tiny, w8a8(leave_out=("clean_qdq",)), context)
    kernels = built(program, context.folder)
    assert of(kernels, INTEGER_CONVS) == CONVS
    assert of(kernels, INTEGER_MATMULS) == LINEARS + ATTENTIONS


def narrow_program(tiny: Program, context: Context, with_clip: bool) -> Program:
    """The tiny net at 4 bits, outputs too; without the Clip nodes of the activations when asked for."""
    bits: dict[str, Any] = dict.fromkeys(("activation_bits", "output_bits", "weight_bits"), 4)
    steps = [replace(p, **bits) if isinstance(p, ChooseScales) else p for p in w8a8()]
    program = pipeline.run_passes(tiny, steps, context)
    if not with_clip:
        for node in [n for n in program.graph if n.op_type == "Clip" and "quantized" in str(n.inputs[0])]:
            assert node.inputs[0] is not None
            node.outputs[0].replace_all_uses_with(node.inputs[0])
    return program


def largest_activation(program: Program, context: Context) -> int:
    """The largest integer that any DequantizeLinear of an activation reads, over inputs far outside the ranges."""
    taps = [
        name_of(n.inputs[0])
        for n in program.graph
        if n.op_type == "DequantizeLinear" and n.inputs[0] is not None and n.inputs[0].dtype == ir.DataType.UINT8
    ]
    x = np.random.default_rng(0).normal(scale=50, size=(2, *program.shape)).astype(np.float32)
    with Executor(program.model, context.folder, taps=taps, threads=2) as executor:
        outputs = executor.call(program.signature, x, program.deployment.timesteps[0])
    return max(int(outputs[name].max()) for name in taps)


def test_fewer_than_8_bits_stay_inside_their_grid_on_integer_kernels(tiny: Program, context: Context) -> None:
    program = narrow_program(tiny, context, with_clip=True)
    weights = [
        numpy_of(v)
        for v in lower_qdq(program.model).graph.initializers.values()
        if v.dtype == ir.DataType.INT8 and v.shape is not None and len(v.shape) > 1
    ]
    assert max(int(np.abs(w).max()) for w in weights) == 7
    assert largest_activation(program, context) == 15
    kernels = built(program, context.folder)
    assert of(kernels, INTEGER_CONVS) == CONVS
    assert of(kernels, FLOAT_LAYERS) == 2


def test_without_the_clip_a_narrow_format_would_be_left(tiny: Program, context: Context) -> None:
    assert largest_activation(narrow_program(tiny, context, with_clip=False), context) > 15
