"""TensorRT's rules about QuantizeLinear and DequantizeLinear: their types, scales, zero points and axes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from ..graph.nodes import is_op, name_of
from .facts import array_of, stored_type, weight_axis, zero_point_of
from .groups import FusionGroup, is_known, scale_of
from .tensorrt_violation import Fault, fault

_T = ir.DataType
READ_TYPES = frozenset({_T.INT8, _T.INT4, _T.FLOAT8E4M3FN, _T.FLOAT4E2M1})
_CONSTANT = "make it a constant; for scales by timestep, multiply by a row of a table in front of QuantizeLinear"
_TARGET = "compile with --target tensorrt"


def quantizer_faults(nodes: Iterable[ir.Node], layers: Iterable[FusionGroup]) -> Iterator[Fault]:
    """Yield what is wrong with each QuantizeLinear and DequantizeLinear."""
    for node in nodes:
        if is_op(node, "QuantizeLinear", "DequantizeLinear"):
            yield from _type(node)
            yield from _scale(node)
            yield from _zero_point(node)
            yield from _axis(node)
    for layer in layers:
        yield from _weight_axis(layer)


def _type(node: ir.Node) -> Iterator[Fault]:
    kind, x = stored_type(node), name_of(node.inputs[0])
    if kind == _T.INT32:
        yield fault(node, "integer-bias", f"{x!r} is INT32, a bias", "keep the bias in float: TensorRT adds it so")
    elif kind not in READ_TYPES:
        named = zero_point_of(node) is not None or is_op(node, "DequantizeLinear")
        implied = "" if named else ", by ONNX's default for a quantizer without a zero point (TensorRT reads INT8)"
        yield fault(
            node,
            "quantized-type",
            f"it quantizes to {kind.name}{implied}",
            f"quantize to INT8 around 0, with an INT8 zero point of 0: {_TARGET}",
        )
    if kind == _T.INT4 and not is_known(node.inputs[0]):
        yield fault(
            node, "int4-activation", f"{x!r} is no constant, and INT4 is for weights only", "quantize it to INT8"
        )
    shape = _shape(node)
    if kind == _T.INT4 and shape and shape[-1] % 2:
        yield fault(
            node,
            "int4-odd",
            f"the last dimension of {x!r} is {shape[-1]}: two INT4 numbers make a byte, so it must be even",
            "keep this weight in INT8, or pad it",
        )


def _scale(node: ir.Node) -> Iterator[Fault]:
    scale = scale_of(node)
    if not is_known(scale):
        yield fault(node, "run-time-scale", f"its scale {name_of(scale)!r} is known at run time only", _CONSTANT)
        return
    values = array_of(scale)
    if values is not None and not bool(np.all(values.astype(np.float64) > 0)):
        yield fault(
            node, "scale-sign", f"its scale {name_of(scale)!r} has entries that are not above 0", "make them positive"
        )


def _zero_point(node: ir.Node) -> Iterator[Fault]:
    zero = zero_point_of(node)
    if zero is None:
        return
    name, stored, scale = name_of(zero), array_of(zero), array_of(scale_of(node))
    if not is_known(zero):
        yield fault(
            node, "run-time-scale", f"its zero point {name!r} is known at run time only", "make it a constant 0"
        )
        return
    if stored is not None and bool(np.any(stored.astype(np.int32))):
        yield fault(
            node,
            "zero-point",
            f"its zero point {name!r} is not all zeros: TensorRT quantizes symmetrically",
            f"quantize around 0: {_TARGET}",
        )
    if stored is not None and scale is not None and stored.size != scale.size:
        yield fault(
            node,
            "zero-point-size",
            f"its zero point {name!r} has {stored.size} entries, its scale {scale.size}",
            "give both the same shape",
        )


def _axis(node: ir.Node) -> Iterator[Fault]:
    scale, shape = array_of(scale_of(node)), _shape(node)
    name = name_of(scale_of(node))
    if scale is None or scale.size == 1:
        return
    if not is_known(node.inputs[0]):
        yield fault(
            node,
            "per-axis-activation",
            f"{name!r} has {scale.size} scales, and {name_of(node.inputs[0])!r} is an activation: those have one",
            "give it one scale; to level its channels, move factors into the weight as smooth_scales does",
        )
        return
    if "block_size" in node.attributes and node.attributes["block_size"].as_int() > 0:
        yield from _blocks(node, scale.shape, shape)
        return
    if "axis" not in node.attributes:
        yield fault(
            node,
            "axis-default",
            f"{name!r} has {scale.size} scales and no axis: TensorRT takes axis 0, ONNX axis 1",
            "write the axis",
        )
        return
    axis = node.attributes["axis"].as_int()
    if shape and (not -len(shape) <= axis < len(shape) or shape[axis] != scale.size):
        yield fault(
            node,
            "axis-size",
            f"{name!r} has {scale.size} scales along axis {axis} of {list(shape)}",
            "give it one scale for each index of that axis",
        )


def _blocks(node: ir.Node, scale: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[Fault]:
    blocked = [i for i, (n, of) in enumerate(zip(scale, shape, strict=False)) if n != of]
    if len(scale) == len(shape) and len(blocked) == 1 and shape[blocked[0]] % scale[blocked[0]] == 0:
        return
    yield fault(
        node,
        "blocks",
        f"its scale of shape {list(scale)} has {len(blocked)} blocked dimensions of {list(shape)}: TensorRT reads one",
        "block along one dimension, whose size is a multiple of the block",
    )


def _weight_axis(layer: FusionGroup) -> Iterator[Fault]:
    """One scale for each output channel: TensorRT applies the scales of a weight to the layer's output."""
    right = weight_axis(layer)
    if is_op(layer.node, "ConvTranspose") and layer.data[1].known:
        right = 1
    node = layer.data[1].dequantizer if len(layer.data) > 1 and layer.data[1].known else None
    shape = () if node is None else _shape(node)
    if node is None or right is None or not shape or layer.data[1].moved or "axis" not in node.attributes:
        return
    if "block_size" in node.attributes and node.attributes["block_size"].as_int() > 0:
        return
    scale, axis = array_of(scale_of(node)), node.attributes["axis"].as_int()
    right %= len(shape)
    if scale is not None and scale.size > 1 and axis % len(shape) != right:
        yield fault(
            node,
            "weight-axis",
            f"its scales run along axis {axis}, and the output channels of {layer.name!r} are axis {right}",
            "give the weight one scale for each output channel",
        )


def _shape(node: ir.Node) -> tuple[int, ...]:
    """Return the shape of what a quantizer reads, or () where it is open or unknown."""
    value = node.inputs[0]
    stored = array_of(value) if value is not None and value.const_value is None else None
    shape = None if value is None else (value.const_value.shape if value.const_value is not None else value.shape)
    if stored is not None:
        return stored.shape
    sizes = [] if shape is None else list(shape)
    known = tuple(n for n in sizes if isinstance(n, int))
    return known if len(known) == len(sizes) and 0 not in known else ()
