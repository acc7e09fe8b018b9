"""Islands: the layers that a recipe keeps in float, by role or by a pattern of names.

first        reads the sample, whose lowest bits are the noise that the model must predict
second       reads the output of a first layer, through norms and activations only. At the last timesteps the noise in
             that output is a hundredth of the image: less than one step of an 8-bit grid over the range of the image
penultimate  computes what a last layer reads, through norms, activations and one addition: a residual branch and the
             shortcut next to it, whose errors no later layer averages out
last         computes the output
attention    matmuls of two activations

On the digits model the second and the two penultimate layers cause 80 to 90 % of the error of epsilon at the last step,
and three quarters of it in the middle of the trajectory.

Any other name is a pattern of node names, as in a shell (`*`, `?`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import onnx_ir as ir

from ..errors import RecipeError
from ..graph.nodes import consumers, is_constant, is_op, name_of
from ..graph.ops import Layer, is_mover
from .program import Program

ROLES = {
    "first": "it reads the sample",
    "second": "it reads what a first layer made",
    "penultimate": "a last layer reads what it made",
    "last": "it makes the output",
    "attention": "a matmul of two activations",
}


class Islands:
    """The layers of one program that stay in float. Raises RecipeError for a pattern that matches no layer."""

    def __init__(self, program: Program, layers: list[Layer], chosen: tuple[str, ...], where: str) -> None:
        self._chosen = chosen
        sample = program.signature.sample
        first = [layer for layer in layers if any(_reaches_up(v, sample) for v in layer.activations)]
        last = [layer for layer in layers if _reaches_down(layer.output)]
        from_first = _computed_from([layer.output for layer in first], layers)
        to_last = _read_by([v for layer in last for v in layer.activations], layers)
        members = {
            "first": first,
            "second": [layer for layer in layers if any(v in from_first for v in layer.activations)],
            "penultimate": [layer for layer in layers if layer.output in to_last],
            "last": last,
            "attention": [layer for layer in layers if layer.kind == "attention"],
        }
        self._names = {role: {layer.name for layer in group} for role, group in members.items()}
        for pattern in chosen:
            if pattern not in ROLES and not any(fnmatchcase(layer.name, pattern) for layer in layers):
                raise RecipeError(
                    f"the island {pattern!r} matches no layer",
                    where=where,
                    hint=f"roles are {', '.join(ROLES)}; "
                    f"layers are called {', '.join(layer.name for layer in layers[:4])} ...",
                )

    def reason(self, layer: Layer) -> str | None:
        """Return why a layer stays in float, or None for a layer that is quantized."""
        for island in self._chosen:
            if layer.name in self._names.get(island, ()):
                return f"island {island!r}: {ROLES[island]}"
            if island not in ROLES and fnmatchcase(layer.name, island):
                return f"island {island!r}"
        return None


def _computed_from(sources: list[ir.Value], layers: list[Layer]) -> set[ir.Value]:
    """Return the sources and the values computed from them and constants alone, up to the next layers."""
    ends = {node for layer in layers for node in (layer.node, layer.bias_add) if node is not None}
    computed, waiting = set(sources), list(sources)
    while waiting:
        for node in consumers(waiting.pop()):
            if node in ends or not all(v is None or v in computed or _carries_no_data(v) for v in node.inputs):
                continue
            fresh = [out for out in node.outputs if out not in computed]
            computed.update(fresh)
            waiting.extend(fresh)
    return computed


def _carries_no_data(value: ir.Value) -> bool:
    """Return whether a value is constant, a size of a feature map, or ones of such a size (from lower_norms)."""
    return is_constant(value) or value.dtype == ir.DataType.INT64 or is_op(value.producer(), "ConstantOfShape")


def _read_by(targets: list[ir.Value], layers: list[Layer]) -> set[ir.Value]:
    """Return the targets and the values they are computed from, up to the layers before, through one addition."""
    outputs = {layer.output for layer in layers}
    read: set[ir.Value] = set()
    waiting = [(value, False) for value in targets]
    while waiting:
        value, joined = waiting.pop()
        read.add(value)
        node = value.producer()
        if value in outputs or node is None or is_op(node, "Concat"):
            continue
        data = [v for v in node.inputs if v is not None and not _carries_no_data(v)]
        join = is_op(node, "Add") and len(data) > 1
        if not (join and joined):
            waiting.extend((v, joined or join) for v in data)
    return read


def _reaches_up(value: ir.Value, name: str) -> bool:
    """Return whether a value is the input of that name, apart from nodes that only move data."""
    producer = value.producer()
    if producer is None:
        return name_of(value) == name
    first = producer.inputs[0] if producer.inputs else None
    return is_mover(producer) and first is not None and _reaches_up(first, name)


def _reaches_down(value: ir.Value) -> bool:
    """Return whether a value is a graph output, apart from nodes that only move data."""
    if value.is_graph_output():
        return True
    readers = consumers(value)
    return len(readers) == 1 and is_mover(readers[0]) and _reaches_down(readers[0].outputs[0])
