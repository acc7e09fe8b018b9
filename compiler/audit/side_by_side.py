"""The quantized layers of a lowered graph beside the float ones they stand for, in one graph.

Each layer of a float graph that is an integer group in a lowered graph gets a copy of that group beside it:

    float      x ---------------------> layer ----------------------> y --+
    quantized  x -> Q [-> Clip] -> the lowered node -> [Q ->] DQ -> y' --- Where(switch) -> whoever read y

The copy is literal: weights, biases and scales are those of the lowered graph, with the lookups that find them for the
timestep. So what a layer costs is measured on what is shipped, whatever a plan said. All switches off is the float
network; one on is the float network with one layer quantized; all on is the quantized network, but for what was
quantized between layers only (nothing, as insert_qdq works).

What is compared never leaves the graph: sums of squares and extremes do, a few numbers for each layer. Both forms of
every layer are computed in every call, which takes about twice the time of the float network and no more memory than
the largest of them. Weights are on disk once in float and once in integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..core.program import Program
from ..graph.nodes import Builder, Names, initializer, is_constant, is_op, name_of
from ..graph.ops import Layer, layers
from .grids import INTEGER, Grid, UnknownForm, above, axis_of, input_grid, is_quantized, output_grid, steps_of

FACTS = (
    "signal",
    "noise",
    "x_signal",
    "x_noise",
    "y_noise",
    "x_low",
    "x_high",
    "y_low",
    "y_high",
    "x_reach",
    "y_reach",
)
"""What is told of a layer at each call, where it is known: sums of squares of its output and of that output's error,
of its first input and of its rounding, of the rounding of the output; extremes; the widths of the quantizers' grids."""


@dataclass(frozen=True)
class Group:
    """One layer in both forms: the input that switches it, its weight (the name in the float graph), the outputs that
    tell FACTS, and those of the extremes of the parts (low, high) where its input is a Concat."""

    switch: str
    weight: str
    facts: Mapping[str, str]
    parts: tuple[tuple[str, str], ...] = ()

    @property
    def taps(self) -> list[str]:
        return [*self.facts.values(), *(name for pair in self.parts for name in pair)]


@dataclass(frozen=True, eq=False)
class Beside:
    """`model` has the switches as inputs, which may be left out (off), and `groups` by the layer's name.

    `unknown` says why a layer that is quantized has no group.
    """

    model: ir.Model
    groups: Mapping[str, Group]
    unknown: Mapping[str, str] = field(default_factory=dict)


def put_beside(program: Program, file: Path) -> Beside:
    """The float graph of a program with the groups of a lowered one, an ONNX file; layers are known by the names of
    their nodes. The program is not changed. Weights of the file are mapped, not read.
    """
    lowered = ir.load(file)
    model = program.model.clone()
    for domain, version in lowered.graph.opset_imports.items():
        model.graph.opset_imports[domain] = max(version, model.graph.opset_imports.get(domain, version))
    writer = _Writer(model.graph, program.signature.timestep)
    nodes = {node.name: node for node in lowered.graph if node.name}
    groups, unknown = {}, {}
    for layer in list(layers(model.graph)):
        node = nodes.get(layer.name)
        if node is None:
            unknown[layer.name] = "the bundle has no node of this name"
            continue
        if not is_quantized(node):
            continue
        try:
            groups[layer.name] = writer.add(layer, node)
        except UnknownForm as error:
            unknown[layer.name] = str(error)
    return Beside(model, groups, unknown)


