"""The entropy of the integers that a unit reads, which ties it to the unit behind it.

Q-VLM (arXiv 2410.08119) observes that the error of a layer depends more on the rounding of the layer before it, the
higher the entropy of that one's quantized activations is. It searches such layers together, at most three at once. The
entropy of an activation is

    H = - sum over integers q of p(q) log2 p(q),     p(q) the share of values that are rounded to q,

in bits. The shares are those of the calibration's histogram (compiler/core/stats.py), with values spread evenly inside
of a bin. With a table each call has the row that it uses, and H is the mean over the values of all calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core.formats import Format
from ..core.program import Program, Quantizer
from ..core.stats import Stats, Summary
from ..errors import RecipeError, StatsError
from ..graph.nodes import digest, name_of
from ..graph.ops import layers
from ..rounding.layer_inputs import Inputs
from ..rounding.weights import find_weights
from .units import GraphUnit

WHERE = "reconstruct.joined_by"


def ties_by_entropy(units: Sequence[GraphUnit], program: Program) -> list[float]:
    """Return the entropy of the first unit of each pair of neighbours.

    Raise StatsError where the statistics are gone or another graph's, and RecipeError where no activation is quantized.
    """
    if program.stats is None:
        raise StatsError("the statistics of the activations are gone", where=WHERE, hint="run observe in this recipe")
    program.stats.check_graph(digest(program.require_float_model()), WHERE)
    found = [entropy_of(unit, program) for unit in units]
    if units and not any(found):
        raise RecipeError(
            "no layer of a unit reads quantized activations, whose entropy would tie it to the next",
            where=WHERE,
            hint="quantize activations, or set reconstruct.joined_by to capacity",
        )
    return found[:-1]


def entropy_of(unit: GraphUnit, program: Program) -> float:
    """Return the mean entropy in bits of the quantized activations that layers with weights read in a unit.

    An activation counts once. It is 0 for a unit that reads none.
    """
    plan, stats = program.require_plan(), program.require_stats()
    floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
    found: dict[tuple[str, Quantizer], float] = {}
    for weight in find_weights(program.graph):
        for node, value in zip(weight.readers, Inputs.of(weight, floats, WHERE).float_taps, strict=True):
            quantizer = plan.of(value, node.name or name_of(node.outputs[0]))
            if quantizer is None or quantizer.axis is not None or name_of(node.outputs[0]) not in unit.computed:
                continue
            if (value, quantizer) not in found:
                found[value, quantizer] = _over_calls(stats, value, quantizer, plan.groups)
    return float(np.mean(list(found.values()))) if found else 0.0


def _over_calls(stats: Stats, value: str, quantizer: Quantizer, rows: Sequence[int]) -> float:
    """Return the entropy of one activation; `rows` are those of the calls in a table."""
    if not quantizer.table:
        summary = stats.summary(value)
        return 0.0 if summary is None else entropy_of_integers(summary, *_point(quantizer), quantizer.format)
    if stats.groups != len(rows):
        raise StatsError(
            f"statistics of {stats.groups} groups for {len(rows)} network calls with a table of scales",
            where=WHERE,
            hint="measure every call on its own: --set observe.groups=0",
        )
    measured = [(stats.summaries[value, k], row) for k, row in enumerate(rows) if (value, k) in stats.summaries]
    bits = [entropy_of_integers(summary, *_point(quantizer, row), quantizer.format) for summary, row in measured]
    return float(np.average(bits, weights=[summary.count for summary, _ in measured])) if measured else 0.0


def _point(quantizer: Quantizer, row: int = 0) -> tuple[float, int]:
    """Return the scale and the zero point of a row, or of a quantizer without rows."""
    return float(quantizer.scale.reshape(-1)[row]), int(quantizer.zero_point.reshape(-1)[row])


def entropy_of_integers(summary: Summary, scale: float, zero_point: int, fmt: Format) -> float:
    """Return the entropy in bits of the integers that the values of a summary are rounded to."""
    low, high, counts = summary.bins()
    between = (np.arange(fmt.qmin, fmt.qmax) + 0.5 - zero_point) * scale  # where one integer ends and the next begins
    wide, reached = high > low, between[:, None] - low
    inside = np.where(wide, np.clip(reached / np.where(wide, high - low, 1), 0, 1), reached > 0)
    below = inside @ counts / max(summary.count, 1)
    shares = np.diff(below, prepend=0.0, append=1.0)
    some = shares[shares > 0]
    return float(-(some * np.log2(some)).sum())
