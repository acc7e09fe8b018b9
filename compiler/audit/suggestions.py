"""From the measurements of a layer to a suggestion (mezzotint/debug/diagnose.py lists the rules)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mezzotint.runtime.compare import ratio_db
from mezzotint.runtime.targets import ONNXRUNTIME

from ..core.pipeline import Recipe

SuggestionKind = Literal["outliers", "range", "table", "split", "bits", "rounding", "island", "-"]
SMALL = 0.01  # share of all costs below which a layer is not worth a change
MISFIT = 2.0  # the width of a grid over that of its values, or the inverse
DRIFT = 2.0  # the widest call over the narrowest
OUTLIER = 16.0  # the largest channel of an input over the median of its channels
UNEVEN = 4.0  # the widest part of a Concat over the narrowest
NO_ROUNDING = 0.1  # relative error of a layer's output that no rounding of weights reaches
FULL_BITS = 8


@dataclass(frozen=True)
class Suggestion:
    """The suggested change (`what`, as words or options) and its reason (`why`)."""

    kind: SuggestionKind
    what: str
    why: str

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, "what": self.what, "why": self.why}


@dataclass
class Facts:
    """Measurements of a layer at each call (MEASUREMENTS of side_by_side.py), and of its input over all calls.

    `parts` are the widths of the input's parts, `outlier` the largest channel over the median of the channels.
    """

    calls: dict[int, Mapping[str, float]] = field(default_factory=dict)
    parts: list[float] = field(default_factory=list)
    outlier: float = 1.0

    def add(self, call: int, facts: Mapping[str, float], parts: Sequence[float], outlier: float = 1.0) -> None:
        self.calls[call] = facts
        self.outlier = max(self.outlier, outlier)
        self.parts = [max(pair) for pair in zip(self.parts or parts, parts, strict=True)]

    def merge(self, other: Facts) -> None:
        """Add what was measured at other calls."""
        self.calls |= other.calls
        self.outlier = max(self.outlier, other.outlier)
        self.parts = [max(pair) for pair in zip(self.parts or other.parts, other.parts, strict=True)]

    def local(self) -> dict[int, float]:
        """Return the SQNR of the output by call, in decibels."""
        return {call: ratio_db(facts["signal"], facts["noise"]) for call, facts in self.calls.items()}

    def relative(self) -> dict[str, float]:
        """Return error over signal of all calls: of `input` and `output` rounding, and of `weights`, the rest."""
        total = _over(self._sum("noise"), self._sum("signal"))
        of_input = _over(self._sum("x_noise"), self._sum("x_signal"))
        of_output = _over(self._sum("y_noise"), self._sum("signal"))
        return {"input": of_input, "output": of_output, "weights": max(0.0, total - of_input - of_output)}

    def widths(self, end: Literal["x", "y"]) -> list[float]:
        """Return the width of the values at a grid, by call."""
        return [max(facts[f"{end}_high"], 0.0) - min(facts[f"{end}_low"], 0.0) for facts in self.calls.values()]

    def reaches(self, end: Literal["x", "y"]) -> list[float]:
        """Return the width of the grid, by call."""
        return [facts[f"{end}_reach"] for facts in self.calls.values()]

    def _sum(self, name: str) -> float:
        return sum(facts.get(name, 0.0) for facts in self.calls.values())


def suggest(layer: str, facts: Facts, share: float, recipe: Recipe, weight_bits: int | None) -> Suggestion:
    """Return the suggestion for a layer with this share of all costs. `weight_bits` is None for attention."""
    if share < SMALL:
        return Suggestion("-", "leave it", f"it causes less than {SMALL:.0%} of the error")
    relative = facts.relative()
    part = max(relative, key=lambda name: relative[name])
    # A few large channels hide the rounding of the others in the input, and not in the output.
    if part != "output" and facts.outlier > OUTLIER:
        return Suggestion(
            "outliers",
            "move the channels' scales into the weights: --recipe smoothquant, repq or ditas",
            f"a channel of its input is {_factor(facts.outlier)} times as large as most, and they share a grid",
        )
    if part == "weights":
        return _of_weights(layer, relative[part], recipe, weight_bits)
    end: Literal["x", "y"] = "x" if part == "input" else "y"
    widths, reaches = facts.widths(end), facts.reaches(end)
    constant = max(reaches) <= min(reaches) * (1 + 1e-6)
    fits = max(reaches) / max(widths) if constant and max(widths) else _median_ratio(reaches, widths)
    if fits > MISFIT or fits < 1 / MISFIT:
        return Suggestion(
            "range",
            "calibrate again: more samples (--calibration-samples), or choose_scales.activations=minmax or percentile",
            f"the grid of its {part} is {fits:.2g} times as wide as its values",
        )
    drift = max(widths) / max(min(widths), 1e-30)
    if constant and drift > DRIFT:
        return Suggestion(
            "table",
            f"scales that depend on the timestep: {_tables(recipe)} in your recipe",
            f"its {part} is {drift:.2g} times as wide at one step as at another, and has one scale",
        )
    uneven = max(facts.parts) / max(min(facts.parts), 1e-30) if facts.parts else 1.0
    if part == "input" and uneven > UNEVEN:
        return Suggestion(
            "split",
            "put split_shortcuts after normalize in the recipe",
            f"one part of its input is {uneven:.2g} times as wide as another, and they share a grid",
        )
    return Suggestion("island", islands_option(recipe, [layer]), f"the rounding of its {part} causes most of its error")


def _of_weights(layer: str, relative: float, recipe: Recipe, bits: int | None) -> Suggestion:
    if bits is None:
        return Suggestion(
            "island", islands_option(recipe, [layer]), "the rounding of its second input causes most of its error"
        )
    if relative > NO_ROUNDING:
        return Suggestion(
            "range",
            "compile again, and compare with the model that it was compiled from",
            f"its weights, bias or their scales are off by {ratio_db(1.0, relative):.1f} dB, "
            "more than any rounding causes",
        )
    if bits < FULL_BITS:
        return Suggestion(
            "bits", f"--set choose_scales.weight_bits={FULL_BITS}", f"its weights have {bits} bits and cause most of it"
        )
    if all(step.name != "round_weights" for step in recipe.passes):
        return Suggestion(
            "rounding",
            f"round the weights against their inputs: --recipe {best_recipe(recipe)}, or round_weights at the end of "
            "your recipe",
            "its weights cause most of its error, and were rounded to the nearest",
        )
    return Suggestion("island", islands_option(recipe, [layer]), "its weights cause most of its error")


def _tables(recipe: Recipe) -> str:
    return "--recipe w8a8-steps, or step_scales" if recipe.target == ONNXRUNTIME else "step_scales with a lower gain"


def best_recipe(recipe: Recipe) -> str:
    """Return the name of the best recipe of ours for the target of a recipe (passes/recipes/targets.py has it too)."""
    return "w8a8-best" if recipe.target == ONNXRUNTIME else "w8a8-constant"


def islands_option(recipe: Recipe, layers: Sequence[str]) -> str:
    """Return the options that keep layers in float, in addition to the islands of the recipe."""
    islands = [*recipe.islands, *layers]
    listed = ", ".join(_quoted(i) for i in islands)
    return " ".join(f"--set '{name}.islands=[{listed}]'" for name in recipe.islands_by_pass)


def _factor(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def _quoted(name: str) -> str:
    """Return a node's name as YAML, with the wildcards of a pattern in brackets."""
    plain = name.replace("[", "[[]")
    return plain if plain.replace("_", "").replace("-", "").isalnum() else f'"{plain}"'


def _median_ratio(reaches: Sequence[float], widths: Sequence[float]) -> float:
    return float(np.median([reach / max(width, 1e-30) for reach, width in zip(reaches, widths, strict=True)]))


def _over(noise: float, signal: float) -> float:
    return noise / signal if signal > 0 else 0.0
