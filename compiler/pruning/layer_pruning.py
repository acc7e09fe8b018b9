"""One weight pruned against H: the mask and the values of what stays, by Optimal Brain Surgeon or by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..rounding.downdated import precise
from ..rounding.matrix import ColumnOrder, Kept, Matrix, check_gram, inverse_root, row_errors
from .blocked import swept
from .greedy import removed
from .patterns import PruningPattern, column_order
from .restoration import polished, restored

PruningMethod = Literal["obs", "magnitude"]


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """`values` `[rows, d]`, the squared error of the outputs as a share of their power, and the damping of H."""

    values: Floats
    share: float
    damp: float


@dataclass(frozen=True)
class LayerPruner:
    """The options of pruning a layer: `exact` inputs at most in one piece, more in blocks of `block` with `polish`.

    `damp` is the ridge, as a share of the mean diagonal of H; it is raised tenfold as often as H needs it.
    """

    pattern: PruningPattern
    method: PruningMethod
    exact: int
    block: int
    polish: int
    damp: float

    def prune_groups(self, rows: Matrix, grams: Matrix, channels: int, sparsity: float, where: str) -> PrunedLayer:
        """Prune a weight `[rows, d]` whose rows belong to the groups of a convolution, with H `[groups, d, d]`.

        `channels` are the input channels of a group. Raises PassError for inputs that are not finite.
        """
        values = np.empty(rows.shape, np.float32)
        each = len(rows) // len(grams)
        error, power, damp = 0.0, 0.0, 0.0
        for g, gram in enumerate(grams):
            part = slice(g * each, (g + 1) * each)
            values[part], used = self.prune(rows[part], gram, channels, sparsity, where)
            error += float(row_errors(rows[part] - values[part], gram).sum())
            power += float(row_errors(rows[part], gram).sum())
            damp = max(damp, used)
        return PrunedLayer(values, error / power if power > 0 else 0.0, damp)

    def prune(self, weight: Matrix, gram: Matrix, channels: int, sparsity: float, where: str) -> tuple[Floats, float]:
        """Return (pruned values `[rows, d]`, the damping) of a weight with so many input channels and one H `[d, d]`.

        Columns are (channel, position). `sparsity` is the share to remove; N:M removes its own.
        """
        order = column_order(channels, weight.shape[1] // channels)
        turned = weight[:, order]
        count = self.pattern.removals(turned.shape, sparsity)
        if self.method == "magnitude":
            kept, values, damp = by_magnitude(turned, count, self.pattern), turned, self.damp
        else:
            kept, values, damp = self._surgeon(turned, gram, order, count, where)
        found = np.empty(weight.shape, np.float32)
        found[:, order] = np.where(kept, values, 0)
        return found, damp

    def _surgeon(
        self, weight: Matrix, gram: Matrix, order: ColumnOrder, count: int, where: str
    ) -> tuple[Kept, Matrix, float]:
        check_gram(gram, where)
        root = inverse_root(gram, order, self.damp, where)
        here = gram[np.ix_(order, order)]
        np.einsum("ii->i", here)[...] += root.damp * np.diagonal(gram).mean(dtype=np.float64)
        if weight.shape[1] <= self.exact:
            upper = root.upper.astype(np.float64)
            kept = removed(weight, precise(upper.T @ upper), count, self.pattern)
            return kept, restored(weight, here, kept), root.damp
        kept, values = swept(weight, root, count, self.pattern, self.block)
        return kept, polished(weight, values, here, kept, self.polish), root.damp


def by_magnitude(weight: Matrix, count: int, pattern: PruningPattern) -> Kept:
    """Return the mask that is left when the smallest weights go: in each group, or of the layer, or its blocks."""
    sizes = np.square(weight, dtype=np.float64)
    if pattern.group:
        groups = sizes.reshape(len(weight), -1, pattern.group)
        places = np.argsort(groups, axis=2, kind="stable")[:, :, : pattern.group - pattern.kept]
        kept = np.ones(groups.shape, bool)
        np.put_along_axis(kept, places, values=False, axis=2)
        return kept.reshape(weight.shape)
    blocks = sizes.reshape(len(weight), -1, pattern.block).sum(axis=2)
    kept = np.ones(blocks.size, bool)
    kept[np.argsort(blocks.reshape(-1), kind="stable")[:count]] = False
    return np.repeat(kept.reshape(blocks.shape), pattern.block, axis=1)
