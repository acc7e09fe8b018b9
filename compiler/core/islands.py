"""Islands: the layers that a recipe keeps in float, by role or by a pattern of names.

first        reads the sample, whose lowest bits are the noise that the model must predict
second       reads the output of a first layer. At the last timesteps the noise in that output is a hundredth of the
             image: less than one step of an 8-bit grid over the range of the image
penultimate  computes what a last layer reads, through one addition at most: a residual branch and the shortcut next to
             it, whose errors no later layer averages out
last         computes the output
attention    matmuls of two activations

Between the sample, a layer and the output, every operation is seen through that brings in no other feature map: norms,
activations, factors and additions that depend on the timestep or on conditions only, channels of a condition behind
the sample, a Split of the variance, and the sample itself where the output is c_skip sample + c_out F(c_in sample).
What depends on the sample by way of another layer is another feature map. A transposed convolution has roles too: it
runs in float anyway, and as an island keeps float weights.

On the digits model the second and the two penultimate layers cause 80 to 90 % of the error of epsilon at the last step,
and three quarters of it in the middle of the trajectory.

Any other name is a pattern of node names, as in a shell (`*`, `?`).
"""

from __future__ import annotations

from fnmatch import fnmatchcase

import onnx_ir as ir

from ..errors import RecipeError
from ..graph.nodes import consumers, is_constant, is_op, name_of
from ..graph.ops import Layer, float_reason
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
        flow = _Flow(program, layers)
        first = [layer for layer in layers if any(flow.is_sample(v) for v in layer.activations)]
        last = flow.makers(flow.outputs, through_concat=True)
        from_first = flow.computed_from([layer.output for layer in first])
        members = {
            "first": first,
            "second": [layer for layer in layers if any(v in from_first for v in layer.activations)],
            "penultimate": flow.makers([v for layer in last for v in layer.activations]),
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

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Return the chosen roles that no layer has."""
        return tuple(island for island in self._chosen if island in ROLES and not self._names[island])

    def reason(self, layer: Layer) -> str | None:
        """Return why a layer stays in float, or None for a layer that is quantized."""
        for island in self._chosen:
            if layer.name in self._names.get(island, ()):
                return f"island {island!r}: {ROLES[island]}"
            if island not in ROLES and fnmatchcase(layer.name, island):
                return f"island {island!r}"
        return None


class _Flow:
    """The way of the sample's contents through a graph: by itself (`bare`), and by way of a layer (`deep`)."""

    def __init__(self, program: Program, layers: list[Layer]) -> None:
        graph, signature = program.graph, program.signature
        self._by_output = {layer.output: layer for layer in layers}
        self._ends = {node for layer in layers for node in (layer.node, layer.bias_add) if node is not None}
        self._ends |= {node for node in graph if float_reason(node) is not None}
        named = [v for v in graph.outputs if name_of(v) == signature.output]
        self.outputs: list[ir.Value] = named or list(graph.outputs)
        self._bare = {v for v in graph.inputs if name_of(v) == signature.sample}
        self._deep: set[ir.Value] = set()
        for node in graph:
            if is_op(node, "Shape", "Size", "ConstantOfShape"):
                continue
            data = [v for v in node.inputs if v is not None and not _carries_no_data(v)]
            bare, deep = any(v in self._bare for v in data), any(v in self._deep for v in data)
            if deep or (bare and node in self._ends):
                self._deep.update(node.outputs)
            if bare and node not in self._ends:
                self._bare.update(node.outputs)

    def is_sample(self, value: ir.Value) -> bool:
        """Return whether a value comes from the sample, past no layer."""
        return value in self._bare and value not in self._deep

    def computed_from(self, sources: list[ir.Value]) -> set[ir.Value]:
        """Return the sources and the values that bring in no other feature map, up to the next layers."""
        computed, waiting = set(sources), list(sources)
        while waiting:
            for node in consumers(waiting.pop()):
                others = [v for v in node.inputs if v is not None and v not in computed and not _carries_no_data(v)]
                if node in self._ends or any(v in self._bare or v in self._deep for v in others):
                    continue
                fresh = [out for out in node.outputs if out not in computed]
                computed.update(fresh)
                waiting.extend(fresh)
        return computed

    def makers(self, targets: list[ir.Value], *, through_concat: bool = False) -> list[Layer]:
        """Return the layers that make these values, through one addition (or concatenation) of feature maps."""
        found: set[ir.Value] = set()
        waiting = [(value, False) for value in targets]
        seen = set(waiting)
        while waiting:
            value, joined = waiting.pop()
            node = value.producer()
            if value in self._by_output:
                found.add(value)
                continue
            if node is None or node in self._ends or (is_op(node, "Concat") and not through_concat):
                continue
            maps = dict.fromkeys(v for v in node.inputs if v is not None and v in self._deep)
            join = is_op(node, "Add", "Concat") and len(maps) > 1
            if not (join and joined):
                fresh = [(v, joined or join) for v in maps if (v, joined or join) not in seen]
                seen.update(fresh)
                waiting.extend(fresh)
        return [layer for output, layer in self._by_output.items() if output in found]


def _carries_no_data(value: ir.Value) -> bool:
    """Return whether a value is constant, a size of a feature map, or ones of such a size (from lower_norms)."""
    return is_constant(value) or value.dtype == ir.DataType.INT64 or is_op(value.producer(), "ConstantOfShape")
