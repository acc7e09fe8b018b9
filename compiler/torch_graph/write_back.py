"""What was trained returns to the program: weights as grid points, scales, zero points, the plan and the tables.

    float weights       every trained constant that no quantizer reads
    quantized weights   s q: its QuantizeLinear computes exactly the integers q of the torch module
    quantizers          the constants of the graph, rows of tables included, and the plan's entry of each

A weight whose scale left no room for its layer's bias in int32 gets a larger one, as insert_qdq does
(compiler/lowering/bias_room.py), and is rounded on the coarser grid; only nearly dead channels need that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from mezzotint.runtime.arrays import Floats

from ..core.formats import Levels, along, ends
from ..core.program import Plan, Program, Site
from ..core.program import Quantizer as Planned
from ..errors import PassError
from ..graph import weight_store as store
from ..graph.nodes import Names, consumers, initializer, is_constant, is_op, name_of, numpy_of
from ..graph.ops import layer_of, transposed_layer
from ..graph.require import inputs
from ..lowering.bias_room import make_room
from ..lowering.qdq import quantizer_chain
from ..scales.timetable import table_part
from .convert import TorchGraph
from .quantizers import Quantizer
from .soft_rounding import SoftRounding, quantizer_within

_Array = npt.NDArray[Any]


def plan_grids(program: Program, graph: TorchGraph) -> None:
    """Give each module the grid of the plan, which is narrower than that of the graph's nodes for weights.

    A weight has a symmetric grid, rows with widths of their own, or a codebook of levels. Call it before training.
    """
    plan = program.require_plan()
    for node, sites in _sites(program, program.graph).items():
        part = graph.quantizers.get(node.name or "")
        if isinstance(part, Quantizer):
            site, planned = next((site, plan.quantizers[site]) for site in sites.values())
            if planned.vectors is not None:
                raise PassError("vectors of a codebook are not trained", where=str(site), hint="train with levels")
            if planned.levels is not None:
                part.use_levels(planned.levels)
                continue
            grid = planned.grid
            part.qmin = torch.as_tensor(grid.qmin, dtype=part.qmin.dtype, device=part.qmin.device)
            part.qmax = torch.as_tensor(grid.qmax, dtype=part.qmax.dtype, device=part.qmax.device)


def write_back(program: Program, graph: TorchGraph, folder: Path, by: str) -> Program:
    """Return the program with the parameters of a torch module of its graph; `by` is the name of the pass.

    What did not change stays as it is. `graph.quantizers` may hold a SoftRounding in the place of a weight's quantizer:
    its hard weights are written. Raises PassError for values that are not finite or not on the plan's grid, for a scale
    that other nodes read too, and for a bias that fits into int32 at no scale.
    """
    model = program.model.clone()
    writer = _Writer(program, model, graph, folder)
    writer.write_floats()
    writer.write_parameters()
    raised = writer.make_room()
    writer.write_weights()
    note = f"{raised} weights have larger scales, so that their biases fit into int32" if raised else ""
    return replace(program.with_model(model, note), plan=writer.plan(by))


class _Writer:
    """The graph that is written, and the module of each of its quantizers."""

    def __init__(self, program: Program, model: ir.Model, graph: TorchGraph, folder: Path) -> None:
        self.program, self.graph, self.trained, self.folder = program, model.graph, graph, folder
        quantizers = [node for node in self.graph if is_op(node, "QuantizeLinear")]
        self.modules = {n: graph.quantizers[n.name] for n in quantizers if n.name and n.name in graph.quantizers}
        if unknown := set(graph.quantizers) - {node.name for node in self.modules}:
            raise PassError(
                f"the graph has no QuantizeLinear {min(unknown)!r}",
                hint="write back into the program whose graph was converted",
            )
        self.before = {node: _parameters(node) for node in quantizers}
        self.of_layer = {
            layer: self.modules[node]
            for node, names in _constant_quantizers(self.graph).items()
            for layer in names
            if node in self.modules
        }
        self.copied: dict[ir.Value, str] = {}  # a weight for quantizers only, and the name of the trained one

    def write_floats(self) -> None:
        """Write the weights that other nodes than quantizers read."""
        for name, weight in self.trained.weights.items():
            value = self.graph.initializers.get(name)
            if value is None:
                raise PassError(f"the graph has no constant {name!r}", hint="write back into the graph of the module")
            quantizers = [node for node in consumers(value) if is_op(node, "QuantizeLinear")]
            if len(quantizers) == len(consumers(value)) and not value.is_graph_output():
                continue
            old = numpy_of(value)
            array = np.ascontiguousarray(_array(weight, name).astype(old.dtype))
            if np.array_equal(array, old):
                continue
            if quantizers:  # they get grid points, and the other readers the weight itself
                copy = self._constant(f"{name}_quantized", old)
                self.copied[copy] = name
                for node in quantizers:
                    node.replace_input_with(0, copy)
            value.const_value = store.kept(array, name, self.folder)

    def write_parameters(self) -> None:
        """Write scales and zero points, into constants and into columns of tables."""
        new: dict[ir.Value, _Array] = {}
        written: dict[tuple[ir.Value, int | None], _Array] = {}
        for node, quantize in self._pairs():
            quantizer = quantizer_within(self.modules[quantize])
            trained = (quantizer.scales(), quantizer.zero_points())
            for parameter, tensor, old in zip(inputs(node, 3)[1:], trained, _parameters(node), strict=True):
                holder, columns, _ = table_part(parameter)
                array = _array(tensor, name_of(parameter)).astype(old.dtype).reshape(old.shape)
                if not np.array_equal(written.setdefault((holder, columns.start), array), array):
                    raise PassError(
                        f"quantizers that share {name_of(parameter)!r} were trained apart",
                        where=node.name,
                        hint="train one module for all of them",
                    )
                if np.array_equal(array, old):
                    continue
                self._check_readers(parameter)
                if holder is parameter:
                    new[holder] = array
                else:
                    new.setdefault(holder, numpy_of(holder).copy())[:, columns] = array
        for holder, array in new.items():
            holder.const_value = store.kept(array, name_of(holder), self.folder)

    def _pairs(self) -> Iterator[tuple[ir.Node, ir.Node]]:
        """Yield each trained QuantizeLinear and each DequantizeLinear behind one, with the QuantizeLinear.

        A DequantizeLinear that moved behind other nodes has constants of its own.
        """
        for node in self.graph:
            quantize = _quantize_of(node.outputs[0]) if is_op(node, "QuantizeLinear", "DequantizeLinear") else None
            if quantize is not None and quantize in self.modules:
                yield node, quantize

    def _check_readers(self, parameter: ir.Value) -> None:
        """Raise PassError where a node that was not trained reads a scale or a zero point that changes."""
        for node in consumers(parameter):
            if _quantize_of(node.outputs[0]) not in self.modules:
                raise PassError(
                    f"{name_of(parameter)!r} belongs to other quantizers too",
                    where=f"{node.op_type} {node.name!r}",
                    hint="train all quantizers that share it, or none",
                )

    def make_room(self) -> int:
        """Raise the scales of weights until all biases fit into int32; return the number of raised ones."""
        room = make_room(self.program, self.graph)
        for layer, reason in room.refused.items():
            raise PassError(reason, where=layer, hint="train with smaller steps, or keep the layer in float")
        return len(room.raised)

    def write_weights(self) -> None:
        """Replace each trained weight behind a quantizer by grid points."""
        sites = _sites(self.program, self.graph)
        for node, names in _constant_quantizers(self.graph).items():
            part = self.modules.get(node) or next(
                (self.of_layer[name] for name in names if name in self.of_layer), None
            )
            if part is None:
                continue
            value = inputs(node, 1)[0]
            old, array = numpy_of(value), self._grid_points(node, part, sites.get(node, {}))
            if np.array_equal(array, old):
                continue
            if {use.node for use in value.uses()} == {node} and not value.is_graph_output():
                value.const_value = store.kept(array, name_of(value), self.folder)
            else:
                node.replace_input_with(0, self._constant(f"{name_of(value)}_trained", array))
                if not value.uses() and not value.is_graph_output():
                    del self.graph.initializers[name_of(value)]

    def _grid_points(self, node: ir.Node, part: torch.nn.Module, sites: dict[Site, Site]) -> Floats:
        """Return a weight on the grid of the written scale. An untrained weight with its old scale stays."""
        value, quantizer = inputs(node, 1)[0], quantizer_within(part)
        old, (scale, zero) = numpy_of(value), _parameters(node)
        name = self.copied.get(value, name_of(value))
        if isinstance(part, SoftRounding):
            trained = _array(part.hard(), name)
        else:
            trained = _array(self.trained.weights[name], name) if name in self.trained.weights else old
        before = self.before.get(node) if quantizer.levels is None else None
        if before is not None and all(map(np.array_equal, (trained, scale, zero), (old, *before))):
            return old
        axis, rank = quantizer.axis, old.ndim
        s, z = along(scale, axis, rank), along(zero.astype(np.float32), axis, rank)
        low, high = (along(_array(end, name), axis, rank) for end in (quantizer.qmin, quantizer.qmax))
        if (levels := quantizer.levels_at(scale)) is not None:
            q = Levels(levels).nearest(trained / s, axis)
        else:
            q = np.clip(np.rint(trained / s) + z, low, high)
        for site in sites.values():
            planned = self.program.require_plan().quantizers[site]
            lowest, highest = ends(planned.grid, axis, rank)
            uniform = planned.levels is not None and levels is None
            if uniform or (levels is None and (np.any(q < lowest) or np.any(q > highest))):
                raise PassError(
                    "a trained weight is not on the grid of the plan", where=str(site), hint="call plan_grids first"
                )
        points: Floats = np.ascontiguousarray(((q - z) * s).astype(np.float32))
        return points

    def plan(self, by: str) -> Plan:
        """Return the plan with the scales and zero points of the written graph."""
        plan = self.program.require_plan()
        quantizers, changed = dict(plan.quantizers), dict[Site, Planned]()
        for node, sites in _sites(self.program, self.graph).items():
            scale, zero = _parameters(node)
            for own, site in sites.items():
                old = plan.quantizers[site]
                new = replace(
                    old,
                    scale=scale.reshape(old.scale.shape).astype(np.float32),
                    zero_point=zero.reshape(old.zero_point.shape).astype(old.zero_point.dtype),
                    by=by,
                )
                if old.levels is not None and node in self.modules:
                    new = replace(new, levels=quantizer_within(self.modules[node]).levels_at(scale))
                if _same(old, new):
                    continue
                # Layers that shared a quantizer have different ones where room was made for the bias of one.
                first = changed.setdefault(site, new)
                quantizers[site if _same(first, new) else own] = new
        return replace(plan, quantizers=quantizers)

    def _constant(self, preferred: str, array: _Array) -> ir.Value:
        name = Names(self.graph).unique(preferred)
        return initializer(self.graph, name, store.kept(array, name, self.folder))


def _sites(program: Program, graph: ir.Graph) -> dict[ir.Node, dict[Site, Site]]:
    """Return the sites that each QuantizeLinear quantizes: of one layer's view, and as the plan has it."""
    plan = program.require_plan()
    by_name = {node.name: node for node in graph if node.name}
    found: dict[ir.Node, dict[Site, Site]] = defaultdict(dict)
    every = (layer_of(node) or transposed_layer(node) for node in program.require_float_model().graph)
    for layer in (layer for layer in every if layer is not None):
        node = by_name.get(layer.node.name or "")
        only_weight = is_op(layer.node, "ConvTranspose")
        if node is None or (layer.name in plan.islands and not only_weight):
            continue
        pairs = [(layer.node.inputs[k], _quantize_of(node.inputs[k])) for k in ((1,) if only_weight else (0, 1))]
        if layer.output_quantized and not only_weight:
            readers = consumers(node.outputs[0])
            pairs += [(layer.output, reader) for reader in readers if is_op(reader, "QuantizeLinear")]
        for value, quantize in pairs:
            if value is not None and quantize is not None:
                own = Site(name_of(value), layer.name)
                site = own if own in plan.quantizers else Site(own.value)
                if site in plan.quantizers:
                    found[quantize][own] = site
    return found


