"""Islands: the layers that a recipe keeps in float, by role or by name.

first      reads the sample, whose last bits are the noise that the model must predict
second     reads what a first layer made, through norms and activations only: at the last timesteps that noise is a
           hundredth of the picture in it, less than a step of an 8-bit grid over the whole range
shortcuts  1x1 convolutions beside a residual branch, most of them behind a concatenation: what goes around all norms
           arrives at the output as it was rounded, and such a convolution has so few products that quantizing and
           dequantizing around it cost as much time as they save
last       makes the output
attention  matmuls of two activations

Anything else is a pattern of node names, as in a shell (`*`, `?`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import onnx_ir as ir

from .errors import RecipeError
from .graph import consumers, is_constant, is_op, known_ints, name_of
from .ops import Layer, is_mover
from .program import Program

ROLES = {
    "first": "it reads the sample",
    "second": "it reads what a first layer made",
    "shortcuts": "a 1x1 convolution beside a residual branch",
    "last": "it makes the output",
    "attention": "a matmul of two activations",
}


class Islands:
    """The chosen islands of one program. Raises RecipeError for a pattern that matches no layer."""

    def __init__(self, program: Program, layers: list[Layer], chosen: tuple[str, ...], where: str) -> None:
        sample = program.signature.sample
        self._chosen = chosen
        self._first = {layer.name for layer in layers if any(_reaches_up(v, sample) for v in layer.activations)}
        made = _made_of([layer.output for layer in layers if layer.name in self._first], layers)
        self._second = {layer.name for layer in layers if any(v in made for v in layer.activations)}
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
            if wish in ROLES and self._plays(layer, wish):
                return f"island {wish!r}: {ROLES[wish]}"
            if wish not in ROLES and fnmatchcase(layer.name, wish):
                return f"island {wish!r}"
        return None

    def _plays(self, layer: Layer, role: str) -> bool:
        if role == "first":
            return layer.name in self._first
        if role == "second":
            return layer.name in self._second
        if role == "shortcuts":
            return _is_shortcut(layer)
        if role == "last":
            return _reaches_down(layer.output)
        return layer.kind == "attention"


def _made_of(sources: list[ir.Value], layers: list[Layer]) -> set[ir.Value]:
    """The sources and what is computed from them and constants alone, up to the next layers."""
    ends = {node for layer in layers for node in (layer.node, layer.bias_add) if node is not None}
    made, waiting = set(sources), list(sources)
    while waiting:
        for node in consumers(waiting.pop()):
            # The sizes of a feature map come into a Reshape as well; they carry none of its values.
            if node in ends or not all(v is None or v in made or is_constant(v) or _is_size(v) for v in node.inputs):
                continue
            fresh = [out for out in node.outputs if out not in made]
            made.update(fresh)
            waiting.extend(fresh)
    return made


def _is_size(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64


def _is_shortcut(layer: Layer) -> bool:
    """A 1x1 convolution whose output is added to another feature map right away."""
    if layer.kind != "conv" or layer.weight is None:
        return False
    kernel = known_ints(layer.weight.shape, range(2, len(layer.weight.shape or ())))
    readers = consumers(layer.output)
    if kernel is None or any(k != 1 for k in kernel) or len(readers) != 1 or not is_op(readers[0], "Add"):
        return False
    other = next((v for v in readers[0].inputs if v is not layer.output), None)
    if other is None or is_constant(other) or other.shape is None or len(other.shape) != 4:
        return False
    return known_ints(other.shape, [2, 3]) != [1, 1]  # that would be a time embedding


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
