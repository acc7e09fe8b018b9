"""The quantized weights of a graph behind insert_qdq: their grids and readers, and their replacement by grid points."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats

from ..core.formats import Format, Grid, Levels
from ..core.program import Plan, Program, Quantizer, Site
from ..errors import PassError, RecipeError
from ..graph import weight_store as store
from ..graph.nodes import Names, consumers, initializer, is_constant, is_op, name_of, numpy_of
from ..graph.require import inputs, shape_of, tensor_of
from ..lowering.qdq import clip_behind, dequantizer, grid_ends


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A constant between its QuantizeLinear and the layers that read it behind DequantizeLinear nodes.

    As `rows` it is `[outputs, inputs of an output]`, whichever way the layers hold it.
    """

    quantize: ir.Node
    dequantizers: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]
    axis: int
    format: Format

    @property
    def value(self) -> ir.Value:
        return inputs(self.quantize, 1)[0]

    @property
    def name(self) -> str:
        """Return the name of the first reader, which messages and patterns use."""
        return layer_name(self.readers[0])

    def rows(self) -> Floats:
        return weight_rows(self.value, self.axis)

    def scale(self) -> Floats:
        """Return a scale for each row `[rows]`."""
        _, value = inputs(self.quantize, 2)
        rows = int(shape_of(self.value).numpy()[self.axis])
        return np.ascontiguousarray(np.broadcast_to(numpy_of(value).reshape(-1).astype(np.float32), rows))

    @property
    def per_row(self) -> bool:
        """Return whether every row has a scale of its own."""
        return tensor_of(self.quantize.inputs[1]).size == shape_of(self.value).numpy()[self.axis]


def layer_name(node: ir.Node) -> str:
    """Return the name that `Layer.name` of compiler/graph/ops.py has."""
    return node.name or name_of(node.outputs[0])


def weight_rows(value: ir.Value, axis: int) -> Floats:
    """Return a constant as `[outputs, inputs of an output]`, float32; `axis` is the axis of the outputs."""
    turned: Floats = np.moveaxis(numpy_of(value), axis, 0).astype(np.float32)
    return np.ascontiguousarray(turned.reshape(len(turned), -1))


def find_weights(graph: ir.Graph) -> list[QuantizedWeight]:
    """Return all quantized weights, in the order of their first readers. Raise PassError if one cannot be rounded."""
    found: dict[ir.Node, tuple[list[ir.Node], list[ir.Node], set[int]]] = {}
    for node in graph:
        if not is_op(node, "Conv", "Gemm", "MatMul"):
            continue
        pair = dequantizer(node.inputs[1])
        quantize = None if pair is None or pair.inputs[0] is None else pair.inputs[0].producer()
        if is_op(quantize, "Clip") and quantize is not None and quantize.inputs[0] is not None:
            quantize = quantize.inputs[0].producer()
        if pair is None or quantize is None or not is_op(quantize, "QuantizeLinear"):
            continue
        if is_constant(quantize.inputs[0]):
            pairs, readers, axes = found.setdefault(quantize, ([], [], set()))
            pairs.extend([pair] if pair not in pairs else [])
            readers.append(node)
            axes.add(_output_axis(node))
    return [_checked(quantize, *parts) for quantize, parts in found.items()]


def chosen_weights(graph: ir.Graph, patterns: Sequence[str], step: str) -> list[QuantizedWeight]:
    """Return the quantized weights whose readers match one of the patterns, or all without patterns.

    Raise RecipeError for a pattern that matches no layer; `step` is the name of the pass.
    """
    weights = find_weights(graph)
    names = {id(w): [layer_name(node) for node in w.readers] for w in weights}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for w in weights for name in names[id(w)]):
            raise RecipeError(
                f"{step}.layers: {pattern!r} matches no layer with quantized weights",
                where=step,
                hint="patterns are those of a shell: `*`, `?`",
            )
    return [w for w in weights if any(fnmatchcase(name, p) for p in patterns or ("*",) for name in names[id(w)])]


def _output_axis(node: ir.Node) -> int:
    if is_op(node, "Gemm"):
        return 0 if "transB" in node.attributes and node.attributes["transB"].as_int() == 1 else 1
    return 0 if is_op(node, "Conv") else 1


