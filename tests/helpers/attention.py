"""A network that is one attention of two heads between layers, with what quantization finds hard planted in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.observe import Observe
from tests.helpers.tiny import program_of

Floats = npt.NDArray[np.float32]

CHANNELS = 8
SPLIT = """q4 = Reshape (queries, heads) q = Transpose <perm = [0, 2, 1, 3]> (q4)
    k4 = Reshape (keys, heads) k = Transpose <perm = [0, 2, 3, 1]> (k4)
    v4 = Reshape (values, heads) v = Transpose <perm = [0, 2, 1, 3]> (v4)"""
SOFTMAX = "scaled = Mul (scores, half) weights = Softmax <axis = -1> (scaled)"
SHARP = SOFTMAX.replace("Mul", "Div")  # scores four times as large
MASKED = """scaled = Mul (half, scores) seen = Add (mask, scaled) weights = Softmax <axis = -1> (seen)"""
OUT = "back = Transpose <perm = [0, 2, 1, 3]> (mixed) joined = Reshape (back, whole)"


def attention_program(
    softmax: str = SOFTMAX,
    *,
    side: int = 8,
    split: str = SPLIT,
    key_bias: Sequence[float] = (0,) * CHANNELS,
    value_bias: Sequence[float] = (1,) * CHANNELS,
    query_gain: Sequence[float] = (1,) * CHANNELS,
    value_gain: Sequence[float] = (1,) * CHANNELS,
) -> Program:
    """Return the network `[batch, 8, side, side]` with biases of the channels of keys and values, and gains.

    The gains of queries divide the keys, those of values the layer behind: the function stays.
    """
    tokens = side * side
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((4, CHANNELS, CHANNELS)) / np.sqrt(CHANNELS)
    weights[0] *= np.asarray(query_gain)
    weights[1] /= np.asarray(query_gain)
    weights[2] *= np.asarray(value_gain)
    weights[3] /= np.asarray(value_gain)[:, None]
    mask = np.where(np.arange(tokens) % 4 == 3, -1e4, 0.0).reshape(1, 1, 1, tokens)
    floats: Mapping[str, npt.NDArray[np.float64]] = {
        **{f"{name}_w": weight for name, weight in zip(("q", "k", "v", "out"), weights, strict=True)},
        "k_b": np.asarray(key_bias, np.float64),
        "v_b": np.asarray(value_bias, np.float64),
        "mask": mask,
    }
    constants = ", ".join(
        f"float[{','.join(map(str, array.shape))}] {name} = {{{', '.join(f'{v:.5f}' for v in array.reshape(-1))}}}"
        for name, array in floats.items()
    )
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,{CHANNELS},{side},{side}] sample, int64[batch] timestep)
      => (float[batch,{CHANNELS},{side},{side}] epsilon)
    <int64[3] flat = {{0, {CHANNELS}, {tokens}}}, int64[4] heads = {{0, {tokens}, 2, {CHANNELS // 2}}},
     int64[3] whole = {{0, {tokens}, {CHANNELS}}}, int64[4] image = {{0, {CHANNELS}, {side}, {side}}},
     float half = {{0.5}}, {constants}>
    {{ columns = Reshape (sample, flat) x = Transpose <perm = [0, 2, 1]> (columns)
       queries = MatMul (x, q_w) k_plain = MatMul (x, k_w) keys = Add (k_plain, k_b)
       v_plain = MatMul (x, v_w) values = Add (v_plain, v_b) {split}
       [scores] scores = MatMul (q, k) {softmax} [mix] mixed = MatMul (weights, v) {OUT} out = MatMul (joined, out_w)
       turned = Transpose <perm = [0, 2, 1]> (out) epsilon = Reshape (turned, image) }}"""
    return program_of(infer_shapes(ir.from_onnx_text(text)), shape=(CHANNELS, side, side))


def values_of(program: Program, context: Context, *names: str) -> list[Floats]:
    """Return these values of one call with two samples, and the prediction behind them."""
    x = np.random.default_rng(1).standard_normal((2, *program.shape)).astype(np.float32)
    with Executor(program.model, context.folder, taps=names, threads=1, level="none") as executor:
        seen = executor.call(program.signature, x, program.deployment.timesteps[0])
    return [np.asarray(seen[name], np.float32) for name in (*names, "epsilon")]


def quantized_attention(
    program: Program,
    context: Context,
    *rewrites: Pass,
    bits: int = 8,
    behind: Sequence[Pass] = (),
    islands: Sequence[str] = (),
) -> Program:
    """Return the program after these rewrites with both products quantized, and its layers with weights in float."""
    plan = ChooseScales("minmax", activation_bits=bits, levels=0)  # type: ignore[arg-type]
    quantize = InsertQdq(islands=("queries", "k_plain", "v_plain", "out", *islands))
    return pipeline.run_passes(program, (*rewrites, Observe(), plan, quantize, CleanQdq(), *behind), context)


def fidelity(program: Program, context: Context, *rewrites: Pass, **options: Any) -> float:
    """Return the SQNR of the prediction in dB, with the products quantized as above and nothing else."""
    after = quantized_attention(program, context, *rewrites, **options)
    (exact,), (made,) = values_of(program, context), values_of(after, context)
    error = np.square(exact.astype(np.float64) - made).sum()
    return float(10 * np.log10(np.square(exact, dtype=np.float64).sum() / error))
