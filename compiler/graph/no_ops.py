"""Nodes that return one of their inputs: `x + 0`, `x / 1`, a Reshape to its own shape, a Concat of one, and their kin.

Exporters write them, and onnxruntime removes some of them when it opens the file. A quantizer behind a division by one
then stands directly behind the addition in front of it, where the compiler did not expect an integer kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .nodes import is_constant, is_op, numpy_of

_NEUTRAL: dict[str, float] = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1, "And": True, "Or": False, "Xor": False}
_ON_BOTH_SIDES = frozenset({"Add", "Mul", "And", "Or", "Xor"})
_IN_ORDER = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operations that give the same elements in the same order another shape."""
_OF_ONE = frozenset({"Concat", "Sum", "Mean", "Max", "Min"})
_REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"})
_FAR = 2**31 - 1  # exporters write "to the end" as the largest integer of 32 or 64 bits


def remove_no_ops(graph: ir.Graph) -> int:
    """Turn each node that returns one of its inputs into an Identity, and return how many there were.

    Shapes have to be inferred: what is not known to change nothing stays. A pair of nodes that undo each other is found
    by the second.
    """
    count = 0
    for node in graph:
        if (source := _source(node)) is None or any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
            continue
        node.op_type, node.domain, node.overload = "Identity", "", ""
        node.attributes.clear()
        node.resize_inputs(1)
        node.replace_input_with(0, source)
        node.resize_outputs(1)
        count += 1
    return count


def _source(node: ir.Node) -> ir.Value | None:
    """Return the value that a node's first output is equal to in every call, or None."""
    x = node.inputs[0] if node.inputs else None
    if not is_op(node, node.op_type) or x is None:
        return None
    if node.op_type in _NEUTRAL:
        return _beside_neutral(node)
    if node.op_type in _IN_ORDER:
        return _same_shape_above(node)
    if node.op_type == "Transpose":
        return _turned_back(node)
    if node.op_type in _OF_ONE:
        return x if len([v for v in node.inputs if v is not None]) == 1 else None
    rule = _RULES.get("Reduce" if node.op_type in _REDUCTIONS else node.op_type)
    return x if rule is not None and rule(node, x) else None


def _beside_neutral(node: ir.Node) -> ir.Value | None:
    """Return the other operand of `x + 0` and its kin. The constant has one element: ones for each channel are the
    parameters of a layer, which passes may move factors into."""
    first, second = node.inputs[0], node.inputs[1]
    pairs = [(first, second), (second, first)] if node.op_type in _ON_BOTH_SIDES else [(first, second)]
    for x, constant in pairs:
        array = _array(constant)
        if x is None or array is None or array.size != 1 or array.flat[0] != _NEUTRAL[node.op_type]:
            continue
        if array.ndim == 0 or (x.shape is not None and array.ndim <= len(x.shape)):
            return x
    return None


def _same_shape_above(node: ir.Node) -> ir.Value | None:
    """Return the first value above a chain of reshapes that has the chain's last shape, where nodes in between are in
    order too."""
    out, value, farthest = node.outputs[0], node.inputs[0], None
    while value is not None:
        if _same_elements(value.shape, out.shape):
            farthest = value
        producer = value.producer()
        if producer is None or not is_op(producer, *_IN_ORDER, "Identity"):
            break
        value = producer.inputs[0]
    return farthest


