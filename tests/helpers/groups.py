"""Small hand-made models with quantized groups, for the tests of the fusion audit.

A model is a text of nodes; what no node makes is looked up in CONSTANTS. Snippets quantize the input `x` into `d`, the
weight into `wd`, and the output `c` into `y`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.graph.nodes import name_of

IMAGE = ("float[1,4,8,8] x, int64 t", "float[1,4,8,8] y")
TOKENS = ("float[1,2,3,4] x, int64 t", "float[1,2,3,4] y")
ROWS = ("float[6,4] x, int64 t", "float[6,4] y")

X = "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) "
LATE = "r = Gather (table, t) q = QuantizeLinear (x, r, z) d = DequantizeLinear (q, r, z) "
"""The same with a scale from a table."""
X2 = "q2 = QuantizeLinear (x, s2, z) d2 = DequantizeLinear (q2, s2, z) "
W = "wd = DequantizeLinear <axis = 0> (w, ws, wz) "
M = "md = DequantizeLinear <axis = 1> (m, ws, wz) "
BIAS = "bd = DequantizeLinear <axis = 0> (b, bs) "
CONV = "[node] c = Conv <pads = [1,1,1,1]> (d, wd) "
CONV_BIAS = "[node] c = Conv <pads = [1,1,1,1]> (d, wd, bd) "
Y = "qy = QuantizeLinear (c, s2, z) y = DequantizeLinear (qy, s2, z) "
SAME = "qy = QuantizeLinear (c, s, z) y = DequantizeLinear (qy, s, z) "

_RNG = np.random.default_rng(0)
_INTEGERS = _RNG.integers(-120, 120, (4, 4, 3, 3))
_F = np.float32
CONSTANTS: dict[str, npt.NDArray[Any]] = {
    "s": np.array(0.02, _F),
    "s2": np.array(0.03, _F),
    "s3": np.array(0.05, _F),
    "z": np.array(128, np.uint8),
    "z8": np.array(0, np.int8),
    "z16": np.array(32768, np.uint16),
    "zs": np.full(4, 128, np.uint8),
    "ss": np.full(4, 0.02, _F),
    "table": np.array([0.02, 0.03, 0.04], _F),
    "ztable": np.array([0, 1, 2], np.int8),
    "w": _INTEGERS.astype(np.int8),
    "ws": np.full(4, 0.01, _F),
    "wz": np.zeros(4, np.int8),
    "w4": (_INTEGERS // 20).astype(ml_dtypes.int4),
    "w4z": np.zeros(4, ml_dtypes.int4),
    "wf": (_INTEGERS / 100).astype(_F),
    "steps": np.array([0.01, 0.02, 0.03, 0.04], _F),
    "m": _INTEGERS[:, :, 0, 0].astype(np.int8),
    "mf": (_INTEGERS[:, :, 0, 0] / 100).astype(_F),
    "b": (np.arange(4) * 100).astype(np.int32),
    "b_end": np.array([0, 1, 2, 2**31 - 1], np.int32),
    "bs": np.full(4, 0.0002, _F),
    "ws_dead": np.array([0.01, 0.01, 0.01, 1e-10], _F),
    "bs_off": np.full(4, 0.000206, _F),
    "b8": np.arange(4).astype(np.int8),
    "bf": np.arange(4).astype(_F),
    "one": np.ones(4, _F),
    "nil": np.zeros(4, _F),
    "twice": np.array([1, 1, 2, 2], _F),
    "same": np.arange(4),
    "axes": np.array([0]),
    "s_half": np.array(0.02, np.float16),
    "s2_half": np.array(0.03, np.float16),
    "ws_half": np.full(4, 0.01, np.float16),
    "image": np.array([1, 4, 8, 8]),
}


def group_model(nodes: str, kind: tuple[str, str] = IMAGE, outputs: str = "") -> ir.Model:
    """A model of these nodes between the inputs and the output of a kind; `outputs` are more of them."""
    inputs, output = kind
    head = f'<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g ({inputs}) => ({output}{outputs})'
    model = ir.from_onnx_text(f"{head} {{ {nodes} }}")
    given = set(model.graph.inputs)
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and value not in given and value.const_value is None:
                value.const_value = ir.tensor(CONSTANTS[name_of(value)], name=value.name)
                model.graph.register_initializer(value)
    return model


def write_groups(folder: Path, nodes: str, kind: tuple[str, str] = IMAGE, outputs: str = "") -> Path:
    """The same as a file."""
    path = folder / "groups.onnx"
    ir.save(group_model(nodes, kind, outputs), path)
    return path
