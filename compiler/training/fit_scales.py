"""The scales, zero points and weights of one unit, learned against the unit's outputs in the float graph (LSQ).

LSQ (arXiv 1902.08153) lets the gradient reach a scale through rounding: round(v) - v inside of the grid, and its end
outside (compiler/torch_graph/quantizers.py). The loss of a batch, of one network call, is

    sum over outputs |f(x; s, z) - f|^2 / |f|^2  +  inner sum over layers inside of the same,

with f the float output. Adam trains the offsets of compiler/training/learned_scales.py, and those of moving_weights.py
where weights move too; its steps have the size of the learning rate for a gradient of any size, so a step moves the
ends of every grid by the same share. The learning rates fall to 0 as half a cosine.

With `mixed` a step takes samples of several calls, so that it moves several rows of a table (DilateQuant's temporal
parallel quantizer, arXiv 2409.14307).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from mezzotint.runtime import streams
from mezzotint.runtime.bundle.training import TrainedUnit

from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import is_op, name_of
from ..graph.ops import layers
from ..rounding.layer_inputs import Inputs, Latents
from ..rounding.weights import find_weights
from ..torch_graph.convert import TorchGraph, to_torch
from ..torch_graph.quantizers import Quantizer
from ..torch_graph.write_back import plan_grids, write_back
from .array_files import ArrayFiles
from .block_data import LossWatcher, record
from .fit_rounding import curve_of
from .learned_scales import LearnedScales, RowNetworks, learned_grids
from .movements import Movements, Rates
from .moving_weights import MovingWeights
from .range_networks import RangeNetworks
from .subgraph import Subgraph, cut_out_unit
from .torch_device import training_device
from .unit_batches import Annealing, Batches
from .unit_cache import Learned
from .units import UnitToTrain


@dataclass(frozen=True, eq=False)
class ScaleTrainer:
    """How the scales of units are trained by one run of a pass, whose name is `by`.

    zero_points   learn the zero points of unsigned grids too
    networks      learn tables as networks of the timestep, else row by row
    weight_steps  how far an iteration moves weights whose scales are learned, in steps of their grids; 0 leaves them
    mixed         calls whose samples are in a step, at most as many as samples
    """

    latents: Sequence[Latents]
    schedule: Annealing
    zero_points: bool
    networks: bool
    weight_steps: float
    mixed: int
    by: str

    def train(
        self, program: Program, context: Context, unit: UnitToTrain, step: LossWatcher
    ) -> tuple[TrainedUnit, Learned]:
        """Return the fit of a unit's quantizers, and what it learned, which is empty where the start is better.

        `step` is called after each batch of the data and each iteration. Raise PassError for a loss that is not finite.
        """
        part = cut_out_unit(program, unit)
        inner = self.schedule.inner > 0
        graph = self._torch(program, part)
        with ArrayFiles(context.folder) as files, training_device(context) as device:
            graph = graph.to(device)
            data = record(program, context, part, self.latents, unit.name, step, files, inner=inner)
            movements = self._movements(program, context, part, graph, unit.quantizers)
            batches = Batches(graph, part, program.signature, data, self.schedule, 0, self.mixed, movements=movements)
            start, scale = batches.mean_errors()
            if scale == 0:  # the unit computes what the float graph does
                return TrainedUnit(unit.name, self.by, 0.0, 0.0, 0.0, (), kept=False), {}
            losses = self._descend(batches, movements, scale, unit.name, context.seed, step)
            arrays = batches.settle()
            end, _ = batches.mean_errors()
        kept = end < start
        return TrainedUnit(unit.name, self.by, start, end, end, curve_of(losses), kept), arrays if kept else {}

    def written(self, program: Program, context: Context, unit: UnitToTrain, learned: Learned) -> Program:
        """Return the program with the scales and weights that a unit learned."""
        graph = self._torch(program, cut_out_unit(program, unit))
        graph.module.load_state_dict({key: torch.tensor(array) for key, array in learned.items()}, strict=False)
        return write_back(program, graph, context.folder, self.by)

    def _torch(self, program: Program, part: Subgraph) -> TorchGraph:
        graph = to_torch(part.model, taps=[name for name, _ in part.inner] if self.schedule.inner else ())
        plan_grids(program, graph)
        graph.module.requires_grad_(False)  # only the offsets are trained
        return graph

    def _movements(
        self, program: Program, context: Context, part: Subgraph, graph: TorchGraph, names: Sequence[str]
    ) -> Movements:
        """Return the scales of these quantizers, and the weights that they round if weights move."""
        weights, integers = None, rounded_weights(part.model.graph, graph, names)
        if self.weight_steps:
            floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
            own = [w for w in find_weights(program.graph) if w.quantize.name in names]
            moving = [Inputs.of(weight, floats, self.by) for weight in own]
            rng = streams.ADAPTERS.generator(context.seed)  # of no adapters here
            weights = MovingWeights(program, graph, moving, moving="all", floats=False, rank=1, rng=rng)
            integers = {}
        row_of = program.row_of
        seen = {row_of[call.timestep] for call in self.latents if call.timestep in row_of}
        grids = learned_grids(graph, names, integers, self.zero_points)
        networks = _networks(program, context) if self.networks else None
        learned = LearnedScales(grids, max(row_of.values(), default=-1) + 1, seen, networks)
        return Movements(weights, learned, Rates(self.weight_steps, 0.0, self.schedule.learning_rate), row_of)

    def _descend(
        self, batches: Batches, movements: Movements, scale: float, unit: str, seed: int, step: LossWatcher
    ) -> list[float]:
        """Train what moves; return the losses relative to the error of the start."""
        optimizer = torch.optim.Adam(movements.groups)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.schedule.iterations)
        rng = streams.TRAINING_BATCHES.generator(seed, zlib.crc32(unit.encode()))
        losses: list[float] = []
        for iteration in range(self.schedule.iterations):
            loss = batches.loss(rng) / scale
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise PassError(
                    f"the loss is {losses[-1]} at iteration {iteration}",
                    where=unit,
                    hint=f"lower {self.by}.learning_rate, or leave this unit out ({self.by}.units)",
                )
            optimizer.zero_grad()  # the rows of other calls have no gradient, and Adam leaves them as they are
            loss.backward()
            optimizer.step()
            falling.step()
            step(losses[-1])
        return losses


def _networks(program: Program, context: Context) -> RowNetworks:
    """Return what makes networks of the timesteps of the tables' rows: a row of several calls has their mean."""
    row_of = program.row_of
    rows = [[t for t, own in row_of.items() if own == row] for row in range(max(row_of.values()) + 1)]
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
        if weight is None or not isinstance(quantizer, Quantizer):
            continue
        if torch.allclose(quantizer(weight), weight, rtol=1e-5, atol=0):
            found[name] = name_of(value)
    return found
