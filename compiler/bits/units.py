"""Units of an allocation of bits, the choices of widths for them, and plans with chosen widths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.sampling.condition_network import call_conditions

from ..core.execute import Executor
from ..core.formats import Format
from ..core.islands import Islands
from ..core.pipeline import Context
from ..core.program import Plan, Program, Quantizer, Site
from ..graph.nodes import Builder, Names, name_of, numpy_of
from ..graph.ops import Layer, float_reason, layers
from ..graph.require import shape_of
from ..scales.codebooks import LEVEL_BITS
from ..scales.weights import WeightMethod, rounded_weight, weight_format, weight_quantizer

FLOAT_BITS = 32
RowBits = npt.NDArray[np.int8]


@dataclass(frozen=True, order=True)
class BitChoice:
    """Bits of the weights and of the activations; FLOAT_BITS for a layer that stays in float."""

    weight: int
    activation: int = 8

    @property
    def label(self) -> str:
        """`4`, `4/6` where the activations have another width than 8 bits, `float`."""
        if self.weight == FLOAT_BITS:
            return "float"
        return str(self.weight) if self.activation == 8 else f"{self.weight}/{self.activation}"


FLOAT = BitChoice(FLOAT_BITS, FLOAT_BITS)


@dataclass(frozen=True, eq=False)
class Unit:
    """A weight with all layers that read it, or a matmul of two activations, which has none; `macs` for one sample.

    `rows` are the output channels of a part of a weight (compiler/bits/parts.py), or None for the whole weight.
    """

    layers: tuple[Layer, ...]
    macs: int = 0
    rows: npt.NDArray[np.int64] | None = None

    @property
    def name(self) -> str:
        return self.layers[0].name

    @property
    def weight(self) -> ir.Value | None:
        return self.layers[0].weight

    def require_weight(self) -> ir.Value:
        """Return the weight. Raise PassError for a product of two activations."""
        return self.layers[0].require_weight()

    @property
    def size(self) -> int:
        """The number of weights."""
        whole = 0 if self.weight is None or self.weight.shape is None else int(prod(self.weight.shape.numpy()))
        return whole if self.rows is None else whole // self.channels * len(self.rows)

    @property
    def channels(self) -> int:
        """The output channels of the whole weight."""
        axis = self.layers[0].weight_axis
        if self.weight is None or self.weight.shape is None or axis is None:
            return 0
        return int(self.weight.shape.numpy()[axis])


def units_of(found: Sequence[Layer]) -> list[Unit]:
    """Return the layers grouped by the weight that they read, in the order of the graph."""
    members: dict[str, list[Layer]] = {}
    for layer in found:
        key = f"weight {name_of(layer.weight)}" if layer.weight is not None else f"layer {layer.name}"
        members.setdefault(key, []).append(layer)
    return [Unit(tuple(group)) for group in members.values()]


def free_layers(found: Sequence[Layer], kept: Collection[str], plan: Plan, *, with_attention: bool) -> list[Layer]:
    """The layers to choose for: none in `kept` nor an island of the plan, and what the plan has all quantizers of."""

    def quantized(layer: Layer) -> list[ir.Value]:
        weight = [layer.weight] if layer.weight is not None else []
        return [*layer.activations, *weight, *([layer.output] if layer.output_quantized else [])]

    return [
        layer
        for layer in found
        if layer.name not in kept
        and layer.name not in plan.islands
        and float_reason(layer.node) is None
        and (layer.weight is not None or with_attention)
        and all(plan.of(name_of(v), layer.name) is not None for v in quantized(layer))
    ]


def free_units(
    program: Program, islands: Sequence[str], by: str, *, with_attention: bool = False
) -> tuple[list[Unit], dict[str, str]]:
    """Return the units to choose for, and the layers that `islands` keep in float with the reason. `by` is the pass."""
    every_layer = list(layers(program.graph))
    found = Islands(program, every_layer, tuple(islands), by)
    kept = {layer.name: reason for layer in every_layer if (reason := found.reason(layer)) is not None}
    free = free_layers(every_layer, kept, program.require_plan(), with_attention=with_attention)
    return units_of(free), kept


def with_macs(units: Sequence[Unit], program: Program, context: Context) -> list[Unit]:
    """The units with the multiplications of one call for one sample, from the sizes that one call shows."""
    model = program.model.clone()
    names, shapes = Names(model.graph), {}
    nodes = {node.name or name_of(node.outputs[0]): node for node in model.graph}
    for layer in (layer for unit in units for layer in unit.layers):
        for value in (nodes[layer.name].outputs[0], *nodes[layer.name].inputs[:1]):
            if value is None:
                continue
            build = Builder(model.graph, names, before=model.graph[0])
            if (producer := value.producer()) is not None:
                build = Builder(model.graph, names, after=producer)
            shapes[layer.name, value is nodes[layer.name].outputs[0]] = name_of(
                build.op("Shape", [value], "size_of", dtype=ir.DataType.INT64)
            )
    rows = program.fixed_batch or 1
    with Executor(model, context.folder, taps=list(shapes.values()), threads=context.threads) as executor:
        x = np.zeros((rows, *program.shape), np.float32)
        t = program.deployment.timesteps[0]
        conditions = call_conditions(context.condition_network, x, t, context.condition_rows(0, rows))
        seen = executor.call(program.signature, x, t, conditions)

    def macs(layer: Layer) -> int:
        out, given = ([int(n) for n in seen[shapes[layer.name, end]]] for end in (True, False))
        if layer.kind == "conv":
            each = prod(shape_of(layer.weight).numpy()[1:])
        else:
            each = given[-1]
        return int(prod(out)) * int(each) // rows

    return [replace(unit, macs=sum(macs(layer) for layer in unit.layers)) for unit in units]


class WeightQuantizers:
    """The quantizers of weights at any width, cached. The plan's own quantizer is used if it has that width.

    `with_levels` gives quantizers of up to LEVEL_BITS a codebook of as many bits.
    """

    def __init__(
        self,
        plan: Plan,
        method: WeightMethod,
        by: str,
        with_levels: Callable[[Layer, Quantizer], Quantizer] | None = None,
    ) -> None:
        self.plan, self.method, self.by, self._with_levels = plan, method, by, with_levels
        self._made: dict[tuple[str, int], Quantizer] = {}

    def __call__(self, layer: Layer, bits: int) -> Quantizer:
        own = self.plan.of(name_of(layer.weight), layer.name)
        if own is not None and self.keeps(own, bits) and own.axis == layer.weight_axis:
            return own
        if (layer.name, bits) not in self._made:
            made = weight_quantizer(layer, weight_format(bits), self.method, self.by)
            if self._with_levels is not None and bits <= LEVEL_BITS:
                made = self._with_levels(layer, made)
            self._made[layer.name, bits] = made
        return self._made[layer.name, bits]

    def keeps(self, own: Quantizer, bits: int) -> bool:
        """Return whether a weight keeps its quantizer at this width."""
        return _has_width(own, bits) and (self._with_levels is None or bits > LEVEL_BITS)

    def by_row(self, layer: Layer, bits: RowBits) -> Quantizer:
        """That of a weight whose output channels have these widths `[channels]`, each with its scale at its own."""
        widest = self(layer, int(bits.max()))
        scale = widest.scale.copy()
        for width in np.unique(bits):
            scale[bits == width] = self(layer, int(width)).scale[bits == width]
        return replace(widest, scale=scale, by=self.by, row_bits=bits)


def _has_width(quantizer: Quantizer, bits: int) -> bool:
    return quantizer.format == weight_format(bits) and quantizer.uniform


def joined(units: Sequence[Unit], chosen: Sequence[BitChoice]) -> list[tuple[Unit, BitChoice, RowBits | None]]:
    """Every whole unit with its choice. Where parts differ, the widest's, and the bits of all channels `[channels]`."""
    members: dict[str, list[tuple[Unit, BitChoice]]] = {}
    for unit, choice in zip(units, chosen, strict=True):
        members.setdefault(unit.name, []).append((unit, choice))
    found: list[tuple[Unit, BitChoice, RowBits | None]] = []
    for parts in members.values():
        unit, choices = replace(parts[0][0], rows=None), {choice for _, choice in parts}
        bits = np.zeros(unit.channels, np.int8)
        for part, choice in parts:
            bits[part.rows] = choice.weight
        found.append((unit, max(choices), bits if len(choices) > 1 else None))
    return found