class _Writer:
    def __init__(self, graph: ir.Graph, timestep: str) -> None:
        self.graph, self.names = graph, Names(graph)
        self._copies: dict[ir.Value, ir.Value] = {}
        self._time = next(v for v in graph.inputs if v.name == timestep)
        self._front = next(iter(graph))  # copies of lookups go in front of it: they need the timestep only

    def add(self, layer: Layer, node: ir.Node) -> Group:
        """Write the group of a layer. Raises UnknownForm before anything that matters was written."""
        target = layer.node.outputs[0]
        if node.op_type == "MatMulIntegerToFloat" and len(node.inputs) > 6 and node.inputs[6] is not None:
            target = layer.output
        last = target.producer()
        assert last is not None
        if is_op(node, "Conv", "Gemm") and len(node.inputs) != len(layer.node.inputs):
            raise UnknownForm("its bias is added behind it")
        x_grids = {i: grid for i in _activations(layer, node) if (grid := input_grid(node, i)) is not None}
        y_grid = output_grid(node)
        copied = {i: self.copy(v) for i, v in enumerate(node.inputs) if i not in _activations(layer, node)}
        for grid in (*x_grids.values(), *([y_grid] if y_grid else [])):
            for part in (grid.scale, grid.zero, grid.read_scale, grid.read_zero):
                self.copy(part)
        readers = [(use.node, use.idx) for use in target.uses()]
        build = Builder(self.graph, self.names, after=last)
        x = layer.node.inputs[0]
        assert x is not None
        inputs: list[ir.Value | None] = []
        seen = x
        for i, value in enumerate(node.inputs):
            if i in copied:
                inputs.append(copied[i])
                continue
            given = layer.node.inputs[i]
            assert given is not None and value is not None
            if (grid := x_grids.get(i)) is None:
                inputs.append(given)
                continue
            q = self._quantize(build, given, grid)
            dq = self._dequantize(build, q, given, grid)
            seen = dq if i == 0 else seen
            inputs.append(q if node.op_type in INTEGER else dq)
        integer = node.op_type == "QLinearConv"
        y = build.op(
            node.op_type,
            inputs,
            f"{name_of(target)}_beside",
            like=target,
            dtype=node.outputs[0].dtype if integer else None,
            attributes={name: a.value for name, a in node.attributes.items()},
            domain=node.domain,
        )
        if y_grid is not None:
            if integer:
                y = self._clip(build, y, y_grid)
            else:
                y = self._quantize(build, y, y_grid)
            y = self._dequantize(build, y, target, y_grid)
        facts = self._compare(build, x, seen, target, y, x_grids.get(0), y_grid)
        switch = build.constant(f"{layer.name}_switch", np.array(False))
        self.graph.inputs.append(switch)
        out = build.op("Where", [switch, y, target], f"{name_of(target)}_chosen", like=target)
        for reader, index in readers:
            reader.replace_input_with(index, out)
        if target.is_graph_output():
            place = list(self.graph.outputs).index(target)
            target.name, out.name = self.names.unique(f"{name_of(target)}_float"), name_of(target)
            self.graph.outputs[place] = out
        return Group(name_of(switch), name_of(layer.weight), facts, self._parts(build, x))

    def copy(self, value: ir.Value | None) -> ir.Value | None:
        """A value of the lowered graph that is constant or depends on the timestep only, in this graph."""
        if value is None:
            return None
        if value in self._copies:
            return self._copies[value]
        if is_constant(value):
            assert value.const_value is not None
            name = self.names.unique(f"{name_of(value)}_shipped")
            value.const_value.name = name
            self._copies[value] = initializer(self.graph, name, value.const_value)
            return self._copies[value]
        if value.is_graph_input() and value.name == self._time.name:
            return self._time
        node = value.producer()
        if node is None:
            raise UnknownForm("its scales depend on more than the timestep")
        inputs = [self.copy(v) for v in node.inputs]
        outputs = [
            ir.Value(name=self.names.unique(f"{name_of(v)}_shipped"), shape=v.shape, type=v.type) for v in node.outputs
        ]
        made = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs, name=outputs[0].name
        )
        self.graph.insert_before(self._front, made)
        self._copies.update(zip(node.outputs, outputs, strict=True))
        return self._copies[value]

    def _quantize(self, build: Builder, x: ir.Value, grid: Grid) -> ir.Value:
        scale, zero = self.copy(grid.scale), self.copy(grid.zero)
        q = build.op(
            "QuantizeLinear",
            [x, scale, zero],
            f"{name_of(x)}_q",
            like=x,
            dtype=None if zero is None else zero.dtype,
            attributes=axis_of(grid),
        )
        return self._clip(build, q, grid)

    def _clip(self, build: Builder, q: ir.Value, grid: Grid) -> ir.Value:
        if grid.clip is None:
            return q
        return build.op("Clip", [q, *(self.copy(v) for v in grid.clip.inputs[1:])], f"{name_of(q)}_clipped", like=q)

    def _dequantize(self, build: Builder, q: ir.Value, like: ir.Value, grid: Grid) -> ir.Value:
        inputs = [q, self.copy(grid.read_scale), self.copy(grid.read_zero)]
        return build.op("DequantizeLinear", inputs, f"{name_of(q)}_dq", like=like, attributes=axis_of(grid))

    def _compare(
        self,
        build: Builder,
        x: ir.Value,
        seen: ir.Value,
        target: ir.Value,
        y: ir.Value,
        x_grid: Grid | None,
        y_grid: Grid | None,
    ) -> dict[str, str]:
        def told(op: str, value: ir.Value) -> str:
            scalar = build.op(op, [value], f"{name_of(value)}_told", like=value, shape=[], attributes={"keepdims": 0})
            return name_of(scalar)

        def error(value: ir.Value, exact: ir.Value) -> str:
            return told("ReduceSumSquare", build.op("Sub", [value, exact], f"{name_of(value)}_error", like=exact))

        facts = {"signal": told("ReduceSumSquare", target), "noise": error(y, target)}
        facts |= {"x_low": told("ReduceMin", x), "x_high": told("ReduceMax", x)}
        if x_grid is not None:
            facts |= {"x_signal": told("ReduceSumSquare", x), "x_noise": error(seen, x)}
            facts["x_reach"] = self._reach(build, x_grid)
        if y_grid is not None:
            facts |= {"y_low": told("ReduceMin", target), "y_high": told("ReduceMax", target)}
            rounded = Grid(
                y_grid.read_scale, y_grid.read_zero, y_grid.clip, y_grid.axis, y_grid.read_scale, y_grid.read_zero
            )
            again = self._dequantize(build, self._quantize(build, target, rounded), target, rounded)
            facts |= {"y_noise": error(again, target), "y_reach": self._reach(build, y_grid)}
        return facts

    def _reach(self, build: Builder, grid: Grid) -> str:
        """The width of a grid: of its widest channel, where each has its own."""
        scale = self.copy(grid.read_scale)
        assert scale is not None
        widest = build.op(
            "ReduceMax", [scale], f"{name_of(scale)}_widest", like=scale, shape=[], attributes={"keepdims": 0}
        )
        levels = build.constant(f"{name_of(scale)}_steps", np.array(steps_of(grid), np.float32))
        return name_of(build.op("Mul", [widest, levels], f"{name_of(scale)}_reach", like=widest))

    def _parts(self, build: Builder, x: ir.Value) -> tuple[tuple[str, str], ...]:
        concat = above(x)
        if concat is None or not is_op(concat, "Concat"):
            return ()
        found = []
        for part in concat.inputs:
            assert part is not None
            both = [
                build.op(op, [part], f"{name_of(part)}_part", like=part, shape=[], attributes={"keepdims": 0})
                for op in ("ReduceMin", "ReduceMax")
            ]
            found.append((name_of(both[0]), name_of(both[1])))
        return tuple(found)


def _activations(layer: Layer, node: ir.Node) -> tuple[int, ...]:
    """Which inputs of the lowered node are activations: the same as those of the float one."""
    return (0, 1) if layer.kind == "attention" else (0,)
