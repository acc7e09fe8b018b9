"""Base of the passes that choose factors for input channels: find the sites, compare candidates, apply, report.

A pass proposes candidates for a value. They are compared by the expected error (compiler/rescaling/smoothing.py), and
the best is applied if it gains enough: `gain` dB where the factors move into the nodes that make the value
(compiler/rescaling/sites.py), `run_time_gain` dB where a Mul has to divide at run time, and that only with `run_time`.
Values with no such site, and without a Mul, are listed in `Program.refused`, each with the reason.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from ..core.islands import Islands
from ..core.pipeline import Context, GraphPass
from ..core.program import Program
from ..core.stats import Stats
from ..errors import StatsError
from ..graph import nodes as graphs
from ..graph.nodes import Names, name_of, remove_dead
from ..graph.ops import Layer, layers
from .scaling import Factors, channel_axis
from .sites import RescalingSite, find_sites, rescale_site
from .smoothing import Evidence, GroupedWeight, Widths

Bits = Literal[2, 3, 4, 5, 6, 7, 8]
WeightBits = Literal[1, 2, 3, 4, 5, 6, 7, 8]
NO_PLACE, NO_AXIS = "no rescaling is exact", "its channels were measured along another axis"


@dataclass(frozen=True)
class ScaledInputs(GraphPass):
    """The options that these passes share.

    `weight_bits`, `activation_bits` and `islands` are those of the plan to come (choose_scales, insert_qdq), `timed`
    says that its activation scales know the timestep, `clipped` that its weights are not rounded over their whole
    range (choose_scales.weights is mse). Layers that stay in float on purpose do not count, and get no Mul.
    """

    weight_bits: WeightBits = 8
    activation_bits: Bits = 8
    timed: bool = True
    clipped: bool = True
    gain: float = 0.1
    run_time: bool = False
    run_time_gain: float = 3.0
    islands: tuple[str, ...] = ("first", "last")

    needs: ClassVar[frozenset[str]] = frozenset({"normal", "stats"})
    tolerance: ClassVar[float | None] = 1e-4  # quotients and products are rounded

    @abstractmethod
    def candidates(self, evidence: Evidence, weights: list[GroupedWeight]) -> Mapping[str, Factors]:
        """Return the candidate factors, by a name for the note. Factors of 1 are always compared, and not listed."""

    def describe(self, tally: Tally) -> str:
        """Return an addition to the note; empty by default."""
        return ""

    def run(self, program: Program, context: Context) -> Program:
        stats = program.require_stats()
        stats.check_graph(graphs.digest(program.model), self.name)
        every_layer = list(layers(program.graph))
        if not any(layer.weight is not None for layer in every_layer):
            return program.noted("no layer has weights: nothing to scale")
        if not stats.squares:
            raise StatsError(
                "no channel that a layer reads was measured by itself",
                where=self.name,
                hint="measure them: --set observe.channels=inputs",
            )
        islands = Islands(program, every_layer, self.islands, self.name)
        names, sites, tally = Names(program.graph), find_sites(program.graph), Tally()
        refused: dict[str, str] = {}
        for i, site in enumerate(sites):
            quantized = [layer for layer in site.readers if islands.reason(layer) is None]
            reason = self._scale(program.graph, names, stats, site, quantized, tally) if quantized else "float layers"
            if reason is not None:
                tally.left[reason] += 1
            if reason in (NO_PLACE, NO_AXIS):
                refused[site.name] = site.reason or NO_AXIS
            context.progress(self.name, i + 1, len(sites))
        remove_dead(program.graph)
        note = "; ".join(part for part in (tally.text(len(sites)), self.describe(tally)) if part)
        return replace(program, refused={**program.refused, **refused}, note=note)

    def _scale(
        self, graph: ir.Graph, names: Names, stats: Stats, site: RescalingSite, quantized: list[Layer], tally: Tally
    ) -> str | None:
        """Apply the best factors of a value and return None, or return why the value stays as it is."""
        numbers = sum(_numbers(stats, layer) for layer in quantized)
        tally.numbers += numbers
        late = site.kind == "run_time"
        if late and not self.run_time:
            return NO_PLACE
        extremes, squares = _measured(stats, quantized)
        if extremes is None or squares is None:
            return NO_AXIS
        weights = [GroupedWeight(layer) for layer in quantized]
        widths = Widths(self.weight_bits, self.activation_bits, self.timed, self.clipped)
        evidence = Evidence(extremes, squares, weights, widths)
        best = None if evidence.silent else evidence.best(self.candidates(evidence, weights))
        if best is None or best[2] < (self.run_time_gain if late else self.gain):
            return "gains too little"
        rescale_site(graph, names, site, best[1])
        tally.take(site, *best, numbers)
        return None


@dataclass
class Tally:
    """Counts of scaled and unscaled values, for the note."""

    taken: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    choices: list[str] = field(default_factory=list)
    factors: list[Factors] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    numbers: int = 0
    late_numbers: int = 0

    def take(self, site: RescalingSite, choice: str, factors: Factors, gain: float, numbers: int) -> None:
        self.taken[site.kind] += 1
        self.choices.append(choice)
        self.factors.append(factors)
        self.gains.append(gain)
        if site.kind == "run_time":
            self.late_numbers += numbers

    def text(self, total: int) -> str:
        """`5 of 20 values scaled (3 norm, 2 run_time), 2.1 dB on average; left alone: ...`."""
        parts = [f"{sum(self.taken.values())} of {total} values scaled"]
        if self.taken:
            parts[0] += f" ({_counted(self.taken)}), {np.mean(self.gains):.1f} dB expected on average"
        if self.late_numbers:
            parts.append(f"Muls at run time over {self.late_numbers / self.numbers:.0%} of what layers read")
        if self.left:
            parts.append(f"left alone: {_counted(self.left)}")
        return "; ".join(parts)


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items()))


def _measured(stats: Stats, quantized: list[Layer]) -> tuple[Factors | None, Factors | None]:
    """Return the extremes `[groups, 2, C]` and mean squares `[C]` of what layers read of one value, or None twice."""
    axes = {name_of(layer.activations[0]): channel_axis(layer) for layer in quantized}
    peaks = [stats.extremes(name, axis) for name, axis in axes.items()]
    squares = [stats.mean_squares(name, axis) for name, axis in axes.items()]
    some_peaks, some_squares = [p for p in peaks if p is not None], [s for s in squares if s is not None]
    if len(some_peaks) < len(peaks) or len(some_squares) < len(squares):
        return None, None
    lows, highs = (np.stack([p[:, end] for p in some_peaks]) for end in (0, 1))
    return np.stack([lows.min(axis=0), highs.max(axis=0)], axis=1), np.mean(some_squares, axis=0)


def _numbers(stats: Stats, layer: Layer) -> int:
    """Return how many numbers a layer read in the measured calls."""
    summary = stats.summary(name_of(layer.activations[0]))
    return 0 if summary is None else summary.count