def _same_elements(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Return whether two shapes of one number of elements are equal: all dimensions but one are known to be."""
    if a is None or b is None or len(a) != len(b):
        return False
    different = [(p, q) for p, q in zip(a, b, strict=True) if not _same(p, q)]
    if any(isinstance(p, int) and isinstance(q, int) for p, q in different) or 0 in list(a):
        return False
    return len(different) <= 1


def _same(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return a.value is not None and a.value == b.value


def _array(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """Return the contents of a small constant, or None."""
    if value is None or not is_constant(value) or value.const_value is None or value.const_value.size > 64:
        return None
    return numpy_of(value)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _integer(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _cast(node: ir.Node, x: ir.Value) -> bool:
    return x.dtype is not None and _integer(node, "to", -1) == x.dtype.value


def _cast_like(node: ir.Node, x: ir.Value) -> bool:
    like = _input(node, 1)
    return x.dtype is not None and like is not None and like.dtype == x.dtype


def _dropout(node: ir.Node, x: ir.Value) -> bool:
    ratio, training = _array(_input(node, 1)), _input(node, 2)
    mode = _array(training)
    inference = training is None or (mode is not None and not mode.any())
    return inference or (ratio is not None and not ratio.any())


def _turned_back(node: ir.Node) -> ir.Value | None:
    """Return the source of a Transpose that keeps the order, or that undoes the Transpose in front of it."""
    x = node.inputs[0]
    if x is None or "perm" not in node.attributes:
        return x if x is not None and x.shape is not None and len(x.shape) < 2 else None
    perm = list(node.attributes["perm"].as_ints())
    if perm == sorted(perm):
        return x
    earlier = x.producer()
    if earlier is None or not is_op(earlier, "Transpose") or "perm" not in earlier.attributes:
        return None
    first = list(earlier.attributes["perm"].as_ints())
    return earlier.inputs[0] if [first[p] for p in perm] == sorted(perm) else None


def _expand(node: ir.Node, x: ir.Value) -> bool:
    target = _input(node, 1)
    if target is not None and is_op(target.producer(), "Shape"):
        shape = target.producer()
        return shape is not None and shape.inputs[0] is x and not shape.attributes
    sizes = _array(target)
    if sizes is None or x.shape is None or len(sizes) > len(x.shape):
        return False
    return all(size in (1, dim) for size, dim in zip(sizes[::-1], list(x.shape)[::-1], strict=False))


def _tile(node: ir.Node, x: ir.Value) -> bool:
    repeats = _array(_input(node, 1))
    return repeats is not None and bool((repeats == 1).all())


def _pad(node: ir.Node, x: ir.Value) -> bool:
    pads = _array(_input(node, 1))
    return pads is not None and not pads.any()


def _slice(node: ir.Node, x: ir.Value) -> bool:
    starts, ends, steps = (_array(_input(node, i)) for i in (1, 2, 4))
    axes = _array(_input(node, 3))
    if starts is None or ends is None or (_input(node, 3) is not None and axes is None):
        return False
    if _input(node, 4) is not None and (steps is None or not (steps == 1).all()):
        return False
    numbers = range(len(starts)) if axes is None else [int(axis) for axis in axes]
    return all(_whole(x, *item) for item in zip(numbers, starts.tolist(), ends.tolist(), strict=True))


def _whole(x: ir.Value, axis: int, start: int, end: int) -> bool:
    """Return whether `start:end` of an axis is all of it."""
    if x.shape is not None and isinstance(size := x.shape[axis], int):
        return (start == 0 or start <= -size) and end >= size
    return start == 0 and end >= _FAR


def _resize(node: ir.Node, x: ir.Value) -> bool:
    mode = node.attributes.get("coordinate_transformation_mode")
    if (mode is not None and mode.as_string() == "tf_crop_and_resize") or "axes" in node.attributes:
        return False
    scales, sizes = _array(_input(node, 2)), _array(_input(node, 3))
    if scales is not None and scales.size:
        return bool((scales == 1).all())
    return sizes is not None and x.shape is not None and list(x.shape) == sizes.tolist()


def _clip(node: ir.Node, x: ir.Value) -> bool:
    low, high = _input(node, 1), _input(node, 2)
    bottom, top = _array(low), _array(high)
    free_below = low is None or (bottom is not None and bool((bottom == -np.inf).all()))
    return free_below and (high is None or (top is not None and bool((top == np.inf).all())))


def _reduce(node: ir.Node, x: ir.Value) -> bool:
    given = _input(node, 1)
    if given is None and "axes" not in node.attributes:
        return _integer(node, "noop_with_empty_axes", 0) == 1
    axes = node.attributes["axes"].as_ints() if given is None else _array(given)
    if axes is None or x.shape is None or _integer(node, "keepdims", 1) != 1 or not len(axes):
        return False
    return all(x.shape[int(axis)] == 1 for axis in axes)


def _pool(node: ir.Node, x: ir.Value) -> bool:
    numbers = {"kernel_shape": 1, "strides": 1, "pads": 0}
    given = {name: node.attributes[name].as_ints() for name in numbers if name in node.attributes}
    return "kernel_shape" in given and all(set(found) <= {numbers[name]} for name, found in given.items())


def _one_output(node: ir.Node, x: ir.Value) -> bool:
    return len(node.outputs) == 1


def _block_of_one(node: ir.Node, x: ir.Value) -> bool:
    return _integer(node, "blocksize", 0) == 1


_RULES: dict[str, Callable[[ir.Node, ir.Value], bool]] = {
    "AveragePool": _pool,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "DepthToSpace": _block_of_one,
    "Dropout": _dropout,
    "Expand": _expand,
    "MaxPool": _pool,
    "Pad": _pad,
    "Reduce": _reduce,
    "Resize": _resize,
    "Slice": _slice,
    "SpaceToDepth": _block_of_one,
    "Split": _one_output,
    "Tile": _tile,
}
"""Operation -> whether the first output of a node is its first input."""
