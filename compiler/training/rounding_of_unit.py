"""One layer or block of a program: cut out, trained, and its weights written back."""

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
from ..torch_graph.convert import TorchGraph, to_torch
from ..torch_graph.quantizers import Quantizer, SoftRounding
from ..torch_graph.write_back import plan_grids, write_back
from .array_files import ArrayFiles
from .block_data import LossWatcher, record
from .fisher_loss import FisherSource
from .fit_rounding import fit_rounding
from .learned_scales import LearnedScales, learned_grids
from .movements import Movements, Rates
from .subgraph import Subgraph, cut_out
from .torch_device import training_device
from .unit_batches import Annealing, Batches
from .unit_cache import UnitCache


@dataclass(frozen=True, eq=False)
class ReconstructionUnit:
    """A part of the graph that is trained as one: its name, what its nodes compute, and its weights.

    `computed` are the names of the first outputs of its nodes. `timely` says that all of it depends on the timestep
    alone: its data are all deployed timesteps, and a step of its fit takes several of them. `quantizers` are the names
    of the QuantizeLinear nodes of activations whose scales are learned with the weights.
    """

    name: str
    computed: frozenset[str]
    weights: tuple[Inputs, ...]
    timely: bool = False
    quantizers: tuple[str, ...] = ()


def learn_rounding(
    program: Program,
    context: Context,
    unit: ReconstructionUnit,
    latents: Sequence[Latents],
    schedule: Annealing,
    by: str,
    cache: UnitCache,
    step: LossWatcher,
    fisher: FisherSource | None = None,
) -> tuple[Program, TrainedUnit]:
    """Train the rounding of a unit's weights; return the program, with the hard rounding if it is better, and the fit.

    A unit that the cache has is not trained again. `fisher` measures what weights errors of the outputs (not those of
    the time branch, which no sample reaches). `step` is called after each batch of the data and each iteration.
    """
    float_graph = program.require_float_model().graph
    floats = {name_of(v) for node in float_graph for v in node.outputs}
    of_layers = {name_of(layer.output) for layer in layers(float_graph) if layer.weight is not None}
    part = cut_out(program.model, unit.computed, program.signature, floats, unit.name, of_layers)
    known = cache.load(unit.name, unit.computed)
    graph = to_torch(part.model, taps=[name for name, _ in part.inner] if schedule.inner else ())
    plan_grids(program, graph)
    graph.module.requires_grad_(False)  # only the variables of the rounding are trained
    rounders = {name_of(w.weight.quantize.outputs[0]): _soften(graph, w) for w in unit.weights}
    if known is None:
        mixed = dict(part.floats) if schedule.drop else {}
        if unit.timely:
            latents = _at_every_timestep(program, latents[0])
        with ArrayFiles(context.folder) as files, training_device(context) as device:
            graph = graph.to(device)
            inner = schedule.inner > 0
            data = record(program, context, part, latents, unit.name, step, files, inner=inner, floats=mixed)
            seeds = streams.DROPPED_ELEMENTS.generator(context.seed, zlib.crc32(unit.name.encode()))
            if schedule.drop:
                _drop_elements(part, graph, schedule.drop, seeds)
            seed, calls = int(seeds.integers(2**31)), schedule.batch if unit.timely else 1
            moving = _scales(program, graph, unit.quantizers, latents, schedule) if unit.quantizers else None
            fishers = fisher(part, latents, device) if fisher and not unit.timely else None
            batches = Batches(
                graph, part, program.signature, data, schedule, seed, calls, movements=moving, fishers=fishers
            )
            fit, arrays = fit_rounding(batches, rounders, schedule, context.seed, unit.name, by, step)
        cache.keep(unit.name, unit.computed, fit, arrays)
    else:
        fit, arrays = known
        for name, rounder in rounders.items():
            if name in arrays:
                rounder.choose(arrays[name])
        scales = {name: torch.from_numpy(array) for name, array in arrays.items() if name not in rounders}
        graph.module.load_state_dict(scales, strict=False)
    if not fit.kept:
        return program, fit
    trained = {w.weight.quantize.name or "": rounders[name_of(w.weight.quantize.outputs[0])] for w in unit.weights}
    written = replace(graph, quantizers={**graph.quantizers, **trained})
    return write_back(program, written, context.folder, by), fit


def _scales(
    program: Program, graph: TorchGraph, names: Sequence[str], latents: Sequence[Latents], schedule: Annealing
) -> Movements:
    """Return the scales of these quantizers, which move with the rounding."""
    groups = program.require_plan().groups
    row_of = dict(zip(program.deployment.timesteps, groups, strict=True)) if groups else {}
    seen = {row_of[call.timestep] for call in latents if call.timestep in row_of}
    learned = LearnedScales(learned_grids(graph, names, {}, False), max(groups, default=-1) + 1, seen)
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
