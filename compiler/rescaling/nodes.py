"""Effects of single nodes on channels: which axes they move, change, take apart or broadcast."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from ..graph.nodes import consumers, is_constant, is_op, name_of, numpy_of
from ..graph.ops import is_mover
from .axes import AxisSize, Layout, sizes_of
from .edits import only_reads_sizes
from .refusal import Refusal

ELEMENTWISE = ("Sigmoid", "Erf", "Tanh", "HardSigmoid", "Softplus", "Exp", "Pow", "Neg", "Gelu", "HardSwish", "Elu")
ARITHMETIC = ("Add", "Sub", "Mul", "Div")
LONGEST_CHAIN = 12  # nodes between an activation function's input and its last product; tanh-GELU has 8


def op_and_name(node: ir.Node) -> str:
    """Return the operation and the name of a node, such as `Conv 'x'`, for a reason."""
    return f"{node.op_type} {node.name or name_of(node.outputs[0])!r}"


def read_by_others(value: ir.Value, reader: ir.Node) -> str:
    """Return which other node reads a value, or the empty string."""
    if value.is_graph_output():
        return f"{name_of(value)!r} is an output of the graph"
    others = [n for n in consumers(value) if n is not reader and not only_reads_sizes(n)]
    return f"{op_and_name(eventual(others[0]))} reads {name_of(value)!r}, too" if others else ""


def eventual(node: ir.Node) -> ir.Node:
    """Return the node that computes with a mover's output. If several nodes read the output, return the mover."""
    while is_mover(node) and len(readers := consumers(node.outputs[0])) == 1:
        node = readers[0]
    return node


def before_mover(node: ir.Node, layout: Layout) -> Layout | Refusal:
    """Return the layout of a data mover's input."""
    x = node.inputs[0]
    sizes = None if x is None else sizes_of(x)
    if sizes is None:
        return Refusal(f"{op_and_name(node)} reads a value of unknown rank")
    if is_op(node, "Transpose"):
        order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(range(layout.rank))[::-1]
        return layout.transposed(order)
    if is_op(node, "Identity"):
        return layout
    if is_op(node, "Resize", "Expand"):
        return _stretched(node, layout, sizes)
    return layout.reshaped(sizes) or Refusal(f"{op_and_name(node)} mixes channels with something else")


def _stretched(node: ir.Node, layout: Layout, sizes: list[AxisSize]) -> Layout | Refusal:
    out = sizes_of(node.outputs[0])
    lead = layout.rank - len(sizes)
    if out is None or len(out) != layout.rank or any(layout.on(d) for d in range(lead)):
        return Refusal(f"{op_and_name(node)} repeats channels")
    layout = replace(layout, axes=layout.axes[lead:])
    for d, size in enumerate(sizes):
        if size != out[d + lead] or size is None:
            if layout.on(d):
                return Refusal(f"{op_and_name(node)} repeats channels")
            layout = layout.without_channels(d, size)
    return layout


def operand(node: ir.Node, index: int, layout: Layout) -> Layout | Refusal:
    """Return the layout of one operand of an elementwise node whose result has this layout."""
    x = node.inputs[index]
    sizes = None if x is None else sizes_of(x)
    if sizes is None:
        return Refusal(f"{op_and_name(node)} reads a value of unknown rank")
    return _stretched(node, layout, sizes)


def constant_operand(node: ir.Node) -> int | None:
    """Return the index of the operand that is constant, or None."""
    return next((i for i, v in enumerate(node.inputs) if is_constant(v) and v is not None), None)


def own_gate(node: ir.Node) -> bool:
    """Return whether a product multiplies a value with a function of itself, element by element (SiLU, GELU)."""
    first, second = (_elementwise_sources(v) for v in node.inputs)
    return bool(first & second)


def _elementwise_sources(value: ir.Value | None) -> set[ir.Value]:
    """Return a value and the values that it is computed from element by element, a few nodes back."""
    found: set[ir.Value] = set()
    edge = [value]
    for _ in range(LONGEST_CHAIN):
        fresh = {v for v in edge if v is not None and not is_constant(v)} - found
        found |= fresh
        producers = [p for v in fresh if (p := v.producer()) is not None]
        edge = [v for p in producers if is_op(p, *ELEMENTWISE, *ARITHMETIC) for v in p.inputs]
    return found


def smaller_first(node: ir.Node) -> tuple[int, int]:
    """Return the operand indices of a product, a broadcast operand first."""
    return (1, 0) if modulates(node, 1) and not modulates(node, 0) else (0, 1)


