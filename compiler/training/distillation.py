"""A program whose whole network is trained: its torch graph, what moves, and the program that is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
from .fit_network import Movements, NetworkFit, NetworkLoss, NetworkResult, fit_network
from .fit_rounding import curve_of
from .learned_scales import LearnedScales, learned_grids
from .moving_weights import Moving, MovingWeights
from .torch_threads import torch_threads
from .trajectories import TorchDenoiser, float_trajectories
from .units import NETWORK


@dataclass(frozen=True, eq=False)
class Moves:
    """What moves: the quantized weights of these inputs and how, float weights, and scales of activations."""

    weights: Moving
    quantized: tuple[Inputs, ...]
    floats: bool
    scales: bool
    rank: int


def distill_network(
    program: Program,
    context: Context,
    moves: Moves,
    schedule: NetworkFit,
    samples: int,
    held_out: int,
    by: str,
    step: Callable[[float | None], None],
) -> tuple[Program, NetworkResult]:
    """Train the network; return the program with the state whose images were best, and what the fit did.

    `step` is called after each network call, with None, and after each iteration, with its loss.
    """

    def called() -> None:
        step(None)

    trained_on = float_trajectories(program, replace(context, samples=samples), called)
    seed = SeedOffset.HELD_OUT.after(context.seed)
    judging = float_trajectories(program, replace(context, samples=held_out, seed=seed), called)
    taps = _block_outputs(program) if schedule.blocks or schedule.relations else []
    with torch_threads(context.threads):
        graph = to_torch(program.model, signature=program.signature, taps=taps)
        plan_grids(program, graph)
        graph.module.requires_grad_(False)  # only offsets are trained
        rng = streams.ADAPTERS.generator(context.seed)
        weights = MovingWeights(
            program, graph, moves.quantized, moving=moves.weights, floats=moves.floats, rank=moves.rank, rng=rng
        )
        groups = program.require_plan().groups
        row_of = dict(zip(program.deployment.timesteps, groups, strict=True)) if groups else {}
        movements = Movements(weights, _scales(program, graph) if moves.scales else None, row_of, schedule)
        teacher = None
        if taps:
            exact = program.require_float_model()
            floats = to_torch(exact, signature=program.signature, taps=taps)
            floats.module.requires_grad_(False)
            teacher = TorchDenoiser(program, exact, floats)
        solver = program.deployment.solver(program.schedule)
        loss = NetworkLoss(TorchDenoiser(program, program.model, graph), teacher, solver, trained_on, judging, schedule)
        result = fit_network(loss, movements, schedule, context.seed, by, step)
        movements.settle()
    written = program if result.kept == 0 else write_back(program, graph, context.folder, by)
    # The manifest compares errors: those of images, whose loss in dB is 10 log10 of the ratio.
    start, end = (10 ** (-result.image_db[k] / 10) for k in (0, result.kept))
    fit = TrainedUnit(NETWORK, by, start, end, end, curve_of(result.losses))
    return replace(written, training=(*program.training, fit)), result


def _scales(program: Program, graph: TorchGraph) -> LearnedScales:
    """Return the offsets of the scales of activations. All rows of tables have calls here."""
    names = [n.name for n in program.graph if is_op(n, "QuantizeLinear") and not is_constant(n.inputs[0]) and n.name]
    grids = learned_grids(graph, names, {}, zero_points=program.lowering != "premul")
    rows = max(program.require_plan().groups, default=-1) + 1
    return LearnedScales(grids, rows, range(rows))


def _block_outputs(program: Program) -> list[str]:
    """Return the values that leave the blocks, by the names that they have in the float graph and in the quantized."""
    known = {name_of(v) for n in program.graph for v in n.outputs if _is_float(v)}
    blocks = find_blocks(program.require_float_model(), program.signature.sample)
    leaving = dict.fromkeys(name_of(v) for block in blocks for v in block.outputs)
    return [name for name in leaving if name in known and name != program.signature.output]


def _is_float(value: ir.Value) -> bool:
    producer = value.producer()
    return not (producer is not None and is_op(producer, "QuantizeLinear", "Clip"))
