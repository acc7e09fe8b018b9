"""Which tables of activation scales pay, measured on noise that calibration did not see.

The quantizers of all layers that the plan quantizes are simulated on the float graph, with rounded weights, and the
error of the prediction is compared with that of static scales. Latents are those of the float trajectory.

1. Rank: each table alone in place of its static scale, on a few images of one noise; the `ranked` ones of the largest
   expected gain are measured in this way, and the others follow in the order of their expected gains.
2. Judge: a few prefixes of this order (none, 1, 2, 4, ..., all that gained, all) on images of another noise, so that a
   table that was lucky in the ranking has no advantage.
3. Keep the smallest prefix within `loss` dB of the best.

The expected error of a value cannot do this, because it knows nothing of what the value means to the output. Of the
nine tables of mnist-onnx one makes all of the difference (1.8 dB of epsilon), and its expected gain is the third. On
the digits none of the 38 of largest expected gain brings more than 0.04 dB alone, and one that is expected to gain 1.7
dB costs 1.05 dB. Errors of activations are nearly independent: what a table gains or costs alone, it does beside the
others, to 0.2 dB.

Images do not judge: eight sets of tables of the digits whose epsilon falls from 38.4 to 37.1 dB have PSNR between 47.6
and 53.0 dB (median of 4 images), and the one of the worst epsilon has 51.8 dB.

Network calls: (1 + ranked) * calls * samples / batch to rank, and sets * calls * judges / batch to judge, with
log2(tables) + 4 sets at most; the float network is called at every timestep of both. The digits take 27 seconds of one
core for 20 steps and 45 candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mezzotint.runtime.compare import ratio_db
from mezzotint.runtime.streams import SeedOffset

from ..core.islands import Islands
from ..core.pipeline import Context
from ..core.program import Plan, Program, Quantizer, Site
from ..graph.ops import layers
from .simulate import Scene, Simulator, signal
from .units import free_layers, quantized_model, units_of


@dataclass(frozen=True)
class TableLimits:
    """How far tables are measured, and how much is given up for fewer of them.

    - `loss`: in dB of the prediction.
    - `samples`, `judges`: images whose noise ranks, and images of other noise that judge.
    - `calls`: network calls of each image, evenly spaced over the deployment's.
    - `ranked`: the number of tables that are measured one by one.
    """

    loss: float
    samples: int
    judges: int
    calls: int
    ranked: int


@dataclass(frozen=True, eq=False)
class TableChoice:
    """The tables to keep, and the SQNR of the prediction on the judges, dB, by the number of tables.

    `read` is the number of candidates that a quantized layer reads; the others are never written.
    """

    tables: Mapping[Site, Quantizer]
    judged: Mapping[int, float]
    read: int

    def note(self) -> str:
        """Return what the tables are worth, as a line of the history."""
        if not self.read:
            return "no layer reads a table"
        kept, static = self.judged[len(self.tables)], self.judged[0]
        text = f"{len(self.tables)} of {self.read} tables pay: on held-out noise epsilon {static:.2f} -> {kept:.2f} dB"
        return text if len(self.tables) == self.read else f"{text} ({self.judged[self.read]:.2f} dB with all)"


def choose_tables(
    program: Program,
    context: Context,
    candidates: Mapping[Site, Quantizer],
    islands: Sequence[str],
    limits: TableLimits,
    by: str,
) -> TableChoice:
    """Return the tables that pay, of the candidates for the plan's static quantizers, those of most promise first.

    `islands` are those of insert_qdq. The form is that of the lowering `constant`: quantizers on inputs only.
    """
    static = program.require_plan()
    every_layer = list(layers(program.graph))
    roles = Islands(program, every_layer, tuple(islands), by)
    kept = [layer.name for layer in every_layer if roles.reason(layer) is not None]
    free = free_layers(every_layer, kept, static, with_attention=True)
    read = static.read_by(free).quantizers
    candidates = {site: table for site, table in candidates.items() if site in read}
    if not candidates:
        return TableChoice({}, {}, 0)
    trial = _Trial(program, context, limits, by)
    ranking = trial.scenes(SeedOffset.RANKING, limits.samples)
    judging = trial.scenes(SeedOffset.HELD_OUT, limits.judges)
    model = quantized_model(program, units_of(free), static)
    with Simulator(program, context, layers=free, plan=static, model=model, inputs_only=True) as simulator:
        order, gaining = trial.ranked(simulator, ranking, static, candidates)
        cuts = sorted({0, gaining, len(order), *(2**k for k in range(gaining.bit_length()))})
        judged: dict[int, float] = {}
        for cut in cuts:
            plan = _with(static, {site: candidates[site] for site in order[:cut]})
            judged[cut] = _decibels(judging, _error(simulator, judging, plan))
            context.progress(f"{by}: sets of tables", len(judged), len(cuts))
    best = max(judged.values())
    chosen = next(cut for cut in cuts if judged[cut] >= best - limits.loss)
    return TableChoice({site: candidates[site] for site in order[:chosen]}, judged, len(order))


@dataclass(frozen=True, eq=False)
class _Trial:
    """What the steps of one choice share."""

    program: Program
    context: Context
    limits: TableLimits
    by: str

    def scenes(self, seed: SeedOffset, samples: int) -> list[Scene]:
        """Return the scenes of the float trajectory of so many images of this noise."""
        fresh = replace(self.context, seed=seed.after(self.context.seed))
        last = len(self.program.deployment.timesteps) - 1
        calls = sorted({round(float(call)) for call in np.linspace(0, last, self.limits.calls)})
        with Simulator(self.program, self.context) as exact:
            return exact.follow(fresh, calls, samples, f"{self.by}: float trajectory")

    def ranked(
        self, simulator: Simulator, scenes: Sequence[Scene], static: Plan, candidates: Mapping[Site, Quantizer]
    ) -> tuple[list[Site], int]:
        """Return all candidates, those that gain most alone first, and how many of them gain anything."""
        sites = list(candidates)
        measured, others = sites[: self.limits.ranked], sites[self.limits.ranked :]
        before = _error(simulator, scenes, static)
        gains: dict[Site, float] = {}
        for site in measured:
            gains[site] = before - _error(simulator, scenes, _with(static, {site: candidates[site]}))
            self.context.progress(f"{self.by}: tables", len(gains), len(measured))
        measured.sort(key=lambda site: -gains[site])  # stable: equal gains stay in the order of the expected ones
        gaining = sum(gain > 0 for gain in gains.values())
        return [*measured[:gaining], *others, *measured[gaining:]], gaining


def _with(static: Plan, tables: Mapping[Site, Quantizer]) -> Plan:
    return replace(static, quantizers={**static.quantizers, **tables})


def _error(simulator: Simulator, scenes: Sequence[Scene], plan: Plan) -> float:
    """Return the summed squared error of the prediction with all quantizers of a plan."""
    return float(simulator.noise(scenes, lambda call: simulator.quantized(plan, call)).sum())


def _decibels(scenes: Sequence[Scene], error: float) -> float:
    return ratio_db(float(signal(scenes).sum()), error)