def _checked(quantize: ir.Node, pairs: list[ir.Node], readers: list[ir.Node], axes: set[int]) -> QuantizedWeight:
    where = layer_name(readers[0])
    scale, zero = quantize.inputs[1:3]
    if not is_constant(scale) or not is_constant(zero) or scale is None or zero is None:
        raise PassError("the scale of a weight is not constant", where=where)
    axis = quantize.attributes["axis"].as_int() if "axis" in quantize.attributes else 1
    axis %= len(shape_of(quantize.inputs[0]))
    if len(axes) > 1 or (tensor_of(scale).size > 1 and axes != {axis}):
        raise PassError(
            "a weight's scales do not belong to the outputs of all layers that read it",
            where=where,
            hint="give each layer a quantizer of its own: Site(weight, layer), as choose_scales does",
        )
    if numpy_of(zero).any():
        raise PassError(
            "a weight has a zero point that is not 0", where=where, hint="weights are rounded on symmetric grids only"
        )
    low, high = grid_ends(quantize)
    if low >= 0:
        raise PassError(f"a weight's grid runs from {low} to {high}", where=where, hint="choose a signed format")
    # Without a Clip the storage type ends the grid, and its lowest integer has no counterpart: it is not used.
    fmt = Format((high + 1).bit_length(), signed=True, symmetric=clip_behind(quantize) is None or low == -high)
    return QuantizedWeight(quantize, tuple(pairs), tuple(readers), axes.pop(), fmt)


def grid_of(planned: str, weight: QuantizedWeight, plan: Plan) -> Grid:
    """Return the grid of a weight: the graph has the widest row's, the plan, under the name `planned`, all rows'.

    A codebook is in the plan alone.
    """
    quantizer = plan.of(planned, weight.name)
    return weight.format if quantizer is None or quantizer.uniform else quantizer.grid


def replace_weight(
    program: Program, weight: QuantizedWeight, rows: Floats, scale: Floats, folder: Path, by: str
) -> None:
    """Replace a weight by grid points, s q as `[outputs, inputs]`, and its scales in the graph.

    Other readers of the constant keep the old one. A large constant is appended to the stored weights.
    """
    old = weight.value
    shape = shape_of(old).numpy()
    turned = (shape[weight.axis], *(n for i, n in enumerate(shape) if i != weight.axis))
    array = np.ascontiguousarray(np.moveaxis(rows.reshape(turned), 0, weight.axis), dtype=np.float32)
    if [u.node for u in old.uses()] == [weight.quantize] and not old.is_graph_output():
        old.const_value = store.kept(array, name_of(old), folder)
    else:
        name = Names(program.graph).unique(f"{name_of(old)}_rounded")
        weight.quantize.replace_input_with(0, initializer(program.graph, name, store.kept(array, name, folder)))
    if np.array_equal(scale, weight.scale()):
        return
    _, value = inputs(weight.quantize, 2)
    if not {*consumers(value)} <= {weight.quantize, *weight.dequantizers}:
        raise PassError(f"the scale {name_of(value)} belongs to other quantizers too", where=weight.name, hint=by)
    value.const_value = ir.tensor(scale.reshape(shape_of(value).numpy()), name=name_of(value))


def reading_directly(model: ir.Model, rounded: Collection[str]) -> ir.Model:
    """Return a clone whose layers read grid points without quantizing them: a session need not hold them twice.

    `rounded` names the constants that are grid points.
    """
    clone = model.clone()
    for weight in find_weights(clone.graph):
        if name_of(weight.value) in rounded:
            for pair in weight.dequantizers:
                pair.outputs[0].replace_all_uses_with(weight.value)
    return clone


def with_grids(plan: Plan, changed: Mapping[str, tuple[QuantizedWeight, str, Floats, Grid]], by: str) -> Plan:
    """Return the plan with new scales and levels of weights.

    `changed` has, for each layer's name, (weight, its name in the plan, scales, grid).
    """
    quantizers: dict[Site, Quantizer] = dict(plan.quantizers)
    for layer, (weight, value, scale, grid) in changed.items():
        site = Site(value, layer) if Site(value, layer) in quantizers else Site(value)
        if site not in quantizers:
            raise PassError(f"the plan has no quantizer for the weight {value!r}", where=weight.name)
        old, levels = quantizers[site], grid.table if isinstance(grid, Levels) else None
        quantizers[site] = replace(old, scale=scale.reshape(old.scale.shape), by=by, levels=levels)
    return replace(plan, quantizers=quantizers)
