"""Islands: the layers that a recipe keeps in float, by role or by name.

first        reads the sample, whose last bits are the noise that the model must predict
second       reads what a first layer made, through norms and activations only: at the last timesteps that noise is a
             hundredth of the picture in it, less than one step of an 8-bit grid over the picture's range
penultimate  what a last layer reads, through norms, activations and one addition, is made by it: a residual branch and
             the shortcut beside it, behind which nothing averages their errors out
last         makes the output
attention    matmuls of two activations

On the digits the second and the two penultimate layers make 80 to 90 % of the error of epsilon at the last step, and
three quarters of it in the middle of the trajectory.

Anything else is a pattern of node names, as in a shell (`*`, `?`).
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
    """The chosen islands of one program. Raises RecipeError for a pattern that matches no layer."""

    def __init__(self, program: Program, layers: list[Layer], chosen: tuple[str, ...], where: str) -> None:
        self._chosen = chosen
        sample = program.signature.sample
        first = [layer for layer in layers if any(_reaches_up(v, sample) for v in layer.activations)]
        last = [layer for layer in layers if _reaches_down(layer.output)]
        made = _made_of([layer.output for layer in first], layers)
        read = _read_by([v for layer in last for v in layer.activations], layers)
        members = {
            "first": first,
            "second": [layer for layer in layers if any(v in made for v in layer.activations)],
            "penultimate": [layer for layer in layers if layer.output in read],
            "last": last,
            "attention": [layer for layer in layers if layer.kind == "attention"],
        }
        self._names = {role: {layer.name for layer in found} for role, found in members.items()}
        for pattern in chosen:
            if pattern not in ROLES and not any(fnmatchcase(layer.name, pattern) for layer in layers):
                raise RecipeError(
                    f"the island {pattern!r} matches no layer",
                    where=where,
                    hint=f"roles are {', '.join(ROLES)}; "
                    f"layers are called {', '.join(layer.name for layer in layers[:4])} ...",
                )

    def reason(self, layer: Layer) -> str | None:
        """Why a layer stays in float, or None for one that is quantized."""
        for wish in self._chosen:
            if layer.name in self._names.get(wish, ()):
                return f"island {wish!r}: {ROLES[wish]}"
            if wish not in ROLES and fnmatchcase(layer.name, wish):
                return f"island {wish!r}"
        return None


def _made_of(sources: list[ir.Value], layers: list[Layer]) -> set[ir.Value]:
    """The sources and what is computed from them and constants alone, up to the next layers."""
    ends = {node for layer in layers for node in (layer.node, layer.bias_add) if node is not None}
    made, waiting = set(sources), list(sources)
    while waiting:
        for node in consumers(waiting.pop()):
            if node in ends or not all(v is None or v in made or _carries_nothing(v) for v in node.inputs):
                continue
            fresh = [out for out in node.outputs if out not in made]
            made.update(fresh)
            waiting.extend(fresh)
    return made


def _carries_nothing(value: ir.Value) -> bool:
    """Whether a value is constant, a size (of a feature map, for a Reshape), or that many ones (from lower_norms)."""
    return is_constant(value) or value.dtype == ir.DataType.INT64 or is_op(value.producer(), "ConstantOfShape")


def _read_by(targets: list[ir.Value], layers: list[Layer]) -> set[ir.Value]:
    """The targets and what they are computed from, up to the layers before, through one addition of feature maps."""
    made = {layer.output for layer in layers}
    read: set[ir.Value] = set()
    waiting = [(value, False) for value in targets]
    while waiting:
        value, joined = waiting.pop()
        read.add(value)
        node = value.producer()
        if value in made or node is None or is_op(node, "Concat"):
            continue
        data = [v for v in node.inputs if v is not None and not _carries_nothing(v)]
        join = is_op(node, "Add") and len(data) > 1
        if not (join and joined):
            waiting.extend((v, joined or join) for v in data)
    return read


def _reaches_up(value: ir.Value, name: str) -> bool:
    """Whether a value is the input of that name, seen through nodes that only move data."""
    producer = value.producer()
    if producer is None:
        return name_of(value) == name
    first = producer.inputs[0] if producer.inputs else None
    return is_mover(producer) and first is not None and _reaches_up(first, name)


def _reaches_down(value: ir.Value) -> bool:
    """Whether a value is a graph output, seen through nodes that only move data."""
    if value.is_graph_output():
        return True
    readers = consumers(value)
    return len(readers) == 1 and is_mover(readers[0]) and _reaches_down(readers[0].outputs[0])