def narrowed(quantizer: Quantizer, bits: int, by: str) -> Quantizer:
    """An activation's quantizer with `bits` at most, over the same range; tables keep their rows."""
    old = quantizer.format
    if bits >= old.bits:
        return quantizer
    fmt = Format(bits, old.signed, old.symmetric)
    wider = np.float32((old.qmax - old.qmin) / (fmt.qmax - fmt.qmin))
    zero = np.rint((quantizer.zero_point.astype(np.float64) - old.qmin) / wider + fmt.qmin)
    return replace(
        quantizer,
        format=fmt,
        scale=np.asarray(quantizer.scale * wider, np.float32),
        zero_point=np.clip(zero, fmt.qmin, fmt.qmax).astype(fmt.dtype),
        by=by,
    )


def with_choices(units: Sequence[Unit], chosen: Sequence[BitChoice], quantizers: WeightQuantizers) -> Plan:
    """Return the plan with the chosen widths. Layers that stay in float are its islands."""
    plan, by = quantizers.plan, quantizers.by
    quantized, islands = dict(plan.quantizers), dict(plan.islands)
    for unit, choice, bits in joined(units, chosen):
        if choice == FLOAT:
            islands |= {layer.name: f"{by}: worth more in float" for layer in unit.layers}
            continue
        for layer in unit.layers:
            for value in layer.activations:
                whole = plan.of(name_of(value), layer.name)
                if whole is not None and whole.format.bits > choice.activation:
                    quantized[Site(name_of(value), layer.name)] = narrowed(whole, choice.activation, by)
            for site in (Site(name_of(layer.weight)), Site(name_of(layer.weight), layer.name)):
                own = plan.quantizers.get(site)
                if own is None or own.axis != layer.weight_axis:
                    continue
                if bits is not None:
                    quantized[site] = quantizers.by_row(layer, bits)
                elif not quantizers.keeps(own, choice.weight):
                    quantized[site] = quantizers(layer, choice.weight)
    return replace(plan, quantizers=quantized, islands=islands)


def quantized_model(program: Program, units: Sequence[Unit], plan: Plan) -> ir.Model:
    """Return the float graph with the weights rounded as in the plan, computed one at a time when it is written."""
    model = program.model.clone()
    for unit in units:
        quantizer = plan.of(name_of(unit.weight))
        if unit.weight is None or quantizer is None or all(layer.name in plan.islands for layer in unit.layers):
            continue
        value = model.graph.initializers[name_of(unit.weight)]
        value.const_value = _lazily(unit.weight, quantizer)
    return model


def _lazily(weight: ir.Value, quantizer: Quantizer) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(rounded_weight(numpy_of(weight), quantizer)),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape_of(weight).numpy()),
        name=weight.name,
    )
