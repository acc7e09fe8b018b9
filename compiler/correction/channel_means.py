"""Means of values by channel, computed inside the graph: a network call returns `[rows, C]`, never a feature map.

A bias correction needs only the paired means of two graphs. `with_means` adds one ReduceMean for each chosen value.
`ChannelMeans` accumulates the results of the calls: sums and sums of squares over samples, in float64, with a row for
each row of a time table, or one row for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Doubles

from ..graph.nodes import Builder, Names, name_of
from ..graph.require import producer, shape_of

AXES_AS_INPUT = 18  # before this opset, the axes of a ReduceMean are an attribute


def with_means(model: ir.Model, values: Sequence[tuple[str, int]]) -> tuple[ir.Model, list[str]]:
    """Return a clone with the mean of each value as an additional output, and the names of those outputs.

    `values` are names with the axis of the channels. All other axes except the first one (the batch) are averaged.
    """
    clone = model.clone()
    graph, names = clone.graph, Names(clone.graph)
    known = {name_of(out): out for node in graph for out in node.outputs}
    opset = model.opset_imports.get("", AXES_AS_INPUT)
    means: list[str] = []
    for name, axis in values:
        value = known[name]
        averaged = [d for d in range(1, len(shape_of(value))) if d != axis]
        build = Builder(graph, names, after=producer(value))
        mean = _reduce_mean(build, value, averaged, f"{name}_channel_mean", opset)
        graph.outputs.append(mean)
        means.append(name_of(mean))
    return clone, means


def _reduce_mean(build: Builder, value: ir.Value, axes: list[int], stem: str, opset: int) -> ir.Value:
    shape = [d for i, d in enumerate(value.shape or ()) if i not in axes]
    kind: dict[str, Any] = {"dtype": value.dtype, "shape": shape}
    if not axes:
        return build.op("Identity", [value], stem, **kind)
    if opset < AXES_AS_INPUT:
        return build.op("ReduceMean", [value], stem, attributes={"axes": axes, "keepdims": 0}, **kind)
    where = build.constant(f"{stem}_axes", np.array(axes, np.int64))
    return build.op("ReduceMean", [value, where], stem, attributes={"keepdims": 0}, **kind)


class ChannelMeans:
    """Mean difference of one value between two graphs, by row of a time table (or one row) and channel."""

    def __init__(self, rows: int, channels: int) -> None:
        self.rows, self.channels = rows, channels
        self._count = np.zeros((rows, 1))
        self._total = np.zeros((rows, channels))
        self._square = np.zeros((rows, channels))

    def add(self, row: int, exact: npt.NDArray[Any], actual: npt.NDArray[Any], samples: int) -> None:
        """Accumulate one call's means, both `[samples * k, C]`: k tokens of one sample count as one."""
        difference = actual.astype(np.float64) - exact.astype(np.float64)
        difference = difference.reshape(samples, -1, difference.shape[-1]).mean(axis=1)
        self._count[row] += samples
        self._total[row] += difference.sum(axis=0)
        self._square[row] += (difference**2).sum(axis=0)

    def overall(self) -> Doubles:
        """Return the mean over all rows, `[1, C]`."""
        mean: Doubles = self._total.sum(axis=0, keepdims=True) / max(float(self._count.sum()), 1.0)
        return mean

    def by_row(self) -> Doubles:
        """Return the mean of each row, `[rows, C]`, shrunk towards the mean over all rows (James and Stein).

        With d the variance between the rows' means and e the squared standard error of a row, both by channel, a row
        keeps the share max(0, 1 - e / d) of its distance. Rows with one sample have no estimate of e, and get the
        common mean.
        """
        overall = self.overall()
        seen = self._count[:, 0] > 1
        rows: Doubles = np.repeat(overall, len(self._count), axis=0)
        if not seen.any():
            return rows
        count, mean = self._count[seen], self._total[seen] / self._count[seen]
        error = (np.maximum(self._square[seen] / count - mean**2, 0.0) / (count - 1)).mean(axis=0)
        spread = ((mean - overall) ** 2).mean(axis=0)
        share = np.maximum(0.0, 1.0 - error / np.maximum(spread, 1e-300))
        rows[seen] += share * (mean - overall)
        return rows
