"""The targets that a bundle is compiled for: the engine that reads its graph, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

Target = Literal["onnxruntime", "openvino", "tensorrt", "portable"]
ONNXRUNTIME: Target = "onnxruntime"
TARGETS: Mapping[Target, str] = MappingProxyType(
    {
        "onnxruntime": "the integer kernels of onnxruntime's CPU provider",
        "openvino": "the integer kernels of OpenVINO",
        "tensorrt": "TensorRT: activations in int8 with zero point 0",
        "portable": "any engine that reads QuantizeLinear and DequantizeLinear with constant scales",
    }
)
"""What each target is, for display. All but `onnxruntime` get the same form: compiler/lowering/constant.py."""


def target_named(name: str) -> Target | None:
    """Return the target of a name, or None if there is none."""
    return next((target for target in get_args(Target) if target == name), None)
