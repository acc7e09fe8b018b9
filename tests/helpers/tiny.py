"""A denoiser small enough to compile in a second, with one of everything that the compiler treats specially.

Time MLP, two residual blocks with GroupNormalization and time shifts, attention with and without biases, a Gemm that
is not about time, a stride, a nearest Resize, a concatenated shortcut with a 1x1 convolution.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Signature

WIDTH = 16
SIGNATURE = Signature("sample", "timestep", "epsilon")

# Layers by what they become: the first and the last convolution are islands, the time layers become tables.
CONVS = 7
LINEARS = 5  # q, k, v, proj, gate
ATTENTIONS = 2
TIME_LAYERS = 4

_TIME = """
    number = Cast <to = 1> (timestep)
    column = Unsqueeze (number, axis_one)
    angles = Mul (column, frequencies)
    sines = Sin (angles)
    cosines = Cos (angles)
    waves = Concat <axis = 1> (sines, cosines)
    [time_1] time_a = Gemm <transB = 1> (waves, time_1_w, time_1_b)
    time_a_gate = Sigmoid (time_a)
    time_b = Mul (time_a, time_a_gate)
    [time_2] time_c = Gemm <transB = 1> (time_b, time_2_w, time_2_b)
    time_c_gate = Sigmoid (time_c)
    time = Mul (time_c, time_c_gate)
"""

_ATTENTION = """
    flat = Reshape (b1_out, to_tokens)
    tokens = Transpose <perm = [0, 2, 1]> (flat)
    [q] q = MatMul (tokens, q_w)
    [k] k = MatMul (tokens, k_w)
    [v] v_raw = MatMul (tokens, v_w)
    v = Add (v_raw, v_b)
    k_turned = Transpose <perm = [0, 2, 1]> (k)
    [scores] scores = MatMul (q, k_turned)
    scaled = Mul (scores, quarter)
    weights = Softmax <axis = -1> (scaled)
    [mix] mixed = MatMul (weights, v)
    [proj] proj_raw = MatMul (mixed, proj_w)
    proj = Add (proj_raw, proj_b)
    turned = Transpose <perm = [0, 2, 1]> (proj)
    image = Reshape (turned, to_image)
    attended = Add (image, b1_out)
    pooled = GlobalAveragePool (attended)
    vector = Flatten <axis = 1> (pooled)
    [gate] gate_raw = Gemm (vector, gate_w, gate_b)
    gate_act = Sigmoid (gate_raw)
    gate = Reshape (gate_act, to_column)
    gated = Mul (attended, gate)
"""

_MIDDLE = """
    [down] down = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (gated, down_w, down_b)
    wide = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">
        (down, , factors)
    [up] up = Conv <pads = [1, 1, 1, 1]> (wide, up_w, up_b)
    joined = Concat <axis = 1> (up, b1_out)
    [shortcut] shortcut = Conv (joined, shortcut_w, shortcut_b)
"""


def _block(name: str, x: str, skip: str) -> str:
    """GroupNorm, SiLU, Conv, + time, GroupNorm, SiLU, Conv, + skip; ends in `<name>_out`."""
    n = name
    return f"""
    {n}_n1 = GroupNormalization <num_groups = 4, epsilon = 0.00001> ({x}, {n}_g1, {n}_h1)
    {n}_s1 = Sigmoid ({n}_n1)
    {n}_a1 = Mul ({n}_n1, {n}_s1)
    [{n}_conv1] {n}_c1 = Conv <pads = [1, 1, 1, 1]> ({n}_a1, {n}_w1, {n}_b1)
    [{n}_time] {n}_t = Gemm <transB = 1> (time, {n}_tw, {n}_tb)
    {n}_tc = Reshape ({n}_t, to_column)
    {n}_c1t = Add ({n}_c1, {n}_tc)
    {n}_n2 = GroupNormalization <num_groups = 4, epsilon = 0.00001> ({n}_c1t, {n}_g2, {n}_h2)
    {n}_s2 = Sigmoid ({n}_n2)
    {n}_a2 = Mul ({n}_n2, {n}_s2)
    [{n}_conv2] {n}_c2 = Conv <pads = [1, 1, 1, 1]> ({n}_a2, {n}_w2, {n}_b2)
    {n}_out = Add ({n}_c2, {skip})
