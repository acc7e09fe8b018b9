"""A program whose whole network is trained: its torch graph, what moves, and the program that is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import onnx_ir as ir

from mezzotint.runtime import streams
from mezzotint.runtime.bundle.training import TrainedUnit
from mezzotint.runtime.streams import SeedOffset

from ..core.pipeline import Context
from ..core.program import Program
from ..graph.blocks import find_blocks
from ..graph.nodes import is_constant, is_op, name_of
from ..rounding.layer_inputs import Inputs
from ..torch_graph.convert import TorchGraph, to_torch
from ..torch_graph.write_back import plan_grids, write_back
from .array_files import ArrayFiles
from .block_data import LossWatcher
from .fading_branches import FadingBranches
from .fit_network import NetworkResult, fit_network
from .fit_rounding import curve_of
from .learned_levels import LearnedLevels
from .learned_scales import LearnedScales, learned_grids
from .movements import Movements, Rates
from .moving_weights import Moving, MovingWeights
from .nested_widths import NestedWidths, Nesting
from .network_loss import NetworkFit, NetworkLoss
from .network_state import CHECK, CheckCache
from .restraints import Restraint
from .steady_scales import OrderlyScales
from .steady_weights import StatisticalScales, SureWeights
from .torch_device import training_device
from .trajectories import TorchDenoiser, float_trajectories
from .unit_cache import training_key
from .units import NETWORK

MovingScales = Literal["activations", "both", "statistics", "none"]
"""Which scales are learned: those of activations, or those of the weights that move too (LSQ, arXiv 1902.08153).

