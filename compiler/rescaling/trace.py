"""How far up the graph a factor for each channel of a value can move, and which constants take it.

`Tracer.trace` walks from a value to what made it. It ends at constants that can hold the factors (the rows of a layer,
the gain and the shift of a norm, a table) and returns the edits to them, or a reason in plain words. On the way every
value may be read by nobody else, for else the others would see the factors.

What lets factors through: data movers; ReLU and what else is positively homogeneous; pooling; the values of attention,
since softmax mixes tokens and no channels; one operand of a product (the value half of a GEGLU; `1 + scale` of an
adaptive norm); both operands of a sum. What does not: every other nonlinearity, and norms, which mix channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import onnx_ir as ir

from ..graph.nodes import consumers, is_constant, is_op, name_of, numpy_of
from ..graph.ops import Layer, is_mover
from ..graph.require import required, tensor_of
from .axes import Atom, sizes_of
from .edits import Role, only_reads_sizes
from .ends import CHANNEL_NORMS, NORMS, Route, Wish, edit_of, norm_of, rows_of
from .nodes import (
    before_mover,
    called,
    changed_axes,
    constant_operand,
    eventual,
    modulates,
    operand,
    own_gate,
    pads_zeros,
    part_of,
    read_by_others,
    smaller_first,
)

HOMOGENEOUS = ("Relu", "LeakyRelu", "PRelu", "Abs")
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")


class Tracer:
    """Traces in one graph; `layers` maps the output of each layer with a constant weight to it."""

    def __init__(self, layers: dict[ir.Value, Layer]) -> None:
        self._layers = layers

    def into(self, node: ir.Node, index: int, wish: Wish) -> Route | str:
        """Divide what a node reads as input `index`, which nobody else may read."""
        value = required(node.inputs[index], f"input {index}", node)
        if is_constant(value):
            if value.dtype != ir.DataType.FLOAT:
                return f"{called(node)} reads a constant that is not float32"
            return edit_of(node, index, wish.layout, "term", wish)
        if why := read_by_others(value, node):
            return why
        if sum(v is value for v in node.inputs) > 1:
            return f"{called(node)} reads {name_of(value)!r} twice"
        return self.trace(value, wish)

    def trace(self, value: ir.Value, wish: Wish) -> Route | str:
        """The route for a value whose readers all agree."""
        node = value.producer()
        if node is None:
            return f"{name_of(value)!r} is an input of the graph"
        if value in self._layers:
            return rows_of(self._layers[value], wish)
        if is_mover(node) or is_op(node, "Identity", "Expand"):
            layout = before_mover(node, wish.layout)
            return layout if isinstance(layout, str) else self.into(node, 0, wish.on(layout))
        special: dict[str, Callable[[ir.Node, ir.Value, Wish], Route | str]] = {
            "Add": self._add,
            "Sub": self._sub,
            "Mul": self._mul,
            "Div": self._div,
            "MatMul": self._attention,
            "Gather": self._gather,
            "Split": self._part,
            "Slice": self._part,
            "Concat": self._concat,
        }
        if is_op(node, *special):
            return special[node.op_type](node, value, wish)
        if is_op(node, *CHANNEL_NORMS) or node.op_type in NORMS:
            return norm_of(node, wish)
        if is_op(node, *HOMOGENEOUS, *POOLS, "Pad", "ReduceMean"):
            return self._homogeneous(node, wish)
        return f"{called(node)} in between lets no factors through (it is not homogeneous)"

    def _homogeneous(self, node: ir.Node, wish: Wish) -> Route | str:
        x = node.inputs[0]
        sizes = None if x is None else sizes_of(x)
        if not wish.plain or sizes is None or len(sizes) != wish.layout.rank:
            return f"{called(node)} in between lets no summands through"
        if is_op(node, "PRelu") and not is_constant(node.inputs[1]):
            return f"{called(node)} has a slope that is computed"
        layout = wish.layout
        if not is_op(node, *HOMOGENEOUS):
            if is_op(node, "Pad") and not pads_zeros(node):
                return f"{called(node)} pads with something else than zeros"
            if any(layout.on(d) for d in changed_axes(node, layout.rank)):
                return f"{called(node)} computes across channels"
            for d in changed_axes(node, layout.rank):
                layout = layout.without_channels(d, sizes[d])
        return self.into(node, 0, wish.on(layout))

    def _add(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        number = constant_operand(node)
        if number is None:
            return self._sum(node, wish)
        x = 1 - number
        constant = required(node.inputs[number], f"input {number}", node)
        if tensor_of(constant).size == 1 and not wish.shift:  # x takes what is added later, too
            later = wish.offset + float(numpy_of(constant).reshape(()))
            route = self._operand(node, x, replace(wish, offset=later))
            if isinstance(route, Route):
                return route
        route, own = self._operand(node, x, Wish(wish.layout)), edit_of(node, number, wish.layout, "term", wish)
        return route + own if isinstance(route, Route) and isinstance(own, Route) else _reason(route, own)

    def _sum(self, node: ir.Node, wish: Wish) -> Route | str:
        """Both operands take the factors, one of them the summands."""
        reason = ""
        for first in (0, 1):
            one = self._operand(node, first, wish)
            two = self._operand(node, 1 - first, Wish(wish.layout)) if isinstance(one, Route) else one
            if isinstance(one, Route) and isinstance(two, Route):
                return one + two
            reason = reason or str(two)
        return f"{called(node)} adds two activations (a residual stream), and {reason}"

    def _operand(self, node: ir.Node, index: int, wish: Wish) -> Route | str:
        """One operand of an elementwise node, which may be broadcast."""
        layout = operand(node, index, wish.layout)
        return layout if isinstance(layout, str) else self.into(node, index, wish.on(layout))

    def _sub(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        if not wish.plain:
            return f"{called(node)} in between lets no summands through"
        return self._sum(node, wish)

    def _mul(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        number = constant_operand(node)
        if number is not None:
            return self._scale(node, number, wish, "gain")
        if not wish.plain:
            return f"{called(node)} in between lets no summands through"
        if own_gate(node):
            return f"{called(node)} is an activation function such as SiLU or GELU, which is not homogeneous"
        reasons = []
        for index in smaller_first(node):
            route = self._operand(node, index, wish)
            if isinstance(route, Route):
                return route.marked("adaln" if modulates(node, index) else "gated")
            reasons.append(route)
        return f"{called(node)} multiplies two activations: {'; '.join(reasons)}"

    def _div(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        if constant_operand(node) == 1:
            return self._scale(node, 1, wish, "divisor")
        if not wish.plain:
            return f"{called(node)} in between lets no summands through"
        return self._operand(node, 0, wish)

    def _scale(self, node: ir.Node, number: int, wish: Wish, role: Role) -> Route | str:
        """A constant that has a number for each channel takes the factors; a single number lets them through."""
        if not wish.plain:
            return f"{called(node)} in between lets no summands through"
        constant = tensor_of(node.inputs[number])
        if constant.size == 1:
            return self._operand(node, 1 - number, wish)
        own = list(constant.shape.numpy())
        spread = [n for d, n in enumerate(own) if n != 1 and not wish.layout.on(d + wish.layout.rank - len(own))]
        if spread:
            return f"{called(node)} has a factor for each token, not for each channel (rotary embeddings?)"
        route = edit_of(node, number, wish.layout, role, wish)
        return route if isinstance(route, str) else route.marked("norm")

    def _attention(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        """Rows of the product come from the first operand, columns from the second, leading axes from both."""
        layout = wish.layout
        if layout.rank < 2 or not wish.plain:
            return f"{called(node)} in between lets no summands through"
        index = 0 if layout.on(layout.rank - 2) else 1
        if index == 0 and layout.on(layout.rank - 1):
            return f"{called(node)} makes channels out of both of its operands"
        x = node.inputs[index]
        sizes = None if x is None else sizes_of(x)
        if sizes is None or len(sizes) != layout.rank:
            return f"{called(node)} broadcasts its operands"
        if any(layout.on(d) and sizes[d] == 1 for d in range(layout.rank - 2)):
            return f"{called(node)} broadcasts its operands"
        summed = layout.rank - 1 if index == 0 else layout.rank - 2
        route = self.into(node, index, Wish(layout.without_channels(summed, sizes[summed])))
        return route if isinstance(route, str) else route.marked("value")

    def _gather(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        """A row of a table (of timesteps, of classes), or one part of an activation."""
        table, rows = node.inputs[0], node.inputs[1]
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        if table is None or rows is None or rows.shape is None:
            return f"{called(node)} reads what is not known"
        count = len(rows.shape)
        if not is_constant(table):
            return self._part(node, value, wish)
        if axis != 0 or any(wish.layout.on(d) for d in range(count)):
            return f"{called(node)} does not gather whole rows"
        return edit_of(node, 0, replace(wish.layout, axes=((), *wish.layout.axes[count:])), "term", wish)

    def _part(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        """One of equal parts: the factors reach those rows only."""
        found = part_of(node, value)
        whole = node.inputs[0]
        sizes = None if whole is None else sizes_of(whole)
        if found is None or whole is None or sizes is None or len(sizes) - wish.layout.rank not in (0, 1):
            return f"{called(node)} takes a part that is not known, or not one of equal parts"
        axis, start, length, total = found
        atoms = (Atom(total // length, 0, start // length),)
        if len(sizes) > wish.layout.rank:  # Gather with a number removes the axis
            axes = (*wish.layout.axes[:axis], atoms, *wish.layout.axes[axis:])
        else:
            here = wish.layout.axes[axis] or ((Atom(length),) if length > 1 else ())
            axes = (*wish.layout.axes[:axis], atoms + here, *wish.layout.axes[axis + 1 :])
        layout = replace(wish.layout, axes=axes)
        if whole.is_graph_output():
            return f"{name_of(whole)!r} is an output of the graph"
        for other in consumers(whole):
            theirs = [part_of(other, out) for out in other.outputs if out.uses()] if other is not node else []
            apart = all(t and t[0] == axis and (t[1] >= start + length or t[1] + t[2] <= start) for t in theirs)
            if other is not node and not only_reads_sizes(other) and not (theirs and apart):
                return f"{called(eventual(other))} reads {name_of(whole)!r}, too"
        return self.trace(whole, wish.on(layout))

    def _concat(self, node: ir.Node, value: ir.Value, wish: Wish) -> Route | str:
        layout, axis = wish.layout, node.attributes["axis"].as_int() % wish.layout.rank
        route, base = Route(()), layout.base
        for index, x in enumerate(node.inputs):
            sizes = None if x is None else sizes_of(x)
            if sizes is None:
                return f"{called(node)} joins a value of unknown rank"
            size = sizes[axis]
            part = layout.without_channels(axis, size)
            if layout.on(axis):
                whole = layout.axes[axis]
                if len(whole) != 1 or whole[0].only is not None or not isinstance(size, int):
                    return f"{called(node)} joins channels in another order"
                part = replace(layout.with_axis(axis, (Atom(size, whole[0].stride),)), base=base)
                base += size * whole[0].stride
            found = self.into(node, index, wish.on(part))
            if isinstance(found, str):
                return f"{called(node)} joins several values, and {found}"
            route = route + found
        return route


def _reason(*found: Route | str) -> str:
    """The first reason among several answers."""
    return next(f for f in found if isinstance(f, str))
