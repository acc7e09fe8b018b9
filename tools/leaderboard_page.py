"""The leaderboard's rows, its verdicts and its page in Markdown; tools/leaderboard.py measures the rows.

Images come first: tables are sorted by the PSNR of the images, and a method is better than its baseline where its
images are. Both draw the same images from the same noise, so the differences of single images are resampled
(mezzotint/evaluate/metrics.py): a difference counts when its interval excludes 0.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from mezzotint.compiler.core.pipeline import Recipe
from mezzotint.evaluate.metrics import RESAMPLES, Metric, with_interval
from mezzotint.runtime.arrays import Doubles

WIDTHS: dict[str, tuple[int, int | str]] = {
    "w8a8": (8, 8),
    "w6a6": (6, 6),
    "w4a8": (4, 8),
    "w3a8": (3, 8),
    "w2a8": (2, 8),
    "w1a8": (1, 8),
    "w4a6": (4, 6),
    "w4a4": (4, 4),
    "w4a16": (4, "float"),  # weight-only
}
"""Bits of weights and of activations."""
IDENTICAL = 200.0  # dB that count for an image without any difference
COLUMNS = ["recipe", "PSNR", "p10", "SQNR", "worst", "speed", "size", "seconds", "kernels", "islands", "beside"]
Known = Mapping[tuple[str, str, float], "Row"]
Recipes = Mapping[str, Recipe]


@dataclass(frozen=True)
class Row:
    """One line of the page. Decibels are None where nothing differs; `refused` says why there are no figures.

    `images` is the PSNR of each image, None for an identical one. `corrected` says that the images and the predictions
    are those behind the bundle's correction. `iterations` is how many each pass that trains was cut to, None for a
    recipe that ran whole. `gain` is that of the images over the baseline's, as it is in the record of a board.
    """

    recipe: str
    width: str
    key: str
    eta: float = 0.0
    corrected: bool = False
    iterations: int | None = None
    sqnr: float | None = None
    worst: float | None = None
    psnr: float | None = None
    psnr_p10: float | None = None
    images: tuple[float | None, ...] = ()
    speed: float | None = None
    size: float | None = None
    seconds: float | None = None
    kernels: str = ""
    islands: int | None = None
    refused: str = ""
    gain: Difference | None = None

    @staticmethod
    def load(file: Path) -> Row | None:
        """Return a row that was measured before; None where there is none, or one of another shape."""
        try:
            return Row.of_json(json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError):
            return None

    @staticmethod
    def of_json(data: object) -> Row:
        """Return the row. Raise ValueError for one of another shape."""
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(Row)}:
            raise ValueError("this is no row of a leaderboard")
        gain = data["gain"] and Difference(Metric(**data["gain"]["median"]), Metric(**data["gain"]["p10"]))
        return Row(**{**data, "images": tuple(data["images"]), "gain": gain})

    def save(self, file: Path) -> None:
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8", newline="\n")
        partial.replace(file)

    @property
    def place(self) -> tuple[str, str, float]:
        return self.recipe, self.width, self.eta

    @property
    def decibels(self) -> Doubles:
        """The PSNR of each image."""
        return np.array([IDENTICAL if db is None else min(db, IDENTICAL) for db in self.images], np.float64)


@dataclass(frozen=True)
class Difference:
    """What the images of a row gained over those of another from the same noise: dB with their intervals."""

    median: Metric
    p10: Metric

    @staticmethod
    def of(row: Row, base: Row) -> Difference | None:
        """Return the differences; None where the rows have no images, or not the same."""
        mine, other = row.decibels, base.decibels
        if len(mine) != len(other) or len(mine) < 2:
            return None

        def tenth(values: Doubles) -> float:
            return float(np.percentile(values, 10, method="lower"))

        return Difference(
            with_interval(lambda rows: float(np.median((mine - other)[rows])), len(mine), RESAMPLES, 0),
            with_interval(lambda rows: tenth(mine[rows]) - tenth(other[rows]), len(mine), RESAMPLES, 0),
        )

    def verdict(self) -> str:
        """Return the words for it: by the median, then by the 10th percentile."""
        median, p10 = _sign(self.median), _sign(self.p10)
        words = {1: "better", -1: "worse"}
        if median * p10 < 0:
            return f"{words[median]} in the median and {words[p10]} in the 10th percentile than"
        return f"{words[median or p10]} than" if median or p10 else "not distinguishable from"


def _sign(metric: Metric) -> int:
    """Return 1 or -1 where the interval excludes 0, else 0."""
    if metric.low is None or metric.high is None:
        return 0
    return int(metric.low > 0) - int(metric.high < 0)


def page(rows: Sequence[Row], title: str, about: str, recipes: Recipes, eta: float = 0.0) -> str:
    """Return the page: one table for each width and eta, best images first, and what each method gained.

    `about` says how the rows were measured, and `eta` is the board's own: other ones are in the headings.
    """
    lines = [
        "# Leaderboard" if title == "digits" else f"# Leaderboard: {title}",
        "",
        f"Written by `tools/leaderboard.py`; do not edit. {'The embedded digits' if title == 'digits' else title}, "
        f"{about}. Only rows that were measured in this way are listed.",
        "",
        "Images come first: PSNR of the final images against the float model's from the same noise, median and 10th "
        "percentile. Then SQNR of epsilon on the latents of the float trajectory, all steps and the worst one (all in "
        "dB); speed against fp32 onnxruntime, empty where it was not measured; the file's share of the fp32 file; "
        "seconds that the passes took; integer and float kernels; layers kept in float. Beside: what the images gained "
        "over the baseline in the median of the paired differences, its 95 % interval "
        f"({RESAMPLES} resamples of the images), and the gain of epsilon. "
        "The interval holds the chance of the images, not that of the calibration: two calibrations of one recipe can "
        "differ by 3 dB of PSNR, and by 0.1 dB of SQNR. Speed is one short measurement each: rows of one size and the "
        "same kernels have the same graph, and show how far to trust it.",
    ]
    if names := list(dict.fromkeys(f"`{row.recipe}`" for row in rows if row.corrected)):
        lines += [
            "",
            f"Images and predictions are those behind the sampling loop's correction for {', '.join(names)}, at the "
            "eta of the paper's claim, and so is the baseline beside them. Images are compared pair by pair: where a "
            "correction reduces the sampler's noise, that is part of the difference.",
        ]
    if any(row.iterations is not None for row in rows):
        lines += ["", "Rows that are cut trained for less than their recipe says: its whole training is longer."]
    known = {row.place: row for row in rows}
    for width in WIDTHS:
        for here in sorted({row.eta for row in rows if row.width == width}, key=lambda other: (other != eta, other)):
            mine = [row for row in rows if (row.width, row.eta) == (width, here)]
            lines += ["", f"## {_heading(width, here, eta)}", *_table(mine, known, recipes)]
    return "\n".join([*lines, "", *_claims(known, recipes, eta)]).rstrip("\n") + "\n"


def _heading(width: str, here: float, eta: float) -> str:
    return width.upper() if here == eta else f"{width.upper()}, eta {here:g}"


def _table(rows: Sequence[Row], known: Known, recipes: Recipes) -> list[str]:
    lines = []
    if measured := sorted((row for row in rows if not row.refused), key=_rank, reverse=True):
        lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        lines += [_line(row, known, recipes) for row in measured]
    for reason in dict.fromkeys(row.refused for row in rows if row.refused):
        names = ", ".join(f"`{row.recipe}`" for row in rows if row.refused == reason)
        lines += ["", f"Refused, {names}: {reason}."]
    return lines


def _rank(row: Row) -> tuple[float, float, float]:
    """Return what rows are sorted by; no decibels are no difference, which nothing exceeds."""
    psnr, p10, sqnr = (float("inf") if db is None else db for db in (row.psnr, row.psnr_p10, row.sqnr))
    return psnr, p10, sqnr


def _line(row: Row, known: Known, recipes: Recipes) -> str:
    numbers = [_number(v, d) for v, d in ((row.psnr, 1), (row.psnr_p10, 1), (row.sqnr, 1), (row.worst, 1))]
    numbers += [_number(row.speed, 2), _number(row.size, 3), _number(row.seconds, 0), row.kernels]
    islands = "" if row.islands is None else str(row.islands)
    short = "" if row.iterations is None else f" cut to {row.iterations} iterations"
    return f"| `{row.recipe}`{short} | " + " | ".join([*numbers, islands, _beside(row, known, recipes)]) + " |"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _baseline(row: Row, known: Known, recipes: Recipes) -> Row | None:
    """Return the row of the recipe that is this one without its method, at the same width and eta."""
    recipe = recipes.get(row.recipe)
    return known.get((recipe.baseline, row.width, row.eta)) if recipe is not None and recipe.baseline else None


def _gain(row: Row, base: Row) -> str:
    """Return what epsilon gained."""
    return "" if row.sqnr is None or base.sqnr is None else f"{row.sqnr - base.sqnr:+.1f}"


def gain_of(row: Row, known: Known, recipes: Recipes) -> Difference | None:
    """Return what the images gained over the baseline's: by the images of both, else what the record says."""
    base = _baseline(row, known, recipes)
    return None if base is None else Difference.of(row, base) or row.gain


