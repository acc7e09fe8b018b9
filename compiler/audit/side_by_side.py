"""Float layers and their quantized forms side by side in one graph, with a switch for each layer.

Each layer of a float graph that is quantized in a lowered graph gets a copy of its lowered form:

    float      x ---------------------> layer ----------------------> y --+
    quantized  x -> Q [-> Clip] -> the lowered node -> [Q ->] DQ -> y' --- Where(switch) -> the readers of y

The copy is literal: weights, biases and scales are those of the lowered graph, with their lookups by timestep. So the
error of a layer is measured on the shipped graph and not on a plan. With all switches off the graph is the float
network; with one on it is the float network with one layer quantized; with all on it is the quantized network, except
for quantizers between layers (insert_qdq writes none).

Activations never leave the graph: sums of squares and extremes do, a few numbers for each layer. Every call computes
both forms of every layer, which takes about twice the time of the float network, and no more memory than the largest
layer. Weights are on disk once in float and once in integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ..core.program import Program
from ..graph.nodes import Builder, Names, initializer, is_constant, is_op, name_of
from ..graph.ops import Layer, layers
from ..graph.require import inputs as required_inputs
from ..graph.require import producer, required, tensor_of
from .grids import (
    LOWERED_LAYERS,
    LoweredGrid,
    UnknownForm,
    above,
    axis_of,
    input_grid,
    is_quantized,
    output_grid,
    steps_of,
)

MAX_AXES_AS_INPUT = 18  # the opset since which ReduceMax reads its axes from an input
MEASUREMENTS = (
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
"""Per-layer measurements of one call. A float input or output has no noise and no reach of its own.

