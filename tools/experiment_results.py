"""What an experiment found: a table with intervals as Markdown, the same numbers as JSON, and a page of plots.

An interval of 95 % resamples seeds, and the images within each: it covers both kinds of chance where there are several
seeds, and that of the images alone for one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.evaluate.metrics import interval_ends
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.streams import BOOTSTRAP

RESAMPLES = 1000
PAGE, FIGURES, PLOTS = "results.md", "results.json", "plots.png"


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its interval, in the unit of its column; no ends where no images are kept."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, digits: int, sign: str = "") -> tuple[str, str]:
        """Return the value and the interval for display."""
        if self.low is None or self.high is None:
            return f"{self.value:{sign}.{digits}f}", ""
        return f"{self.value:{sign}.{digits}f}", f"{self.low:{sign}.{digits}f} to {self.high:{sign}.{digits}f}"

    def to_json(self) -> dict[str, float | None]:
        """Return the numbers, None for infinite ones: JSON has none."""
        finite = {name: value for name, value in asdict(self).items() if value is not None and np.isfinite(value)}
        return {name: finite.get(name) for name in ("value", "low", "high")}


def over_seeds(values: Sequence[Doubles], statistic: Callable[[Doubles], Any]) -> Interval:
    """Return the statistic of all values, those of each seed `[n]`, with its interval."""
    rng = BOOTSTRAP.generator(0)
    draws = []
    for _ in range(RESAMPLES):
        seeds = [values[i] for i in rng.integers(len(values), size=len(values))]
        draws.append(statistic(np.concatenate([own[rng.integers(len(own), size=len(own))] for own in seeds])))
    return Interval(float(statistic(np.concatenate(list(values)))), *interval_ends(np.array(draws, np.float64)))


@dataclass(frozen=True)
class Table:
    """A table of the page, with a heading above; the columns of numbers are text."""

    heading: str
    columns: tuple[str, ...]
    rows: list[list[str]]

    def lines(self) -> list[str]:
        head = ["", f"## {self.heading}", "", f"| {' | '.join(self.columns)} |", "|---" * len(self.columns) + "|"]
        return [*head, *(f"| {' | '.join(row)} |" for row in self.rows)]


@dataclass(frozen=True)
class Panel:
    """A part of the plots: a value with its interval for each label, one below the other. `zero` draws a line at 0."""

    title: str
    unit: str
    points: list[tuple[str, Interval]]
    zero: bool = False


@dataclass(frozen=True)
class Results:
    """The results of an experiment: what is said above, the tables, the panels in rows of the page, and the JSON."""

    about: str
    tables: list[Table]
    panels: list[list[Panel]]
    facts: dict[str, Any]


def write_results(name: str, results: Results, folder: Path) -> None:
    """Write results.json, results.md and plots.png."""
    text = [f"# {name}", "", results.about]
    for part in results.tables:
        text += part.lines()
    text += ["", f"![The same values with their intervals]({PLOTS})"]
    (folder / FIGURES).write_text(json.dumps(results.facts, indent=1) + "\n", encoding="utf-8", newline="\n")
    (folder / PAGE).write_text("\n".join(text) + "\n", encoding="utf-8", newline="\n")
    plot(results.panels, folder / PLOTS)


def plot(rows: Sequence[Sequence[Panel]], file: Path) -> None:
    """Draw the panels as a page."""
    from matplotlib.figure import Figure

    rows = [[panel for panel in row if panel.points] for row in rows]
    rows = [row for row in rows if row]
    heights = [1 + 0.25 * max(len(panel.points) for panel in row) for row in rows] or [1]
    width = 4.5 * max((len(row) for row in rows), default=1)
    figure: Any = Figure(figsize=(width, sum(heights)), layout="constrained")
    for row, part in zip(rows, np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights)), strict=False):
        for panel, axes in zip(row, np.atleast_1d(part.subplots(1, len(row))), strict=True):
            _draw(panel, axes)
    figure.savefig(file, dpi=100)


def _draw(panel: Panel, axes: Any) -> None:
    finite = [(label, point) for label, point in reversed(panel.points) if np.isfinite(point.value)]
    for y, (_, point) in enumerate(finite):
        if point.low is not None and point.high is not None:
            axes.plot([point.low, point.high], [y, y], color="0.6", linewidth=3, solid_capstyle="butt")
        axes.plot([point.value], [y], "o", color="black", markersize=4)
    axes.set_yticks(range(len(finite)), [label for label, _ in finite], fontsize=8)
    axes.set_ylim(-0.7, max(len(finite) - 0.3, 0.7))
    axes.set_xlabel(panel.unit)
    axes.set_title(panel.title, fontsize=10)
    if panel.zero:
        axes.axvline(0, color="0.4", linewidth=0.8)
