"""The scales and zero points of one unit, learned against the unit's outputs in the float graph (LSQ).

LSQ (arXiv 1902.08153) lets the gradient reach a scale through rounding: round(v) - v inside of the grid, and its end
outside (compiler/torch_graph/quantizers.py). The loss of a batch, of one network call, is

    sum over outputs |f(x; s, z) - f|^2 / |f|^2,

with f the float output. Adam trains the offsets of compiler/training/learned_scales.py; its steps have the size of the
learning rate for a gradient of any size, so a step moves the ends of every grid by the same share. The learning rate
falls to 0 as half a cosine.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch.func import functional_call

from mezzotint.runtime import streams
from mezzotint.runtime.bundle.training import TrainedUnit
from mezzotint.runtime.signature import Signature, Timestep

from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import is_op, name_of
from ..rounding.layer_inputs import Latents
from ..torch_graph.convert import TorchGraph, to_torch
from ..torch_graph.quantizers import Quantizer
from ..torch_graph.write_back import plan_grids, write_back
from .block_data import Batch, BlockData, record
from .fit_rounding import Annealing, Batches, curve_of
from .learned_scales import LearnedScales, RowNetworks, learned_grids
from .range_networks import RangeNetworks
from .subgraph import Subgraph, cut_out
from .torch_threads import torch_threads
from .units import GraphUnit


@dataclass(frozen=True)
class ScaleForm:
    """What of a grid is learned: zero points too, and tables as networks of the timestep or row by row."""

    zero_points: bool = True
    networks: bool = False


class _LearnedBatches(Batches):
    """Batches of a module with learned scales in the places of its own."""

    def __init__(
        self,
        graph: TorchGraph,
        part: Subgraph,
        signature: Signature,
        data: BlockData,
        schedule: Annealing,
        learned: LearnedScales,
        row_of: Mapping[Timestep, int],
    ) -> None:
        super().__init__(graph, part, signature, data, schedule, 0)  # nothing is dropped
        self._learned, self._row_of = learned, row_of

    def _run(self, batch: Batch, arguments: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        scales = self._learned.of_row(self._row_of.get(batch.timestep))
        outputs: Sequence[torch.Tensor] = functional_call(self._graph.module, scales, tuple(arguments))
        return outputs


def learn_scales_of_unit(
    program: Program,
    context: Context,
    unit: GraphUnit,
    names: Sequence[str],
    latents: Sequence[Latents],
    schedule: Annealing,
    form: ScaleForm,
    by: str,
    step: Callable[[], None],
) -> tuple[Program, TrainedUnit]:
    """Train the quantizers of these names in a unit; return the program, with the new scales if better, and the fit.

    `step` is called after each batch of the data and each iteration. Raise PassError for a loss that is not finite.
    """
    floats = {name_of(v) for node in program.require_float_model().graph for v in node.outputs}
    part = cut_out(program.model, unit.computed, program.signature, floats, unit.name)
    groups = program.require_plan().groups
    row_of = dict(zip(program.deployment.timesteps, groups, strict=True)) if groups else {}
    data = record(program, context, part, latents, unit.name, step)
    try:
        with torch_threads(context.threads):
            graph = to_torch(part.model)
            plan_grids(program, graph)
            graph.module.requires_grad_(False)  # only the offsets are trained
            grids = learned_grids(graph, names, rounded_weights(part.model.graph, graph, names), form.zero_points)
            networks = _networks(program, context) if form.networks else None
            seen = {row_of[call.timestep] for call in latents if call.timestep in row_of}
            learned = LearnedScales(grids, max(groups, default=-1) + 1, seen, networks)
            batches = Batches(graph, part, program.signature, data, schedule, 0)
            start, _ = batches.mean_errors()
            losses: list[float] = []
            if start > 0:  # else the unit computes what the float graph does
                moving = _LearnedBatches(graph, part, program.signature, data, schedule, learned, row_of)
                losses = _fit(moving, learned, schedule, start, context.seed, unit.name, by, step)
                learned.settle()
            end = batches.mean_errors()[0] if start > 0 else 0.0
    finally:
        data.close()
    fit = TrainedUnit(unit.name, by, start, end, end, curve_of(losses) if losses else ())
    return (program if end >= start else write_back(program, graph, context.folder, by)), fit


def _fit(
    batches: Batches,
    learned: LearnedScales,
    schedule: Annealing,
    start: float,
    seed: int,
    unit: str,
    by: str,
    step: Callable[[], None],
) -> list[float]:
    """Train the scales; return the losses relative to that of the start."""
    optimizer = torch.optim.Adam(learned.parameter_groups(schedule.learning_rate))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.iterations)
    rng = streams.TRAINING_BATCHES.generator(seed, zlib.crc32(unit.encode()))
    losses = []
    for iteration in range(schedule.iterations):
        loss = batches.loss(rng) / start
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise PassError(
                f"the loss is {losses[-1]} at iteration {iteration}",
                where=unit,
                hint=f"lower {by}.learning_rate, or leave this unit out ({by}.units)",
            )
        optimizer.zero_grad()  # the rows of other calls have no gradient, and Adam leaves them as they are
        loss.backward()
        optimizer.step()
        falling.step()
        step()
    return losses


def _networks(program: Program, context: Context) -> RowNetworks:
    """Return what makes networks of the timesteps of the tables' rows: a row of several calls has their mean."""
    groups, timesteps = program.require_plan().groups, program.deployment.timesteps
    rows = [[t for t, group in zip(timesteps, groups, strict=True) if group == row] for row in range(max(groups) + 1)]
    means = [float(np.mean(row)) for row in rows]
    span = float(program.schedule.num_train_timesteps)
    return lambda quantizers: RangeNetworks(quantizers, means, span, context.seed)


def rounded_weights(model: ir.Graph, graph: TorchGraph, names: Sequence[str]) -> dict[str, str]:
    """Return the constants that are on their grids already, by the names of their quantizers.

    They were rounded against their inputs, and keep their integers.
    """
    found = {}
    for node in model:
        name = node.name or ""
        quantizer = graph.quantizers.get(name)
        value = node.inputs[0] if node.inputs else None
        if not is_op(node, "QuantizeLinear") or name not in names or value is None:
            continue
        weight = graph.weights.get(value.name or "")
        if weight is not None and isinstance(quantizer, Quantizer):
            if torch.allclose(quantizer(weight), weight, rtol=1e-5, atol=0):
                found[name] = name_of(value)
    return found