def _beside(row: Row, known: Known, recipes: Recipes) -> str:
    base, difference = _baseline(row, known, recipes), gain_of(row, known, recipes)
    if base is None or difference is None:
        return ""
    return f"{_with_ends(difference.median)} / {_gain(row, base)} `{base.recipe}`"


def _with_ends(metric: Metric) -> str:
    ends: Callable[[float | None], str] = lambda value: "" if value is None else f"{value:+.1f}"  # noqa: E731
    return f"{ends(metric.value)} ({ends(metric.low)} to {ends(metric.high)})"


def _claims(known: Known, recipes: Recipes, eta: float) -> list[str]:
    """Return whether the images of each method beat those of its baseline where its paper claims that."""
    lines = ["## Where the papers claim it", ""]
    for recipe in recipes.values():
        for row in known.values():
            if (row.recipe, row.width) != (recipe.name, recipe.claim):
                continue
            base, difference = _baseline(row, known, recipes), gain_of(row, known, recipes)
            if base is None or difference is None:
                continue
            lines.append(
                f"- `{recipe.name}` at {_heading(row.width, row.eta, eta)}: {difference.verdict()} `{base.recipe}`. "
                f"Images {_with_ends(difference.median)} dB in the median, {_with_ends(difference.p10)} dB in the 10th "
                f"percentile; epsilon {_gain(row, base) or 'without error'} dB"
                f"{', behind the correction' if row.corrected else ''}"
                f"{'' if row.iterations is None else f', trained for at most {row.iterations} iterations'}"
            )
    return lines if len(lines) > 2 else []
