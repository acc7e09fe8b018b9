"""rotate_channels: the function stays, a loud channel is spread, and an attention takes its rotation for free."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, numpy_of
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.observe import Observe
from mezzotint.passes.rotate_channels import RotateChannels
from tests.conftest import Check
from tests.helpers.tiny import program_of


def test_layers_of_one_value_share_its_rotation(check_golden: Check) -> None:
    """The pipeline compares both graphs in numbers: blocks of two of the four channels."""
    after = check_golden(RotateChannels(block=2, islands=()), "shared")
    assert after.history[-1].note.endswith("2 values at run time")


def matrix(seed: int, rows: int = 8, columns: int = 8) -> str:
    values = 0.1 * np.random.default_rng(seed).standard_normal(rows * columns)
    return f"float[{rows},{columns}] w{seed} = {{{', '.join(f'{v:.3f}' for v in values)}}}"


def program(loud: float = 1.0, out: str = "out = MatMul (joined, w3)") -> Program:
    """An attention of two heads between layers; the fourth channel of what its layers read is loud."""
    channels = ", ".join(str(loud if channel == 3 else 1.0) for channel in range(8))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,8,4,4] sample, int64[batch] timestep) => (float[batch,8,4,4] epsilon)
    <int64[3] flat = {{0, 8, 16}}, int64[4] heads = {{0, 16, 2, 4}}, int64[3] whole = {{0, 16, 8}},
     int64[4] image = {{0, 8, 4, 4}}, float[8] b = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[8] loud = {{{channels}}},
     {matrix(0)}, {matrix(1)}, {matrix(2)}, {matrix(3)}>
    {{ columns = Reshape (sample, flat) pixels = Transpose <perm = [0, 2, 1]> (columns) x = Mul (pixels, loud)
       queries = MatMul (x, w0) keys = MatMul (x, w1) plain = MatMul (x, w2) values = Add (plain, b)
       q4 = Reshape (queries, heads) q = Transpose <perm = [0, 2, 1, 3]> (q4)
       k4 = Reshape (keys, heads) k = Transpose <perm = [0, 2, 3, 1]> (k4)
       v4 = Reshape (values, heads) v = Transpose <perm = [0, 2, 1, 3]> (v4)
       scores = MatMul (q, k) weights = Softmax <axis = -1> (scores) seen = MatMul (weights, v)
       back = Transpose <perm = [0, 2, 1, 3]> (seen) joined = Reshape (back, whole) {out}
       turned = Transpose <perm = [0, 2, 1]> (out) epsilon = Reshape (turned, image) }}"""
    return program_of(infer_shapes(ir.from_onnx_text(text)), shape=(8, 4, 4))


def test_the_layers_around_an_attention_take_its_rotation(context: Context) -> None:
    """Head by head: the pipeline checks that the function stays; only the input of the first three is turned."""
    after = pipeline.run_passes(program(), [RotateChannels(islands=())], context)
    assert after.history[-1].note == "1 outputs of attention rotated by the layers around it, 1 values at run time"
    assert counts(after.graph)["MatMul"] == counts(program().graph)["MatMul"] + 1
    assert not np.allclose(numpy_of(after.graph.initializers["b_rotated"]), np.arange(1, 9))


def test_what_others_read_too_is_turned_at_run_time(context: Context) -> None:
    out = "product = MatMul (joined, w3) out = Max (product, joined)"
    after = pipeline.run_passes(program(out=out), [RotateChannels(islands=())], context)
    assert after.history[-1].note == "0 outputs of attention rotated by the layers around it, 2 values at run time"


def quality(context: Context, *rewrites: Pass) -> float:
    """The SQNR of the prediction in dB, with weights and activations of 8 bits, where one channel is loud."""
    float_program = program(loud=20.0)
    plan = [Observe(), ChooseScales(), InsertQdq(islands=("attention",)), CleanQdq()]
    after = pipeline.run_passes(float_program, [*rewrites, *plan], context)
    x = np.random.default_rng(1).standard_normal((2, 8, 4, 4)).astype(np.float32)
    runs = [Executor(p.model, context.folder, level="none").call(p.signature, x, 0) for p in (float_program, after)]
    exact, made = (run["epsilon"].astype(np.float64) for run in runs)
    return float(10 * np.log10(np.square(exact).sum() / np.square(made - exact).sum()))


def test_a_loud_channel_costs_less(context: Context) -> None:
    assert quality(context, RotateChannels(islands=())) > quality(context) + 3


def test_a_block_is_a_power_of_two() -> None:
    with pytest.raises(RecipeError, match=r"rotate_channels\.block is 48"):
        RotateChannels(block=48)