With `statistics` those of activations are, and those of weights follow their mean magnitudes (steady_weights.py).
"""


@dataclass(frozen=True, eq=False)
class Moves:
    """What moves: the quantized weights of these inputs and how, float weights, and the scales of quantizers.

    `critical` is the share of a quantized weight's rows that move, `branch_rank` the rank of the branch that fades, and
    `boundary` how near to a threshold weights move in the last phase, in steps of their grids; 0 means all. Scales
    whose disorder was below `freeze_below` in a `freeze_window` are frozen in the next one. `nested` is the way to
    integers of lower widths, and `nested_shares` the share of each width in the loss.
    """

    weights: Moving
    quantized: tuple[Inputs, ...]
    floats: bool
    scales: MovingScales
    rank: int
    critical: float
    branch_rank: int = 0
    boundary: float = 0.0
    freeze_below: float = 0.0
    freeze_window: int = 1
    nested: Nesting = "none"
    nested_shares: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Distillation:
    """A training of a whole network by the pass `by`, with these options."""

    context: Context
    moves: Moves
    fit: NetworkFit
    by: str
    options: Mapping[str, Any]

    def train(self, program: Program, step: LossWatcher) -> tuple[Program, NetworkResult]:
        """Train the network; return the program with the state whose images were best, and what the fit did.

        `step` is called after each network call, and after each iteration with its loss.
        """
        context, fit = self.context, self.fit
        seed = SeedOffset.HELD_OUT.after(context.seed)
        with ArrayFiles(context.folder) as files, training_device(context) as device:
            trained_on = float_trajectories(program, replace(context, samples=fit.samples), files, step)
            judging = float_trajectories(program, replace(context, samples=fit.held_out, seed=seed), files, step)
            graph = _torch_graph(program, program.model, taps := self._taps(program)).to(device)
            plan_grids(program, graph)
            movements = self._movements(program, graph)
            teacher = None
            if taps:
                exact = program.require_float_model()
                teacher = TorchDenoiser(program, exact, _torch_graph(program, exact, taps).to(device))
            denoiser = TorchDenoiser(program, program.model, graph)
            solver = program.deployment.solver(program.schedule)
            loss = NetworkLoss(denoiser, teacher, solver, trained_on, judging, fit)
            result = fit_network(loss, movements, fit, context.seed, self.by, self._cache(program), step)
            movements.settle()
        kept = result.kept > 0 or self.moves.nested != "none"  # the nested integers of the start are new ones, too
        written = write_back(program, graph, context.folder, self.by) if kept else program
        # Errors are those of images here: a ratio of them is 10 ** (difference in dB / 10).
        start, end = (10 ** (-result.image_db[k] / 10) for k in (0, result.kept))
        unit = TrainedUnit(NETWORK, self.by, start, end, end, curve_of(result.losses), kept)
        return replace(written, training=(*program.training, unit)), result

    def _taps(self, program: Program) -> list[str]:
        return outputs_of_blocks(program) if self.fit.blocks or self.fit.relations else []

    def _movements(self, program: Program, graph: TorchGraph) -> Movements:
        moves, rng = self.moves, streams.ADAPTERS.generator(self.context.seed)
        nested = None
        if moves.nested != "none":
            nested = NestedWidths(graph, moves.quantized, moves.nested, moves.nested_shares)
        weights = MovingWeights(
            program,
            graph,
            moves.quantized,
            moving=moves.weights,
            floats=moves.floats,
            rank=moves.rank,
            rng=rng,
            critical=moves.critical,
            nested=nested,
        )
        names = [inputs.weight.quantize.name or "" for inputs in moves.quantized]
        of_weights = names if moves.scales == "both" else []
        scales = None if moves.scales == "none" else _scales(program, graph, of_weights)
        fit = self.fit
        rates = Rates(fit.weight_steps, fit.float_shares, fit.scale_shares, fit.level_steps)
        levels = LearnedLevels(graph, names) if fit.level_steps else None
        branches = FadingBranches(graph, moves.quantized, moves.branch_rank) if moves.branch_rank else None
        statistics = StatisticalScales(graph, weights.quantized) if moves.scales == "statistics" else None
        restraints = self._restraints(graph, weights, scales)
        return Movements(weights, scales, rates, program.row_of, levels, branches, statistics, restraints, nested)

    def _restraints(
        self, graph: TorchGraph, weights: MovingWeights, scales: LearnedScales | None
    ) -> Sequence[Restraint]:
        moves, found = self.moves, list[Restraint]()
        if moves.boundary:
            found.append(SureWeights(graph, weights.quantized, moves.boundary))
        if moves.freeze_below and scales is not None:
            variables = [v for group in scales.parameter_groups(1.0) for v in group["params"]]
            found.append(OrderlyScales(variables, moves.freeze_window, moves.freeze_below))
        return found

    def _cache(self, program: Program) -> CheckCache:
        cache = self.context.cache
        key = "" if cache is None else training_key(program, self.context, CHECK.layout, self.options)
        return CheckCache(cache, key, self.fit.checks)


def network_calls(program: Program, context: Context, fit: NetworkFit, widths: int) -> int:
    """Return the number of network calls beside the iterations: trajectories, the errors at the start, and images.

    The last two are those of each of so many `widths`.
    """
    calls = len(program.deployment.calls)
    batches, judging = (-(-count // context.batch) for count in (fit.samples, fit.held_out))
    return calls * (batches + judging * (1 + widths * (fit.checks + 1)) + widths)


def _torch_graph(program: Program, model: ir.Model, taps: Sequence[str]) -> TorchGraph:
    graph = to_torch(model, signature=program.signature, taps=taps)
    graph.module.requires_grad_(False)  # only offsets are trained
    return graph


def _scales(program: Program, graph: TorchGraph, of_weights: Sequence[str]) -> LearnedScales:
    """Return the offsets of the scales of activations, and of the quantizers of these weights, which move themselves.

    All rows of tables have calls here.
    """
    names = [n.name for n in program.graph if is_op(n, "QuantizeLinear") and not is_constant(n.inputs[0]) and n.name]
    grids = learned_grids(graph, [*names, *of_weights], {}, zero_points=program.free_zero_points)
    rows = max(program.row_of.values(), default=-1) + 1
    return LearnedScales(grids, rows, range(rows))


def outputs_of_blocks(program: Program) -> list[str]:
    """Return the values that leave the blocks, by the names that they have in the float graph and in the quantized.

    What depends on the timestep only, such as a row of a table, has no row for each sample, and is left out.
    """
    known = {name_of(v) for n in program.graph for v in n.outputs if _is_float(v)}
    blocks = find_blocks(program.require_float_model(), program.signature.sample)
    leaving = {name_of(v): v for block in blocks for v in block.outputs}
    of_samples = {name for name, value in leaving.items() if value.shape is not None and len(value.shape) > 1}
    return [name for name in leaving if name in of_samples & known and name != program.signature.output]


def _is_float(value: ir.Value) -> bool:
    producer = value.producer()
    return not (producer is not None and is_op(producer, "QuantizeLinear", "Clip"))
