"""One layer or block of a program: cut out, trained, and its weights written back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mezzotint.runtime.arrays import Floats

from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of
from ..graph.require import shape_of
from ..rounding.layer_inputs import Inputs, Latents
from ..rounding.weights import grid_of, replace_weight
from ..torch_graph.convert import TorchGraph, to_torch
from ..torch_graph.quantizers import Quantizer, SoftRounding
from .block_data import record
from .fit_rounding import Annealing, Curve, TrainedBlock, fit_rounding
from .subgraph import cut_out


@dataclass(frozen=True, eq=False)
class ReconstructionUnit:
    """A part of the graph that is trained as one: its name, what its nodes compute, and its weights.

    `computed` are the names of the first outputs of its nodes.
    """

    name: str
    computed: frozenset[str]
    weights: tuple[Inputs, ...]


def learn_rounding(
    program: Program,
    context: Context,
    unit: ReconstructionUnit,
    latents: Sequence[Latents],
    schedule: Annealing,
    by: str,
    step: Callable[[str], None],
) -> Curve:
    """Train the rounding of a unit's weights and write them into the program if the hard rounding is better.

    `step` is called with a line for display after each batch of the data and each iteration.
    """
    torch.set_num_threads(context.threads or torch.get_num_threads())
    floats = {name_of(v) for node in program.require_float_model().graph for v in node.outputs}
    part = cut_out(program.model, unit.computed, program.signature, floats, unit.name)
    data = record(program, context, part, latents, unit.name, lambda: step(f"{by}: {unit.name}"))
    try:
        graph = to_torch(part.model)
        rounders = {name_of(w.weight.value): _soften(program, graph, w) for w in unit.weights}
        block = TrainedBlock(graph, [name_of(v) for v in part.model.graph.inputs], part.outputs, program.signature)

        def report(loss: float) -> None:
            step(f"{by}: {unit.name}, loss {loss:.3f}")

        curve = fit_rounding(block, rounders, data, schedule, context.seed, unit.name, report)
    finally:
        data.close()
    if curve.hard < curve.start:
        for inputs in unit.weights:
            rows = _rows(rounders[name_of(inputs.weight.value)].hard(), inputs)
            replace_weight(program, inputs.weight, rows, inputs.weight.scale(), context.folder, by)
    return curve


def _soften(program: Program, graph: TorchGraph, inputs: Inputs) -> SoftRounding:
    """Put soft rounding in the place of a weight's quantizer; it starts at the rounding that the program has."""
    weight = inputs.weight
    quantizer = graph.quantizers[weight.quantize.name or ""]
    if not isinstance(quantizer, Quantizer):
        raise PassError("the weight's quantizer is trained already", where=weight.name)
    grid = grid_of(inputs.float_weights[0], weight, program.require_plan())
    with torch.no_grad():
        quantizer.qmin, quantizer.qmax = (
            torch.as_tensor(np.asarray(end, np.float32)) for end in (grid.qmin, grid.qmax)
        )
        current = torch.from_numpy(_turned(weight.rows(), inputs))
        floats = torch.from_numpy(_turned(inputs.rows(), inputs))
        rounded = None if torch.equal(current, floats) else quantizer.integers(current)
    rounder = SoftRounding(quantizer, floats, rounded)
    path = next(path for path, module in graph.module.named_modules() if module is quantizer)
    graph.module.set_submodule(path, rounder)
    return rounder


def _turned(rows: Floats, inputs: Inputs) -> Floats:
    """Return `[outputs, inputs of an output]` in the shape that the graph's constant has."""
    axis = inputs.weight.axis
    shape = shape_of(inputs.weight.value).numpy()
    moved = [shape[axis], *(n for i, n in enumerate(shape) if i != axis)]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))


def _rows(values: torch.Tensor, inputs: Inputs) -> Floats:
    turned = np.moveaxis(values.detach().numpy(), inputs.weight.axis, 0)
    return np.ascontiguousarray(turned.reshape(len(turned), -1), dtype=np.float32)
