"""A U-Net of opset 13 as torch's older exporter wrote them, small: what every recipe has to be able to read.

GroupNorm is Reshape, InstanceNormalization, a Reshape to a computed shape, Mul, Add; a residual sum is divided by one;
time is added behind an activation; MaxPool and Resize change the size, and Concat joins the branches.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

OLD_CONVS = 10
OLD_NORMS = 6
_WIDTHS = {"d": (1, 8), "m": (8, 16), "u": (24, 8)}
_TIME = """
    number = Cast <to = 1> (timestep)
    column = Unsqueeze (number, axis_one)
    angles = Mul (column, frequencies)
    sines = Sin (angles)
    cosines = Cos (angles)
    waves = Concat <axis = 1> (sines, cosines)
    hidden = Gemm <transB = 1> (waves, time1_w, time1_b)
    gate = Sigmoid (hidden)
    active = Mul (hidden, gate)
    time = Gemm <transB = 1> (active, time2_w, time2_b)
"""


def _norm(name: str, x: str) -> str:
    """GroupNorm and SiLU, in `<name>`."""
    n = name
    return f"""
    {n}_flat = Reshape ({x}, groups)
    {n}_normal = InstanceNormalization <epsilon = 0.00001> ({n}_flat, two_ones, two_zeros)
    {n}_shape = Shape ({x})
    {n}_back = Reshape ({n}_normal, {n}_shape)
    {n}_scaled = Mul ({n}_back, {n}_g)
    {n}_shifted = Add ({n}_scaled, {n}_h)
    {n}_gate = Sigmoid ({n}_shifted)
    {n} = Mul ({n}_shifted, {n}_gate)
    """


def _block(name: str, x: str) -> str:
    n = name
    return f"""
    [{n}_c1] {n}_a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({x}, {n}_c1_w, {n}_c1_b)
    {_norm(f"{n}_n1", f"{n}_a")}
    {n}_t = Gemm <transB = 1> (time, {n}_t_w, {n}_t_b)
    {n}_rows = Unsqueeze ({n}_t, axis_two)
    {n}_maps = Unsqueeze ({n}_rows, axis_three)
    {n}_timed = Add ({n}_n1, {n}_maps)
    [{n}_c2] {n}_b = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> ({n}_timed, {n}_c2_w, {n}_c2_b)
    {_norm(f"{n}_n2", f"{n}_b")}
    [{n}_skip] {n}_s = Conv <kernel_shape = [1, 1]> ({x}, {n}_skip_w, {n}_skip_b)
    {n}_sum = Add ({n}_n2, {n}_s)
    {n}_out = Div ({n}_sum, one)
    """


def _weights() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(8)
    weights: dict[str, np.ndarray[Any, Any]] = {
        **{f"axis_{word}": np.array([i]) for i, word in ((1, "one"), (2, "two"), (3, "three"))},
        "frequencies": (0.01 ** (np.arange(8) / 8)).reshape(1, 8).astype(np.float32),
        "groups": np.array([0, 2, -1]),
        "two_ones": np.ones(2, np.float32),
        "two_zeros": np.zeros(2, np.float32),
        "one": np.array(1, np.float32),
        "factors": np.array([1, 1, 2, 2], np.float32),
    }

    def layer(name: str, *shape: int) -> None:
        weights[f"{name}_w"] = np.asarray(rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])), np.float32)
        weights[f"{name}_b"] = np.asarray(rng.standard_normal(shape[0]) * 0.1, np.float32)

    layer("time1", 16, 16)
    layer("time2", 16, 16)
    for name, (inputs, outputs) in _WIDTHS.items():
        layer(f"{name}_c1", outputs, inputs, 3, 3)
        layer(f"{name}_c2", outputs, outputs, 3, 3)
        layer(f"{name}_skip", outputs, inputs, 1, 1)
        layer(f"{name}_t", outputs, 16)
        for norm in ("n1", "n2"):
            weights[f"{name}_{norm}_g"] = np.asarray(1 + rng.standard_normal((outputs, 1, 1)) * 0.2, np.float32)
            weights[f"{name}_{norm}_h"] = np.asarray(rng.standard_normal((outputs, 1, 1)) * 0.2, np.float32)
    layer("last", 1, 8, 3, 3)
    return weights


def old_unet(path: Path, opset: int = 13) -> Path:
    """Write the network: sample float32 [batch, 1, 8, 8], timestep int64 [batch]."""
    model = onnx.parser.parse_model(f"""
    <ir_version: 7, opset_import: ["" : {opset}]>
    old (float[batch,1,8,8] sample, int64[batch] timestep) => (float[batch,1,8,8] noise)
    {{
    {_TIME}
    {_block("d", "sample")}
    small = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d_out)
    {_block("m", "small")}
    large = Resize <coordinate_transformation_mode = "asymmetric", mode = "nearest", nearest_mode = "floor">
        (m_out, , factors)
    joined = Concat <axis = 1> (large, d_out)
    {_block("u", "joined")}
    [last] noise = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (u_out, last_w, last_b)
    }}""")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in _weights().items())
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path
