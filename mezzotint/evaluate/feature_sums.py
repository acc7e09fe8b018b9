"""What a distance between sets of images needs of their features, as sums that grow with no number of images.

Features come in the order of the pairs and are forgotten: the moments of each set are kept, and those of each draw of
the bootstrap. A draw takes n rows of n with replacement, so it is a count c_i of each row, and its moments are

    count = sum c_i,   mean = sum c_i f_i / count,   scatter = sum c_i f_i f_i^T - count mean mean^T

with the mean of the first rows subtracted from all f_i, which keeps their precision. The draws of 2048 features have
more sums than fit into memory beside a network: above DRAWS_BYTES they lie in a temporary file without a name.

The inception score (Salimans et al. 2016, arXiv 1606.03498) of one set is exp(mean KL(p(y | x) || p(y))) over classes
y, from the sums of p and of p log p. It is taken over all images at once, not as the mean of ten parts.

Neighbours of all images need all features. Precision and recall are therefore those of the first MANIFOLD pairs.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.streams import BOOTSTRAP

from ..frechet import Features, Moments
from .extractors import ImageFeatures

DRAWS_BYTES = 256 << 20
BUFFER_BYTES = 32 << 20  # of features that wait: the sums of the draws are gone through once for so many
MANIFOLD = 10_000
MANY_FEATURES, FEW_DRAWS = 256, 40  # a distance takes some milliseconds for 64 features, and ten seconds for 2048
MOST_DRAWS = 200

DrawCounts = npt.NDArray[np.uint8]
"""How often each draw has each row, `[draws, n]`."""


def draw_counts(n: int, draws: int, seed: int) -> DrawCounts:
    """Return the counts of draws of n rows with replacement: those that `metrics.interval` draws with this seed."""
    rng = BOOTSTRAP.generator(seed)
    found = np.empty((draws, n), np.uint8)
    for row in found:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return found


class _Blocks:
    """Rows that come in parts, as blocks of a fixed number of rows: sums do not depend on the parts."""

    def __init__(self) -> None:
        self._waiting: list[Features] = []
        self._count = 0

    def add(self, rows: Features) -> Iterator[Features]:
        """Take rows `[m, D]`; yield the blocks that are full."""
        self._waiting.append(rows)
        self._count += len(rows)
        size = max(BUFFER_BYTES // max(rows[:1].nbytes, 1), 1)
        if self._count < size:
            return
        whole = np.concatenate(self._waiting)
        full = len(whole) - len(whole) % size
        self._waiting, self._count = [whole[full:]], len(whole) - full
        for first in range(0, full, size):
            yield whole[first : first + size]

    def rest(self) -> Iterator[Features]:
        """Yield the rows of the last block, if there are any, and forget them."""
        if self._count:
            rows = np.concatenate(self._waiting)
            self._waiting, self._count = [], 0
            yield rows


class DrawnMoments:
    """The moments of features that come in the order of their rows, and those of each draw."""

    def __init__(self, counts: DrawCounts) -> None:
        self._counts = counts
        self._whole = Moments()
        self._blocks = _Blocks()
        self._done = 0
        self._shift: Doubles = np.zeros(0)

    def add(self, features: Features) -> None:
        """Add the next rows `[m, D]`."""
        for rows in self._blocks.add(features):
            self._sum(rows)

    def whole(self) -> Moments:
        """Return the moments of all rows. Call it after the last add()."""
        for rows in self._blocks.rest():
            self._sum(rows)
        return self._whole

    @property
    def draws(self) -> int:
        """The number of draws whose moments are kept."""
        few = self._whole.dimensions > MANY_FEATURES
        return min(len(self._counts), FEW_DRAWS if few else MOST_DRAWS)

    def draw(self, index: int) -> Moments:
        """Return the moments of one draw. Call it after whole()."""
        count, sums = self._sizes[index], self._sums[index]
        mean = sums / count
        scatter = self._products[index] - np.outer(mean, sums)
        return Moments.of(int(count), mean + self._shift, scatter)

    def _sum(self, rows: Features) -> None:
        self._whole.add(rows)
        if not self._done:
            self._begin()
        counts = self._counts[: self.draws, self._done : self._done + len(rows)].astype(np.float64)
        shifted = rows - self._shift
        self._sizes += counts.sum(axis=1)
        self._sums += counts @ shifted
        for weights, products in zip(counts, self._products, strict=True):
            products += shifted.T @ (weights[:, None] * shifted)
        self._done += len(rows)

    def _begin(self) -> None:
        size = self._whole.dimensions
        shape = (self.draws, size, size)
        self._shift = self._whole.mean
        self._sizes, self._sums = np.zeros(self.draws), np.zeros((self.draws, size))
        large = 8 * math.prod(shape) > DRAWS_BYTES
        if not large:
            self._products: Doubles = np.zeros(shape)
            return
        with tempfile.TemporaryFile() as file:  # the array has a handle of its own
            self._products = np.memmap(file, np.float64, "w+", shape=shape)


class DrawnClasses:
    """The inception score of a set, and that of each draw, from logits that come in the order of their rows."""

    def __init__(self, counts: DrawCounts) -> None:
        self._counts = np.concatenate([np.ones((1, counts.shape[1]), np.uint8), counts])  # the first: all rows
        self._blocks = _Blocks()
        self._done = 0
        self._sums: Doubles = np.zeros(0)
        self._negative_entropy = np.zeros(len(self._counts))

    def add(self, logits: Features) -> None:
        """Add the next rows `[m, K]`."""
        for rows in self._blocks.add(logits):
            self._sum(rows)

    def _sum(self, logits: Features) -> None:
        from scipy.special import log_softmax

        logs = log_softmax(logits.astype(np.float64), axis=1)
        likely = np.exp(logs)
        counts = self._counts[:, self._done : self._done + len(logits)].astype(np.float64)
        self._sums = counts @ likely + (self._sums if self._done else 0)
        self._negative_entropy += counts @ (likely * logs).sum(axis=1)
        self._done += len(logits)

    def scores(self) -> Doubles:
        """Return the score of all rows, and behind it that of each draw. Call it after the last add()."""
        for rows in self._blocks.rest():
            self._sum(rows)
        total = self._counts[:, : self._done].sum(axis=1, dtype=np.float64)
        mean = self._sums / total[:, None]
        marginal = (mean * np.log(np.maximum(mean, 1e-300))).sum(axis=1)
        scores: Doubles = np.exp(self._negative_entropy / total - marginal)
        return scores


class SetSums:
    """The sums of one set of images. `spatial` and `classes` are None where the network has no such output."""

    def __init__(self, counts: DrawCounts) -> None:
        self._counts = counts
        self.moments = DrawnMoments(counts)
        self.spatial: DrawnMoments | None = None
        self.classes: DrawnClasses | None = None
        self._first: list[Features] = []
        self._kept = 0

    def add(self, found: ImageFeatures) -> None:
        """Add the next images."""
        self.moments.add(found.features)
        if found.spatial is not None:
            self.spatial = self.spatial or DrawnMoments(self._counts)
            self.spatial.add(found.spatial)
        if found.logits is not None:
            self.classes = self.classes or DrawnClasses(self._counts)
            self.classes.add(found.logits)
        if (room := MANIFOLD - self._kept) > 0:
            self._first.append(found.features[:room])
            self._kept += len(self._first[-1])

    def first(self) -> Features:
        """Return the features of the first MANIFOLD images, `[m, D]`."""
        return np.concatenate(self._first)


class FeatureSums:
    """The sums of both sets of n pairs, for so many `resamples` of the bootstrap, at most MOST_DRAWS."""

    def __init__(self, n: int, resamples: int, seed: int = 0) -> None:
        counts = draw_counts(n, 0 if resamples < 2 or n < 2 else min(resamples, MOST_DRAWS), seed)
        self.exact, self.quantized = SetSums(counts), SetSums(counts)

    def add(self, exact: ImageFeatures, quantized: ImageFeatures) -> None:
        """Add the next pairs."""
        self.exact.add(exact)
        self.quantized.add(quantized)