"""


def _weights(channels: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        fan = int(np.prod(shape[1:])) if len(shape) > 1 else 25
        return np.asarray(rng.standard_normal(shape) / np.sqrt(fan), np.float32)

    c = WIDTH
    made: dict[str, np.ndarray[Any, Any]] = {
        "axis_one": np.array([1]),
        "frequencies": (0.01 ** (np.arange(8) / 8)).reshape(1, 8).astype(np.float32),
        "to_column": np.array([0, -1, 1, 1]),
        "to_tokens": np.array([0, c, -1]),
        "to_image": np.array([0, c, 8, 8]),
        "quarter": np.array(0.25, np.float32),
        "factors": np.array([1, 1, 2, 2], np.float32),
        "in_w": normal(c, channels, 3, 3),
        "in_b": normal(c),
        "out_w": normal(channels, c, 3, 3),
        "out_b": normal(channels),
        "out_g": 1 + normal(c),
        "out_h": normal(c),
        "time_1_w": normal(32, 16),
        "time_1_b": normal(32),
        "time_2_w": normal(32, 32),
        "time_2_b": normal(32),
        **{f"{n}_w": normal(c, c) for n in ("q", "k", "v", "proj", "gate")},
        **{f"{n}_b": normal(c) for n in ("v", "proj", "gate", "down", "up", "shortcut")},
        **{f"{n}_w": normal(c, c, 3, 3) for n in ("down", "up")},
        "shortcut_w": normal(c, 2 * c, 1, 1),
    }
    for n, inputs in (("b1", c), ("b2", 2 * c)):
        made |= {f"{n}_g1": 1 + normal(inputs), f"{n}_h1": normal(inputs), f"{n}_w1": normal(c, inputs, 3, 3)}
        made |= {f"{n}_g2": 1 + normal(c), f"{n}_h2": normal(c), f"{n}_w2": normal(c, c, 3, 3)}
        made |= {f"{n}_b1": normal(c), f"{n}_b2": normal(c), f"{n}_tw": normal(c, 32), f"{n}_tb": normal(c)}
    return made


def tiny_model(channels: int = 1) -> ir.Model:
    """The denoiser: sample float32 [batch, channels, 8, 8], timestep int64 [batch]."""
    proto = onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    tiny (float[batch,{channels},8,8] sample, int64[batch] timestep) => (float[batch,{channels},8,8] epsilon)
    {{
    {_TIME}
    [conv_in] start = Conv <pads = [1, 1, 1, 1]> (sample, in_w, in_b)
    {_block("b1", "start", "start")}
    {_ATTENTION}
    {_MIDDLE}
    {_block("b2", "joined", "shortcut")}
    end_n = GroupNormalization <num_groups = 4, epsilon = 0.00001> (b2_out, out_g, out_h)
    end_s = Sigmoid (end_n)
    end = Mul (end_n, end_s)
    [conv_out] epsilon = Conv <pads = [1, 1, 1, 1]> (end, out_w, out_b)
    }}""")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in _weights(channels).items())
    onnx.checker.check_model(proto)
    return ir.from_proto(proto)


def short_schedule(num_train: int = 1000) -> Schedule:
    """Clipped pictures keep the latents of an untrained network within bounds, as a trained one keeps its own."""
    return Schedule.from_config(
        {"beta_schedule": "linear", "num_train_timesteps": num_train, "prediction_type": "epsilon", "clip_sample": True}
    )


def program_of(
    model: ir.Model,
    *,
    shape: tuple[int, ...] = (1, 8, 8),
    steps: int = 3,
    num_train: int = 1000,
    conditions: tuple[str, ...] = (),
) -> Program:
    """A model with inputs `sample` and `timestep` and the output `epsilon`, deployed with DDIM."""
    schedule = short_schedule(num_train)
    return Program(
        model=model,
        signature=Signature("sample", "timestep", "epsilon", conditions),
        schedule=schedule,
        deployment=Deployment.of(schedule, "ddim", steps),
        shape=shape,
        source={"kind": "test"},
    )


def tiny_program(channels: int = 1, steps: int = 3) -> Program:
    return program_of(tiny_model(channels), shape=(channels, 8, 8), steps=steps)


def context_in(folder: Path, **options: Any) -> Context:
    """A context of few samples and two threads."""
    return Context(folder, **{"threads": 2, "samples": 4, "batch": 2, **options})