Sums of squares: of the output (signal) and its error (noise), of the first input (x_signal) and its rounding error
(x_noise), of the output's rounding error (y_noise). Extremes: low, high. Widths of the quantizers' grids: reach.
"""


@dataclass(frozen=True)
class PairedLayer:
    """One layer in both forms.

    `switch` is the graph input that selects the quantized form; `weight` is the weight's name in the float graph;
    `measurements` maps MEASUREMENTS to graph values. Where the input is a Concat, `parts` are the values (low, high) of
    its inputs' extremes. `channels` is the value `[C]` of the largest magnitude in each channel of the input, for
    layers with weights.
    """

    switch: str
    weight: str
    measurements: Mapping[str, str]
    parts: tuple[tuple[str, str], ...] = ()
    channels: str | None = None

    @property
    def taps(self) -> list[str]:
        """Return the names of all values that a call has to return."""
        extremes = [name for pair in self.parts for name in pair]
        return [*self.measurements.values(), *extremes, *([] if self.channels is None else [self.channels])]


@dataclass(frozen=True, eq=False)
class SideBySide:
    """`model` has the switches as optional inputs (off by default); `layers` are its paired layers by name.

    `unknown` gives the reason why a quantized layer is not among them.
    """

    model: ir.Model
    layers: Mapping[str, PairedLayer]
    unknown: Mapping[str, str] = field(default_factory=dict)


def put_side_by_side(program: Program, file: Path) -> SideBySide:
    """Return the float graph of a program with the quantized layers of a lowered graph, an ONNX file.

    Layers are matched by the names of their nodes. The program is not changed. Weights of the file are mapped, not
    read.
    """
    lowered = ir.load(file)
    model = program.model.clone()
    for domain, version in lowered.graph.opset_imports.items():
        model.graph.opset_imports[domain] = max(version, model.graph.opset_imports.get(domain, version))
    writer = _Writer(model.graph, program.signature.timestep)
    nodes = {node.name: node for node in lowered.graph if node.name}
    paired, unknown = {}, {}
    for layer in list(layers(model.graph)):
        node = nodes.get(layer.name)
        if node is None:
            unknown[layer.name] = "the bundle has no node of this name"
            continue
        if not is_quantized(node):
            continue
        try:
            paired[layer.name] = writer.add(layer, node)
        except UnknownForm as error:
            unknown[layer.name] = str(error)
    return SideBySide(model, paired, unknown)


class _Writer:
    """Writes quantized forms of layers into a float graph."""

    def __init__(self, graph: ir.Graph, timestep: str) -> None:
        self.graph, self.names = graph, Names(graph)
        self._copies: dict[ir.Value, ir.Value] = {}
        self._time = next(v for v in graph.inputs if v.name == timestep)
        self._front = next(iter(graph))  # copies of lookups are inserted before it: they depend on the timestep only

    def add(self, layer: Layer, node: ir.Node) -> PairedLayer:
        """Write the quantized form of a layer. Raises UnknownForm before the float layer's readers are changed."""
        target = layer.node.outputs[0]
        if node.op_type == "MatMulIntegerToFloat" and len(node.inputs) > 6 and node.inputs[6] is not None:
            target = layer.output
        last = producer(target)
        if is_op(node, "Conv", "Gemm") and len(node.inputs) != len(layer.node.inputs):
            raise UnknownForm("its bias is added behind it")
        x_grids = {i: grid for i in _activations(layer) if (grid := input_grid(node, i)) is not None}
        y_grid = output_grid(node)
        copied = {i: self.copy(v) for i, v in enumerate(node.inputs) if i not in _activations(layer)}
        for grid in (*x_grids.values(), *([y_grid] if y_grid else [])):
            for parameter in (grid.scale, grid.zero, grid.read_scale, grid.read_zero):
                self.copy(parameter)
        readers = [(use.node, use.idx) for use in target.uses()]
        build = Builder(self.graph, self.names, after=last)
        activations = required_inputs(layer.node, len(_activations(layer)))
        x = rounded_x = activations[0]
        inputs: list[ir.Value | None] = []
        for i in range(len(node.inputs)):
            if i in copied:
                inputs.append(copied[i])
                continue
            if (grid := x_grids.get(i)) is None:
                inputs.append(activations[i])
                continue
            q = self._quantize(build, activations[i], grid)
            dq = self._dequantize(build, q, activations[i], grid)
            rounded_x = dq if i == 0 else rounded_x
            inputs.append(q if node.op_type in LOWERED_LAYERS else dq)
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
        measurements = self._measure(build, x, rounded_x, target, y, x_grids.get(0), y_grid)
        switch = build.constant(f"{layer.name}_switch", np.array(False))
        self.graph.inputs.append(switch)
        out = build.op("Where", [switch, y, target], f"{name_of(target)}_chosen", like=target)
        for reader, index in readers:
            reader.replace_input_with(index, out)
        if target.is_graph_output():
            place = list(self.graph.outputs).index(target)
            target.name, out.name = self.names.unique(f"{name_of(target)}_float"), name_of(target)
            self.graph.outputs[place] = out
        channels = self._channels(build, layer, x)
        return PairedLayer(name_of(switch), name_of(layer.weight), measurements, self._parts(build, x), channels)

    def copy(self, value: ir.Value | None) -> ir.Value | None:
        """Return a copy of a value of the lowered graph that depends on constants and the timestep only.

        Raises UnknownForm for others.
        """
        if value is None:
            return None
        if value in self._copies:
            return self._copies[value]
        if is_constant(value):
            name, tensor = self.names.unique(f"{name_of(value)}_shipped"), tensor_of(value)
            tensor.name = name
            self._copies[value] = initializer(self.graph, name, tensor)
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
        copied = ir.Node(
            node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=outputs, name=outputs[0].name
        )
        self.graph.insert_before(self._front, copied)
        self._copies.update(zip(node.outputs, outputs, strict=True))
        return self._copies[value]

    def _quantize(self, build: Builder, x: ir.Value, grid: LoweredGrid) -> ir.Value:
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

    def _clip(self, build: Builder, q: ir.Value, grid: LoweredGrid) -> ir.Value:
        if grid.clip is None:
            return q
        return build.op("Clip", [q, *(self.copy(v) for v in grid.clip.inputs[1:])], f"{name_of(q)}_clipped", like=q)

    def _dequantize(self, build: Builder, q: ir.Value, like: ir.Value, grid: LoweredGrid) -> ir.Value:
        inputs = [q, self.copy(grid.read_scale), self.copy(grid.read_zero)]
        return build.op("DequantizeLinear", inputs, f"{name_of(q)}_dq", like=like, attributes=axis_of(grid))

    def _measure(
        self,
        build: Builder,
        x: ir.Value,
        rounded_x: ir.Value,
        target: ir.Value,
        y: ir.Value,
        x_grid: LoweredGrid | None,
        y_grid: LoweredGrid | None,
    ) -> dict[str, str]:
        """Write the reductions of MEASUREMENTS and return their names."""

        def reduced(op: str, value: ir.Value) -> str:
            scalar = build.op(op, [value], f"{name_of(value)}_told", like=value, shape=[], attributes={"keepdims": 0})
            return name_of(scalar)

        def error(value: ir.Value, exact: ir.Value) -> str:
            return reduced("ReduceSumSquare", build.op("Sub", [value, exact], f"{name_of(value)}_error", like=exact))

        measurements = {"signal": reduced("ReduceSumSquare", target), "noise": error(y, target)}
        measurements |= {"x_low": reduced("ReduceMin", x), "x_high": reduced("ReduceMax", x)}
        if x_grid is not None:
            measurements |= {"x_signal": reduced("ReduceSumSquare", x), "x_noise": error(rounded_x, x)}
            measurements["x_reach"] = self._reach(build, x_grid)
        if y_grid is not None:
            measurements |= {"y_low": reduced("ReduceMin", target), "y_high": reduced("ReduceMax", target)}
            as_read = LoweredGrid(
                y_grid.read_scale, y_grid.read_zero, y_grid.clip, y_grid.axis, y_grid.read_scale, y_grid.read_zero
            )
            again = self._dequantize(build, self._quantize(build, target, as_read), target, as_read)
            measurements |= {"y_noise": error(again, target), "y_reach": self._reach(build, y_grid)}
        return measurements

    def _reach(self, build: Builder, grid: LoweredGrid) -> str:
        """Write the width of a grid, or of its widest channel, and return its name."""
        scale = required(self.copy(grid.read_scale), "the scale of a grid", name_of(grid.read_scale))
        widest = build.op(
            "ReduceMax", [scale], f"{name_of(scale)}_widest", like=scale, shape=[], attributes={"keepdims": 0}
        )
        levels = build.constant(f"{name_of(scale)}_steps", np.array(steps_of(grid), np.float32))
        return name_of(build.op("Mul", [widest, levels], f"{name_of(scale)}_reach", like=widest))

    def _channels(self, build: Builder, layer: Layer, x: ir.Value) -> str | None:
        """Write the largest magnitude of each input channel, and return its name. None for an input of unknown rank."""
        if layer.weight is None or x.shape is None:
            return None
        axis = 1 if layer.kind == "conv" else len(x.shape) - 1
        axes = [other for other in range(len(x.shape)) if other != axis]
        inputs: list[ir.Value | None] = [build.op("Abs", [x], f"{name_of(x)}_magnitude", like=x)]
        attributes: dict[str, Any] = {"keepdims": 0}
        if self.graph.opset_imports.get("", 0) >= MAX_AXES_AS_INPUT:
            inputs.append(build.constant(f"{name_of(x)}_axes", np.array(axes, np.int64)))
        else:
            attributes["axes"] = axes
        shape, name = [x.shape[axis]], f"{name_of(x)}_channels"
        return name_of(build.op("ReduceMax", inputs, name, like=x, shape=shape, attributes=attributes))

    def _parts(self, build: Builder, x: ir.Value) -> tuple[tuple[str, str], ...]:
        concat = above(x)
        if concat is None or not is_op(concat, "Concat"):
            return ()
        parts = []
        for part in required_inputs(concat, len(concat.inputs)):
            low, high = (
                build.op(op, [part], f"{name_of(part)}_part", like=part, shape=[], attributes={"keepdims": 0})
                for op in ("ReduceMin", "ReduceMax")
            )
            parts.append((name_of(low), name_of(high)))
        return tuple(parts)


def _activations(layer: Layer) -> tuple[int, ...]:
    """Return the indices of a layer's activations: the same in the float and in the lowered node."""
    return (0, 1) if layer.kind == "attention" else (0,)
