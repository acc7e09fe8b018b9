"""How one layer is split: its rounding, its metric, and the options that all layers have in common."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..core.formats import scale_for_range
from ..rounding import matrix as rounding
from ..rounding.layer_inputs import FloatInputs, Gathered
from ..rounding.matrix import Matrix
from ..scales.weights import WeightMethod, row_limits, weight_format
from .residual import FitWeighting, LayerMetric, Rounder, SplitWeight, alternated

SplitRounding = Literal["nearest", "gptq"]
GPTQ_BLOCK = 128


@dataclass(frozen=True, eq=False)
class LayerView:
    """A weight `[rows, d]` beside H `[d, d]` of its inputs, and the noise of their rounding."""

    name: str
    rows: Floats
    gram: Matrix
    noise: float

    @staticmethod
    def of(name: str, inputs: FloatInputs, gathered: Gathered, activation_bits: int | None) -> LayerView:
        """Return the view of a weight; without `activation_bits` its inputs have no noise. Raises PassError."""
        gram = gathered.gram(inputs)[0]
        rounding.check_gram(gram, name)
        noise = 0.0 if activation_bits is None else gathered.extent(inputs).rounding_noise(activation_bits)
        return LayerView(name, inputs.rows(), gram, noise)


@dataclass(frozen=True)
class LayerSplitter:
    """The options of splitting a layer, as split_ranks has them."""

    weighting: FitWeighting
    rounding: SplitRounding
    weights: WeightMethod
    iterations: int
    half: bool
    damp: float

    def split(self, view: LayerView, rank: int, bits: int) -> SplitWeight:
        """Return the split of a weight whose residual has so many bits."""
        metric = LayerMetric(view.gram, view.noise, self.weighting)
        return alternated(view.rows, metric, rank, self.rounder(view, bits), self.iterations, half=self.half)

    def errors(self, view: LayerView, ranks: Iterable[int], bits: int) -> dict[int, float]:
        """Return, by rank, the error of the outputs as a share of their power; rank 0 has no branch."""
        metric = LayerMetric(view.gram, view.noise, self.weighting)
        rounder, power = self.rounder(view, bits), metric.power(view.rows)
        found: dict[int, float] = {}
        for rank in ranks:
            if rank:
                split = alternated(view.rows, metric, rank, rounder, self.iterations, half=self.half)
                found[rank] = split.error
            else:
                found[rank] = metric.error(view.rows - rounder(view.rows), view.rows)[0] / power
        return found

    def rounder(self, view: LayerView, bits: int) -> Rounder:
        """Return what rounds residuals of this weight, with scales searched for each."""
        grid = weight_format(bits)
        root = None
        if self.rounding == "gptq":
            root = rounding.inverse_root(view.gram, rounding.input_order(view.gram, True), self.damp, view.name)

        def rounded(rows: Floats) -> Floats:
            limit = row_limits(rows, grid, self.weights)
            scale, _ = scale_for_range(-limit, limit, grid)
            if root is None:
                integers = rounding.nearest(rows, scale, grid)
            else:
                integers = rounding.gptq(rows, root, scale, grid, block=GPTQ_BLOCK)
            return np.asarray(scale[:, None] * integers, np.float32)

        return rounded