def modulates(node: ir.Node, index: int) -> bool:
    """Return whether one operand of a product is repeated along an axis of the other."""
    out, x = sizes_of(node.outputs[0]), node.inputs[index]
    sizes = None if x is None else sizes_of(x)
    if out is None or sizes is None:
        return False
    return len(sizes) < len(out) or any(a == 1 and b != 1 for a, b in zip(sizes, out, strict=True))


def pads_zeros(node: ir.Node) -> bool:
    """Return whether a Pad fills with the constant 0."""
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
    value = node.inputs[2] if len(node.inputs) > 2 else None
    return mode == "constant" and (value is None or (is_constant(value) and not numpy_of(value).any()))


def changed_axes(node: ir.Node, rank: int) -> list[int]:
    """Return the axes along which a pooling, a mean or a padding computes; all axes if they are not known."""
    if is_op(node, "Pad"):
        pads = _numbers(node, 1)
        if pads is None or len(pads) != 2 * rank:
            return list(range(rank))
        return [d for d in range(rank) if pads[d] or pads[d + rank]]
    if is_op(node, "ReduceMean"):
        axes = list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else _numbers(node, 1)
        kept = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
        return [d % rank for d in axes] if axes and kept else list(range(rank))
    return list(range(2, rank))


def before_cut(node: ir.Node, layout: Layout) -> Layout | Refusal:
    """Return the layout in front of a Split or Slice that takes parts of axes without channels, such as tokens."""
    if is_op(node, "Split"):
        axes: list[int] | None = [node.attributes["axis"].as_int() if "axis" in node.attributes else 0]
    else:
        axes = _numbers(node, 3) if len(node.inputs) > 3 else None
    sizes = None if node.inputs[0] is None else sizes_of(node.inputs[0])
    if axes is None or sizes is None or len(sizes) != layout.rank:
        return Refusal(f"{op_and_name(node)} takes a part that is not known")
    for axis in axes:
        if layout.on(axis % layout.rank):
            return Refusal(f"{op_and_name(node)} parts the channels")
        layout = layout.without_channels(axis % layout.rank, sizes[axis])
    return layout


def part_of(node: ir.Node, value: ir.Value) -> tuple[int, int, int, int] | None:
    """Return (axis, start, length, total) of the part that a Split, Slice or Gather takes, or None if parts differ."""
    whole = node.inputs[0] if node.inputs else None
    sizes = None if whole is None else sizes_of(whole)
    if sizes is None or not is_op(node, "Split", "Slice", "Gather"):
        return None
    found = _split(node, value, len(sizes)) if is_op(node, "Split") else _cut(node, sizes)
    if found is None:
        return None
    axis, start, length = found
    total = sizes[axis]
    if not isinstance(total, int) or length < 1 or total % length or start % length:
        return None
    return axis, start, length, total


def _split(node: ir.Node, value: ir.Value, rank: int) -> tuple[int, int, int] | None:
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % rank
    lengths = [(sizes_of(out) or [None] * rank)[axis] for out in node.outputs]
    known = [n for n in lengths if isinstance(n, int)]
    if len(known) < len(lengths):
        return None
    at = list(node.outputs).index(value)
    return axis, sum(known[:at]), known[at]


def _cut(node: ir.Node, sizes: list[AxisSize]) -> tuple[int, int, int] | None:
    if is_op(node, "Gather"):
        axis, chosen = node.attributes["axis"].as_int() if "axis" in node.attributes else 0, _numbers(node, 1)
        size = sizes[axis]
        if chosen is None or len(chosen) != 1 or not isinstance(size, int):
            return None
        return axis % len(sizes), chosen[0] % size, 1
    starts, ends = _numbers(node, 1), _numbers(node, 2)
    axes = _numbers(node, 3) if len(node.inputs) > 3 else [0]
    steps = _numbers(node, 4) if len(node.inputs) > 4 else [1]
    if starts is None or ends is None or axes is None or len(axes) != 1 or steps != [1]:
        return None
    axis = axes[0] % len(sizes)
    total = sizes[axis]
    if not isinstance(total, int):
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(total)
    return axis, start, end - start


def _numbers(node: ir.Node, index: int) -> list[int] | None:
    """Return the integers of a constant input, or None."""
    value = node.inputs[index] if len(node.inputs) > index else None
    if value is None or not is_constant(value):
        return None
    return [int(n) for n in np.atleast_1d(numpy_of(value))]
