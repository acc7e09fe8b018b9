"""insert_qdq: write the plan into the graph as QuantizeLinear (Q) and DequantizeLinear (DQ) nodes.

Each layer that is not an island is rewritten by its kind:

1. linear and attention layers:

       x -> Q -> DQ -> layer(., w -> Q -> DQ, bias)

2. convolutions, whose output is quantized as well, except for the lowering `constant`:

       x -> Q -> DQ -> Conv(., w -> Q -> DQ, bias) -> Q -> DQ -> all readers

3. A value whose readers use one quantizer gets one Q/DQ pair, shared by all of them. A reader of a convolution's output
   that uses the quantizer of case 2 needs no pair of its own.
4. Formats of fewer than 8 bits are simulated on the 8-bit kernels: a Clip behind Q keeps the integers inside the
   narrower grid.
5. Weights whose rows have different widths (assign_bits): a Clip has the same ends for all rows, so Q reads a copy of
   the weight that is clipped at the ends of each row's grid. Of weights with a codebook (choose_levels) it reads a copy
   on the levels, because QuantizeLinear knows the int8 grid alone.
6. Weights alone (activations in float): no pair but that of the weight. The file stores integers, the kernel is float.

onnxruntime has an integer convolution only if the output is quantized with one quantizer and nothing reads the raw
output. So all readers in case 2, those in float too, read behind the same DQ. Matmuls accumulate in int32 and return
float, so their outputs are not quantized.

7. Transposed convolutions that are no islands: the weight alone, as in case 6. The lowering writes it without a
   DequantizeLinear, so that the kernel is as fast as before (compiler/lowering/float_islands.py).

The plan's list of islands gets every layer that stays in float, with the reason: the roles and patterns of `islands`
(compiler/core/islands.py), the islands that the plan already has (assign_bits), layers without a quantizer in the plan,
and operators without an integer kernel. A role that no layer has is a warning of the compilation.

A bias that would not fit into int32 raises the scale of its weight, or, where that costs too much, keeps the layer in
float (compiler/lowering/bias_room.py).

Errors: RecipeError if the lowering cannot express the plan's tables, and for a weight of 1 bit without levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.formats import Levels, Vectors, along, ends
from mezzotint.compiler.core.islands import Islands
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Plan, Program, Quantizer
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.elementwise import make_scalars
from mezzotint.compiler.graph.nodes import (
    Builder,
    Names,
    consumers,
    initializer,
    is_constant,
    name_of,
    numpy_of,
    replace_use,
)
from mezzotint.compiler.graph.ops import Layer, float_reason, layers, time_table, transposed_layer
from mezzotint.compiler.graph.require import required
from mezzotint.compiler.lowering.bias_room import Room, make_room
from mezzotint.compiler.lowering.limits import check_passes, check_tables, check_widths, lowering_for
from mezzotint.compiler.lowering.quantizer_nodes import pair_nodes, table_rows
from mezzotint.compiler.scales.timetable import deployed_rows
from mezzotint.compiler.scales.weights import rounded_weight
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.targets import Target

NAME_THEM = "name the layers that are to stay in float: --set insert_qdq.islands='[first, NAME]'"


@dataclass(frozen=True)
class InsertQdq(Pass):
    """The quantized graph: which layers stay in float, and the form for the target.

    - `islands`: roles, or patterns of node names (as in a shell: `*`, `?`), of the layers that stay in float.
    - `lowering`: the form of the quantized graph for its target. `qdq` is static, for onnxruntime. `integer` writes
      onnxruntime's integer operations, with scales and biases gathered from tables. `constant` is for other engines:
      quantizers on inputs only, with constant scales and zero points; float Muls around them carry the timestep.
      `--target` chooses it.
    """

    islands: tuple[str, ...] = ("first", "last")
    lowering: Literal["qdq", "integer", "constant"] = "qdq"  # Lowering, spelled out for the list of options

    needs: ClassVar[frozenset[str]] = frozenset({"plan"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def run(self, program: Program, context: Context) -> Program:
        plan = program.require_plan()
        every_layer = list(layers(program.graph))
        transposed = _transposed(program.graph)
        islands = Islands(program, [*every_layer, *transposed], self.islands, self.name)
        reasons = {n.name or name_of(n.outputs[0]): r for n in program.graph if (r := float_reason(n))}
        stored: set[str] = set()
        for layer in transposed:  # case 7
            if (reason := islands.reason(layer)) is not None:
                reasons[layer.name] = reason
            elif plan.of(name_of(layer.weight), layer.name) is not None:
                reasons[layer.name] += "; its weights have 8 bits"
                stored.add(layer.name)
        for layer in every_layer:
            reason = islands.reason(layer) or plan.islands.get(layer.name)
            if reason is None and not _planned(layer, plan, self.inputs_only):
                reason = "the plan has no quantizer for it"
            if reason is not None:
                reasons[layer.name] = reason
        self._check_lowering(every_layer, plan)
        if self.inputs_only:
            kept = reasons.keys() - stored
            weights_alone = [replace(layer, activations=()) for layer in transposed]
            plan = plan.read_by(layer for layer in (*every_layer, *weights_alone) if layer.name not in kept)
        float_model = program.model.clone()
        writer, room = self._write(program, plan, set(reasons), stored, context)
        while room.refused:  # each round keeps more layers in float
            reasons |= room.refused
            program = program.with_model(float_model.clone())
            writer, room = self._write(program, plan, set(reasons), stored, context)
        quantized = sum(layer.name not in reasons for layer in every_layer)
        note = f"{quantized} layers quantized, {len(reasons)} kept in float"
        if room.raised:
            note += f"; {len(room.raised)} weights have larger scales, so that their biases fit into int32"
        if islands.unmatched:
            missing = f"{self.name}: no layer has the role {', '.join(map(repr, islands.unmatched))}"
            program = replace(program, warnings=(*program.warnings, f"{missing}; {NAME_THEM}"))
        plan = room.raise_scales(plan, every_layer)
        frozen = deployed_rows(program) if writer.has_tables else program.frozen
        return replace(
            program,
            plan=replace(plan, islands=reasons),
            float_model=float_model,
            frozen=frozen,
            lowering=self.lowering,
            note=note,
        )

    def _write(
        self, program: Program, plan: Plan, kept: set[str], stored: set[str], context: Context
    ) -> tuple[_Writer, Room]:
        """Write the quantizers of all layers that are not `kept` in float, and make room for their biases.

        `stored` are the transposed convolutions of case 7.
        """
        writer = _Writer(program, plan, context.folder, inputs_only=self.inputs_only)
        for layer in list(layers(program.graph)):
            if layer.name not in kept:
                writer.quantize(layer)
        for layer in _transposed(program.graph):
            if layer.name in stored:
                writer.quantize_weight(layer)
        writer.drop_unread()
        make_scalars(program.graph)
        room = Room({}, {}) if self.inputs_only else make_room(program, program.graph)
        return writer, room

    @property
    def inputs_only(self) -> bool:
        """Return whether the outputs of convolutions, and biases, stay in float."""
        return self.lowering == "constant"

    def for_target(self, target: Target, passes: Sequence[Pass]) -> InsertQdq:
        """Return this pass with the lowering of a target. Raise RecipeError where the recipe has none for it."""
        before = {step.name: step.options() for step in passes[: list(passes).index(self)]}
        return replace(self, lowering=lowering_for(target, self.lowering, before, self.name))

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        before = passes[: list(passes).index(self)]
        check_passes(self.lowering, {step.name: step.options() for step in before}, self.name)

    def _check_lowering(self, every_layer: list[Layer], plan: Plan) -> None:
        """Raise RecipeError if the lowering cannot express the plan's tables, or a weight of 1 bit has no levels.

        With `qdq` a convolution with a table would stay in float without a warning.
        """
        check_widths(plan, self.name)
        tables = [q for q in plan.quantizers.values() if q.table]
        check_tables(
            self.lowering,
            scales=bool(tables),
            biases=any(layer.bias is not None and time_table(layer.bias) is not None for layer in every_layer),
            channels=any(q.axis is not None for q in tables),
            zero_points=any(np.ptp(q.zero_point) for q in tables),
            where=self.name,
        )


def _transposed(graph: ir.Graph) -> list[Layer]:
    return [layer for node in graph if (layer := transposed_layer(node)) is not None]


def _planned(layer: Layer, plan: Plan, inputs_only: bool) -> bool:
    """Return whether the plan quantizes all that an integer layer needs, or the weight alone (case 6)."""
    values = [*layer.activations, *([layer.output] if layer.output_quantized and not inputs_only else [])]
    known = [plan.of(name_of(value), layer.name) is not None for value in values]
    if layer.weight is not None and plan.of(name_of(layer.weight), layer.name) is None:
        return False
    return all(known) or (layer.weight is not None and not any(known))


class _Writer:
    """A writer of Q/DQ pairs; readers of one value with one quantizer share its pair."""

    def __init__(self, program: Program, plan: Plan, folder: Path, *, inputs_only: bool) -> None:
        self.graph, self.plan, self.names, self.folder = program.graph, plan, Names(program.graph), folder
        self._cut: list[ir.Value] = []
        self._inputs_only = inputs_only
        tables = [q for q in plan.quantizers.values() if q.table]
        self.has_tables = bool(tables)
        self._start = self.graph[
            0
        ]  # lookups of tables go in front of it; pairs of graph inputs too, behind the lookups
        self._rows = table_rows(program, self.names, tables) if tables else {}
        self._pairs: dict[tuple[ir.Value, int], ir.Value] = {}
        self._outputs: dict[ir.Value, tuple[ir.Value, Quantizer]] = {}

    def quantize(self, layer: Layer) -> None:
        weight_only = self.plan.of(name_of(layer.activations[0]), layer.name) is None  # case 6
        for value in () if weight_only else layer.activations:
            self._quantize_input(value, layer)
        self.quantize_weight(layer)
        if layer.output_quantized and not weight_only and not self._inputs_only:  # case 2
            self._quantize_output(layer.output, layer)

    def quantize_weight(self, layer: Layer) -> None:
        if layer.weight is not None:
            self._quantize_input(layer.weight, layer)

    def _quantizer(self, value: ir.Value, layer: Layer) -> Quantizer:
        return required(self.plan.of(name_of(value), layer.name), f"the quantizer of {name_of(value)!r}", layer.node)

    def _quantize_input(self, value: ir.Value, layer: Layer) -> None:
        quantizer = self._quantizer(value, layer)
        source, present = self._outputs.get(value, (value, None))
        if present is not quantizer:  # case 3: a convolution's output that already has this quantizer needs no more
            replace_use(layer.node, source, self._pair(source, quantizer, layer.node))

    def _quantize_output(self, value: ir.Value, layer: Layer) -> None:
        quantizer = self._quantizer(value, layer)
        readers = consumers(value)
        graph_output = value.is_graph_output()
        dequantized = self._pair(value, quantizer, layer.node)
        for node in readers:
            replace_use(node, value, dequantized)
        if graph_output:
            name = name_of(value)
            value.name = self.names.unique(f"{name}_raw")
            self.graph.outputs[list(self.graph.outputs).index(value)] = dequantized
            dequantized.name = name
        self._outputs[value] = (dequantized, quantizer)

    def _pair(self, value: ir.Value, quantizer: Quantizer, reader: ir.Node) -> ir.Value:
        """Return the dequantized view of a value, behind its producer (for a constant: before its first reader)."""
        key = (value, id(quantizer))
        if key not in self._pairs:
            producer = value.producer()
            if producer is not None:
                build = Builder(self.graph, self.names, after=producer)
            else:
                first = self._start if value.is_graph_input() else reader
                scope = "" if value.is_graph_input() else None  # several readers share it: it is in no module's scope
                build = Builder(self.graph, self.names, before=first, scope=scope)
            self._pairs[key] = self._write_pair(build, value, quantizer)
        return self._pairs[key]

    def _write_pair(self, build: Builder, value: ir.Value, quantizer: Quantizer) -> ir.Value:
        stem = name_of(value)
        if quantizer.table:
            scale, zero = self._rows[id(quantizer)]
        else:
            scale = build.constant(f"{stem}_scale", quantizer.scale)
            zero = build.constant(f"{stem}_zero_point", quantizer.zero_point)
        if not quantizer.uniform:  # case 5
            value = self._cut_off(value, quantizer)
        return pair_nodes(build, value, quantizer, scale, zero)

    def _cut_off(self, value: ir.Value, quantizer: Quantizer) -> ir.Value:
        """Return a copy of a weight on its levels, or inside each row's grid; large ones go to the weight store."""
        if not is_constant(value) or quantizer.axis is None:
            raise PassError(
                "only the output channels of a weight have widths of their own, and only weights a codebook",
                where=name_of(value),
                hint="leave row_bits and levels out of the quantizers of activations",
            )
        array = numpy_of(value)
        scale = along(quantizer.scale, quantizer.axis, array.ndim)
        if isinstance(quantizer.grid, Levels | Vectors):
            array = rounded_weight(array, quantizer)
        else:
            low, high = ends(quantizer.grid, quantizer.axis, array.ndim)
            array = np.clip(array, low * scale, high * scale)
        name = self.names.unique(f"{name_of(value)}_rows")
        self._cut.append(value)
        return initializer(self.graph, name, store.kept(array, name, self.folder))

    def drop_unread(self) -> None:
        """Remove the weights that only their clipped copies replaced (case 5)."""
        for value in self._cut:
            if not value.uses() and not value.is_graph_output():
                self.graph.initializers.pop(name_of(value), None)
