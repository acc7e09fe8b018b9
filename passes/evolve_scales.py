"""evolve_scales: search scales of weights by small random changes that bring the prediction nearer to float.

Scales that are best for a weight alone (choose_scales, `mse`) are near the best for the network, among many local
minima: small changes of scales move many integers at once, and some sets of integers are better for no reason that a
weight shows. Evol-Q (arXiv 2308.10814) searches them by evolution. Each of the `population` has a factor for each
weight, 1 at first. Layers are taken in groups of `group`, in the order of the graph, `passes` times; for each group
`cycles` times

    the best of `tournament` random members is copied, the factors of the group multiplied by exp(u),
    u uniform in [-spread, spread], and the copy takes the place of the oldest member

and the member whose error is the least of all that were ever measured stays. The error is that of epsilon relative to
the float network's, over `calls` calls of the float trajectory and `samples` images, at activations as they are
quantized; other noise judges the result (`held_out` images), and where it is no better than the start nothing changes.

Deviations: one factor for all rows of a weight; squared errors in place of a contrastive loss over classes, which a
denoiser does not have; activations keep their scales. Weights are rounded to nearest, so round_weights does not go
behind this pass, nor in front of it.

A search runs passes x layers / group x cycles evaluations of calls x samples / batch network calls each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.formats import Grid
from mezzotint.compiler.core.option_checks import require_positive
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.trial import judged
from mezzotint.compiler.errors import StatsError
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.graph.require import inputs, shape_of
from mezzotint.compiler.rounding.layer_inputs import Inputs, Latents, chosen_latents
from mezzotint.compiler.rounding.matrix import nearest
from mezzotint.compiler.rounding.weights import (
    QuantizedWeight,
    find_weights,
    grid_of,
    layer_name,
    replace_weight,
    with_grids,
)
from mezzotint.runtime import streams
from mezzotint.runtime.arrays import AnyArray, Doubles, Floats
from mezzotint.runtime.signature import Images


@dataclass(frozen=True)
class EvolveScales(Pass):
    """An evolution of the scales of weights; all options as above."""

    population: int = 8
    tournament: int = 4
    passes: int = 3
    cycles: int = 4
    group: int = 3
    spread: float = 0.05
    calls: int = 5
    samples: int = 4
    held_out: int = 8

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})
    before: ClassVar[frozenset[str]] = frozenset({"rounded"})
    gives: ClassVar[frozenset[str]] = frozenset({"rounded"})

    def __post_init__(self) -> None:
        options = ("population", "tournament", "passes", "cycles", "group", "spread", "calls", "samples", "held_out")
        require_positive(self, *options)

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None or program.plan is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        weights = [weight for weight in find_weights(program.graph) if weight.per_row]
        if not weights:
            return program.noted("no layer has quantized weights: nothing to search")
        before = replace(program, model=program.model.clone())
        few = replace(context, samples=min(self.samples, context.samples))
        latents = chosen_latents(program, few, self.calls)
        with _Judge(program, context, latents, weights) as judge:
            factors, first, last = self._evolved(judge, len(weights), context)
        changed: dict[str, tuple[QuantizedWeight, str, Floats, Grid]] = {}
        floats = {layer.name: layer for layer in layers(program.float_model.graph)}
        for weight, factor in zip(weights, factors, strict=True):
            if factor == 1:
                continue
            source = Inputs.of(weight, floats, self.name)
            grid = grid_of(source.float_weights[0], weight, program.plan)
            scale = (weight.scale() * np.float32(factor)).astype(np.float32)
            values = (scale[:, None] * nearest(source.rows(), scale, grid)).astype(np.float32)
            for node, name in zip(weight.readers, source.float_weights, strict=True):
                changed[layer_name(node)] = (weight, name, scale, grid)
            replace_weight(program, weight, values, scale, context.folder, self.name)
        after = replace(program, plan=with_grids(program.plan, changed, self.name))
        note = (
            f"{len(changed)} of {len(weights)} weights have other scales; error of epsilon {first:.4g} -> {last:.4g} "
            f"after {judge.evaluations} evaluations"
        )
        return judged(before, after, context, self.held_out, note, self.name)

    def _evolved(self, judge: _Judge, count: int, context: Context) -> tuple[Doubles, float, float]:
        """Return the best factors, and the errors of the start and of the best."""
        rng = streams.CONFIGURATIONS.generator(context.seed)
        start = np.ones(count)
        first = judge.error(start)
        members = deque([(first, start)] * self.population, maxlen=self.population)
        best = members[0]
        groups = [range(k, min(k + self.group, count)) for k in range(0, count, self.group)]
        total = self.passes * len(groups) * self.cycles
        for k in range(total):
            group = groups[k // self.cycles % len(groups)]
            drawn = rng.choice(len(members), min(self.tournament, len(members)), replace=False)
            parent = min((members[i] for i in drawn), key=lambda member: member[0])
            factors = parent[1].copy()
            factors[group] *= np.exp(rng.uniform(-self.spread, self.spread, len(group)))
            members.append((judge.error(factors), factors))
            best = min(best, members[-1], key=lambda member: member[0])
            context.progress(self.name, k + 1, total)
        return best[1], first, best[0]


class _Judge:
    """The quantized graph with the scales of its weights as inputs, beside the float outputs. A context manager."""

    def __init__(
        self, program: Program, context: Context, latents: Sequence[Latents], weights: Sequence[QuantizedWeight]
    ) -> None:
        self._program, self._latents = program, latents
        self.evaluations = 0
        self._scales = {name_of(inputs(w.quantize, 2)[1]): w.scale() for w in weights}
        self._names = [name_of(inputs(w.quantize, 2)[1]) for w in weights]
        self._shapes = {name_of(v): shape_of(v).numpy() for w in weights for v in [inputs(w.quantize, 2)[1]]}
        self._wanted: list[Images] = []
        with Executor(program.require_float_model(), context.folder, threads=context.threads) as exact:
            for one in latents:
                called = exact.call(program.signature, one.x, one.timestep, one.conditions)
                self._wanted.append(np.asarray(called[program.signature.output], np.float64))
        clone = program.model.clone()
        for name in self._scales:
            clone.graph.inputs.append(clone.graph.initializers[name])
        # As it is written: fused kernels want constant scales.
        self._executor = Executor(clone, context.folder, threads=context.threads, level="none")

    def error(self, factors: Doubles) -> float:
        """Return the error of epsilon relative to the float network's, the mean over the latents."""
        self.evaluations += 1
        fed: dict[str, AnyArray] = {
            name: (self._scales[name] * np.float32(factor)).astype(np.float32).reshape(self._shapes[name])
            for name, factor in zip(self._names, factors, strict=True)
        }
        signature, shares = self._program.signature, []
        for one, wanted in zip(self._latents, self._wanted, strict=True):
            called = self._executor.call(signature, one.x, one.timestep, {**one.conditions, **fed})
            moved = called[signature.output] - wanted
            shares.append(float(np.sum(moved**2) / max(float(np.sum(wanted**2)), 1e-300)))
        return float(np.mean(shares))

    def __enter__(self) -> _Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.close()