def _quantize_of(value: ir.Value | None) -> ir.Node | None:
    """Return the QuantizeLinear whose grid a value is on, or None."""
    chain = quantizer_chain(value)
    return chain[-1] if chain else None


def _constant_quantizers(graph: ir.Graph) -> dict[ir.Node, list[str]]:
    """Return the QuantizeLinear nodes of constants, each with the names of the layers that read it."""
    found: dict[ir.Node, list[str]] = {
        node: [] for node in graph if is_op(node, "QuantizeLinear") and is_constant(node.inputs[0])
    }
    for node in graph:
        if is_op(node, "Conv", "Gemm", "MatMul"):
            for value in node.inputs[:2]:
                if (quantize := _quantize_of(value)) in found and quantize is not None:
                    found[quantize].append(node.name or name_of(node.outputs[0]))
    return found


def _parameters(node: ir.Node) -> tuple[_Array, _Array]:
    """Return scale and zero point of a QuantizeLinear: the constants, or their columns of tables."""
    (scale, columns, _), (zero, places, _) = (table_part(parameter) for parameter in inputs(node, 3)[1:])
    tables = numpy_of(scale), numpy_of(zero)
    return (
        tables[0] if columns == slice(None) and tables[0].ndim < 2 else tables[0][:, columns],
        tables[1] if places == slice(None) and tables[1].ndim < 2 else tables[1][:, places],
    )


def _same(a: Planned, b: Planned) -> bool:
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in ("scale", "zero_point", "levels"))


def _array(tensor: torch.Tensor, name: str) -> _Array:
    array: _Array = tensor.detach().cpu().numpy()
    if not np.isfinite(array).all():
        raise PassError(f"{name!r} is not finite after training", hint="train with smaller steps")
    return array
