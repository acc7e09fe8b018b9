"""The rounding of one layer or block of a program: cut out, trained, and its weights written back."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mezzotint.runtime import streams
from mezzotint.runtime.bundle.training import TrainedUnit

from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import is_constant, is_op, name_of, numpy_of
from ..graph.ops import layers
from ..rounding.layer_inputs import Inputs, Latents
from ..rounding.weights import find_weights
from ..torch_graph.convert import TorchGraph, to_torch
from ..torch_graph.quantizers import Quantizer
from ..torch_graph.soft_rounding import SoftRounding
from ..torch_graph.write_back import plan_grids, write_back
from .array_files import ArrayFiles
from .block_data import LossWatcher, record
from .fisher_loss import FisherSource
from .fit_rounding import fit_rounding
from .learned_scales import LearnedScales, learned_grids
from .movements import Movements, Rates
from .subgraph import Subgraph, cut_out_unit
from .torch_device import training_device
from .unit_batches import Annealing, Batches
from .unit_cache import Learned
from .units import UnitToTrain


@dataclass(frozen=True, eq=False)
class RoundingTrainer:
    """How the rounding of units' weights is trained by one run of a pass, whose name is `by`.

    `fisher` measures what weights errors of the outputs; the time branch, which no sample reaches, has none. Scales of
    a unit's quantizers move with its weights. With a `low_rank` other than 0 the variables of a weight's rounding move
    by a product of that rank.
    """

    latents: Sequence[Latents]
    schedule: Annealing
    by: str
    fisher: FisherSource | None = None
    low_rank: int = 0

    def train(
        self, program: Program, context: Context, unit: UnitToTrain, step: LossWatcher
    ) -> tuple[TrainedUnit, Learned]:
        """Return the fit of a unit's rounding, and what it learned, which is empty where the start is better.

        `step` is called after each batch of the data and each iteration. Raise PassError for a loss that is not finite.
        """
        schedule = self.schedule
        part = cut_out_unit(program, unit)
        graph, rounders = self._softened(program, part, unit)
        if self.low_rank:
            for name, rounder in rounders.items():
                place = (zlib.crc32(unit.name.encode()), zlib.crc32(name.encode()))
                rounder.use_low_rank(self.low_rank, streams.ADAPTERS.generator(context.seed, *place))
        latents = _at_every_timestep(program, self.latents[0]) if unit.timely else self.latents
        mixed = dict(part.floats) if schedule.drop else {}
        with ArrayFiles(context.folder) as files, training_device(context) as device:
            graph = graph.to(device)
            inner = schedule.inner > 0
            data = record(program, context, part, latents, unit.name, step, files, inner=inner, floats=mixed)
            seeds = streams.DROPPED_ELEMENTS.generator(context.seed, zlib.crc32(unit.name.encode()))
            if schedule.drop:
                _drop_elements(part, graph, schedule.drop, seeds)
            seed, calls = int(seeds.integers(2**31)), schedule.batch if unit.timely else 1
            moving = _scales(program, graph, unit.quantizers, latents, schedule) if unit.quantizers else None
            measured = self.fisher is not None and not unit.timely
            fishers = self.fisher(program, context, part, latents, device) if self.fisher and measured else None
            batches = Batches(
                graph, part, program.signature, data, schedule, seed, calls, movements=moving, fishers=fishers
            )
            return fit_rounding(batches, rounders, schedule, context.seed, unit.name, self.by, step)

    def written(self, program: Program, context: Context, unit: UnitToTrain, learned: Learned) -> Program:
        """Return the program with the weights and scales that a unit learned."""
        graph, rounders = self._softened(program, cut_out_unit(program, unit), unit)
        for name, rounder in rounders.items():
            if name in learned:
                rounder.choose(learned[name])
        scales = {name: torch.tensor(array) for name, array in learned.items() if name not in rounders}
        graph.module.load_state_dict(scales, strict=False)
        return write_back(program, graph, context.folder, self.by)

    def _softened(
        self, program: Program, part: Subgraph, unit: UnitToTrain
    ) -> tuple[TorchGraph, dict[str, SoftRounding]]:
        """Return a unit in torch, and the soft rounding of its weights by the values that their quantizers compute."""
        graph = to_torch(part.model, taps=[name for name, _ in part.inner] if self.schedule.inner else ())
        plan_grids(program, graph)
        graph.module.requires_grad_(False)  # only the variables of the rounding are trained
        floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
        own = [Inputs.of(w, floats, self.by) for w in find_weights(program.graph) if w.name in unit.weights]
        soft = {w.weight.quantize: _soften(graph, w) for w in own}
        trained = {node.name or "": rounder for node, rounder in soft.items()}
        by_value = {name_of(node.outputs[0]): rounder for node, rounder in soft.items()}
        return replace(graph, quantizers={**graph.quantizers, **trained}), by_value


def _scales(
    program: Program, graph: TorchGraph, names: Sequence[str], latents: Sequence[Latents], schedule: Annealing
) -> Movements:
    """Return the scales of these quantizers, which move with the rounding."""
    row_of = program.row_of
    seen = {row_of[call.timestep] for call in latents if call.timestep in row_of}
    learned = LearnedScales(learned_grids(graph, names, {}, False), max(row_of.values(), default=-1) + 1, seen)
    return Movements(None, learned, Rates(0.0, 0.0, schedule.scale_shares), row_of)


def _at_every_timestep(program: Program, latents: Latents) -> list[Latents]:
    """Return one call for each timestep of the deployment; what depends on the timestep alone reads nothing else."""
    times = program.deployment.timesteps
    return [replace(latents, call=i, timestep=t) for i, t in enumerate(times)]


def _soften(graph: TorchGraph, inputs: Inputs) -> SoftRounding:
    """Put soft rounding in the place of a weight's quantizer; it starts at the rounding that the program has."""
    weight = inputs.weight
    quantizer = graph.quantizers[weight.quantize.name or ""]
    if not isinstance(quantizer, Quantizer):
        raise PassError("the weight's quantizer is trained already", where=weight.name)
    current, floats = torch.tensor(numpy_of(weight.value)), torch.tensor(numpy_of(inputs.floats))
    rounder = SoftRounding(quantizer, floats, None if torch.equal(current, floats) else quantizer.integers(current))
    path = next(path for path, module in graph.module.named_modules() if module is quantizer)
    graph.module.set_submodule(path, rounder)
    return rounder


def _drop_elements(part: Subgraph, graph: TorchGraph, probability: float, seeds: np.random.Generator) -> None:
    """Let the quantizers of activations pass elements on while the module trains."""
    nodes = [node for node in part.model.graph if is_op(node, "QuantizeLinear") and not is_constant(node.inputs[0])]
    modules = dict.fromkeys(
        graph.quantizers[node.name] for node in nodes if node.name and node.name in graph.quantizers
    )
    for module in modules:
        if isinstance(module, Quantizer):
            module.drop_elements(probability, int(seeds.integers(2**31)))
