"""The matrices of one stage of round_weights, weighted by gradients of the prediction.

Inputs of layers come from the quantized prefix, as in compiler/rounding/layer_inputs.py, and gradients of their outputs
from the float network at the same latents. A stage bounds the memory of both: gradients are those of its layers alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Floats

from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..graph.nodes import name_of
from ..graph.ops import layers
from ..rounding.gram import choose_positions
from ..rounding.layer_inputs import FloatInputs, Gathered, Inputs, Latents
from ..rounding.weights import layer_name, reading_directly
from ..training.torch_device import training_device
from .curvature import CurvatureForm, GuidedGram, SampleGradients, at_positions, groups_of_rows, weight_gradient
from .probed_network import ProbedNetwork, gradients, project


class WeightedStage(Gathered):
    """The matrices of one stage; no two weights share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[int, GuidedGram | SampleGradients] = {}

    def expect_weighted(self, inputs: Inputs, weighting: CurvatureForm, row_groups: int) -> None:
        """Make room for the matrices of one weight."""
        rows = inputs.rows().shape[0] // inputs.groups
        if weighting == "guided":
            self._of[id(inputs)] = GuidedGram(inputs.groups, groups_of_rows(rows, row_groups), inputs.inputs)
        else:
            self._of[id(inputs)] = SampleGradients(inputs.groups, rows, inputs.inputs, sides=weighting == "yaqa")

    def accumulator(self, inputs: Inputs) -> GuidedGram | SampleGradients:
        return self._of[id(inputs)]

    def gram(self, inputs: FloatInputs) -> Floats:
        """H `[groups, d, d]`, or as many for each group of rows."""
        return self._of[id(inputs)].matrix()

    def side(self, inputs: FloatInputs) -> Floats | None:
        """H_O `[groups, rows of a group, rows of a group]` of yaqa."""
        found = self._of[id(inputs)]
        return found.side() if isinstance(found, SampleGradients) else None

    def forget(self, inputs: FloatInputs) -> None:
        del self._of[id(inputs)]


def gather_weighted(
    program: Program,
    context: Context,
    stage: Sequence[Inputs],
    latents: Sequence[Latents],
    weighting: CurvatureForm,
    *,
    row_groups: int,
    probes: int,
    rounded: Collection[str],
    columns: int,
    balance: bool,
    step: Callable[[], None],
) -> WeightedStage:
    """Return the matrices of every weight of a stage; `step` after each batch.

    `columns` are the positions of a layer's inputs that `guided` reads, shared equally by the batches. The others read
    all positions, because they sum over those of a sample. `probes` are the projections of each batch. Raise PassError
    for an operation that torch does not have.
    """
    gathered = WeightedStage()
    for inputs in stage:
        gathered.expect_weighted(inputs, weighting, row_groups)
    floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
    outputs = [[floats[layer_name(node)].node.outputs[0] for node in inputs.weight.readers] for inputs in stage]
    names = [[name_of(value) for value in values] for values in outputs]
    graph_inputs = {name_of(v) for v in program.graph.inputs}
    taps = [t for t in dict.fromkeys(t for inputs in stage for t in inputs.taps) if t not in graph_inputs]
    limit = max(columns // len(latents), 1)
    with (
        training_device(context) as device,
        Executor(
            reading_directly(program.model, rounded),
            context.folder,
            taps=taps,
            threads=context.threads,
            level="basic",  # a prefix may not be fused (compiler/core/execute.py)
            spinning=False,
            only_taps=True,
        ) as prefix,
    ):
        network = _network(program, device, stage, [name for several in names for name in several])
        for batch in latents:
            seen = prefix.call(program.signature, batch.x, batch.timestep, batch.conditions)
            seen |= {program.signature.sample: batch.x, **batch.conditions}
            found = _gradients(network, batch, context.seed, probes)
            for inputs, outs in zip(stage, names, strict=True):
                accumulator = gathered.accumulator(inputs)
                given = [[gradient[name] for gradient in found] for name in outs]
                if isinstance(accumulator, GuidedGram):
                    seed = [context.seed, batch.call, batch.batch]
                    _add_positions(accumulator, inputs, seen, given, limit, seed, balance)
                else:
                    _add_samples(accumulator, inputs, seen, given, network.halves, balance)
            step()
    return gathered


def _network(program: Program, device: torch.device, stage: Sequence[Inputs], taps: Sequence[str]) -> ProbedNetwork:
    weights = dict.fromkeys(name for inputs in stage for name in inputs.float_weights)
    return ProbedNetwork(
        program, program.require_float_model(), device, taps=list(dict.fromkeys(taps)), weights=weights
    )


def _gradients(network: ProbedNetwork, batch: Latents, seed: int, probes: int) -> list[dict[str, Floats]]:
    """Return the gradients of each projection of the prediction, by the names of the tapped values."""
    prediction, tapped = network(batch.x, batch.timestep, batch.conditions)
    return [
        gradients(project(prediction, seed, batch.call, batch.batch, probe), tapped, keep=probe + 1 < probes)
        for probe in range(probes)
    ]


def _add_positions(
    gram: GuidedGram,
    inputs: Inputs,
    seen: dict[str, Floats],
    given: Sequence[Sequence[Floats]],
    limit: int,
    seed: Sequence[int],
    balance: bool,
) -> None:
    """Add the columns of one batch at some positions; `given` are the gradients of each reader, for each projection."""
    for tap, unfold, found in zip(inputs.taps, inputs.unfolds, given, strict=True):
        x = seen[tap]
        rng = streams.POSITIONS.generator(*seed, zlib.crc32(tap.encode()))
        chosen = choose_positions(unfold.positions(x.shape), limit, rng)
        columns = unfold.columns(x, chosen) * (_balancing(x) if balance else np.float32(1))
        for gradient in found:
            factor = _balancing(gradient) if balance else np.float32(1)
            gram.add(columns, at_positions(gradient, unfold, chosen) * factor)


def _add_samples(
    sums: SampleGradients,
    inputs: Inputs,
    seen: dict[str, Floats],
    given: Sequence[Sequence[Floats]],
    halves: int,
    balance: bool,
) -> None:
    """Add the gradients of the samples of one batch by a weight: sums over its readers and over both halves."""
    for k in range(len(given[0])):
        rows = len(seen[inputs.taps[0]])
        samples = max(rows // halves, 1)
        for sample in range(samples):
            both = list(range(sample, rows, samples))
            parts = [
                weight_gradient(seen[tap], found[k], unfold, both)
                * (_balancing(seen[tap]) * _balancing(found[k]) if balance else np.float32(1))
                for tap, unfold, found in zip(inputs.taps, inputs.unfolds, given, strict=True)
            ]
            sums.add(np.sum(parts, axis=0, dtype=np.float32))


def _balancing(values: Floats) -> np.float32:
    """Return what makes the mean square of an array 1."""
    mean = float(np.mean(np.square(values), dtype=np.float64))
    return np.float32(1 / np.sqrt(mean)) if mean > 0 else np.float32(1)
