"""How much each input of a weight matters to its layers' outputs: the diagonal of H, from statistics alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..core.stats import Stats
from ..errors import StatsError
from ..graph.nodes import name_of
from ..graph.ops import Layer
from .scaling import channel_axis


def input_importance(readers: Sequence[Layer], inputs: int, stats: Stats | None, by: str) -> Floats:
    """Return the mean square of each input `[groups, inputs]` over all calls, summed over the layers of one weight.

    Without statistics all inputs count as 1. `by` is the name of the pass. Raises StatsError for an input that was not
    measured by channel, and for readers that differ in their groups.
    """
    groups = {_groups(layer) for layer in readers}
    if len(groups) > 1:
        raise StatsError("one weight is read by convolutions of different groups", where=readers[0].name)
    total = np.zeros((groups.pop(), inputs))
    for layer in readers:
        if stats is None:
            total += 1.0
            continue
        squares = stats.mean_squares(name_of(layer.activations[0]), channel_axis(layer))
        if squares is None:
            raise StatsError(
                "its input was not measured by channel",
                where=layer.name,
                hint=f"measure the inputs of layers in front of {by}: --set observe.channels=inputs",
            )
        parts = squares.reshape(len(total), -1)
        total += np.repeat(parts, inputs // parts.shape[1], axis=1)
    total[total.sum(axis=1) == 0] = 1.0  # silent inputs: every point of a grid is as good as any other
    return total.astype(np.float32)


def _groups(layer: Layer) -> int:
    return int(layer.node.attributes["group"].as_int()) if "group" in layer.node.attributes else 1
