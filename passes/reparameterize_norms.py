"""reparameterize_norms: turn a scale and a zero point for each channel behind a norm into one for all channels.

Source: RepQ-ViT (arXiv 2212.08254). The channels behind a LayerNorm differ much in range, and one quantizer for all of
them wastes its grid on the loudest. With D_c and z_c the scale and the zero point of a quantizer for channel c alone,

    D_c = (max_c - min_c) / n     z_c = -min_c / D_c     D, z their means over the channels
    r_c = D_c / D                 o_c = min_c / r_c + z D

    gain / r      shift / r - o      W r      b + (W r) o        so that x' = x / r - o lies in [-z D, (n - z) D]

for every channel. The norm's constants and the readers' weights contain all of it. Nothing is computed at run time,
except that a reader without a bias gets one. For adaptive norms the layer, or the table, of their scale and shift is
changed.

A reader that pads with zeros (a 3x3 convolution) takes no shift, because its padding would have to be o. Then only the
factors are used, with max(|min_c|, |max_c|) for D_c, since the range of such a value contains 0. A norm that an
activation function or the residual stream reads is refused; the refusals are listed.

The extremes are those of all calls together, of the values that the readers read (observe measures them by channel).
The graph changes, so observe has to run again behind this pass. Deviations: r is kept within `limit` of 1, since
channels without a signal would get no factor. The paper's quantizer of attention weights, with powers of the square
root of 2, is a pass of its own (log_attention).

Measured (SQNR of epsilon in dB, 4 calls; norm gains of a few channels multiplied by 10 to 30): a small DiT goes from
14.7 to 39.9 at W8A8 with 32 calibration samples, and with 4 only to 32.5. Without planted outliers (40.1 unchanged)
that would be a loss: every channel's range then ends where calibration saw it end, so unseen inputs are clipped in many
channels. At W4A8 it goes from 9.8 to 23.1. A small conditional UNet goes from 18.5 to 24.9 and from 11.4 to 14.2 with 4
samples. The digits lose 0.4.

Errors: StatsError if observe did not measure the channels of a norm's readers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.nodes import Names, remove_dead
from mezzotint.compiler.rescaling.scaling import Factors
from mezzotint.compiler.rescaling.sites import RescalingSite, find_sites, rescale_site


@dataclass(frozen=True)
class ReparameterizeNorms(GraphPass):
    """Channel quantizers behind a norm, moved into the norm and its readers.

    - `shifts`: also move shifts; otherwise factors only.
    - `limit`: no factor is beyond `limit` or its inverse.
    """

    shifts: bool = True
    limit: float = 100.0

    needs: ClassVar[frozenset[str]] = frozenset({"normal", "stats"})
    tolerance: ClassVar[float | None] = 1e-4  # products are rounded in another order

    def __post_init__(self) -> None:
        if not 1 < self.limit < np.inf:
            raise RecipeError(f"{self.name}.limit is {self.limit}", where=self.name, hint="choose more than 1")

    def run(self, program: Program, context: Context) -> Program:
        graph, stats = program.graph, program.require_stats()
        stats.check_graph(graphs.digest(program.model), self.name)
        names, sites = Names(graph), find_sites(graph)
        refused = {site.name: site.reason for site in sites if site.reason}
        chosen = [site for site in sites if site.kind in ("norm", "adaln")]
        shifted = 0
        for i, site in enumerate(chosen):
            low, high = _extremes(stats, site, self.name)
            if self.shifts and not site.shift_reason:
                rescale_site(graph, names, site, *self._shifted(low, high))
                shifted += 1
            else:
                rescale_site(graph, names, site, self._ratios(np.maximum(np.abs(low), np.abs(high))))
            context.progress(self.name, i + 1, len(chosen))
        remove_dead(graph)
        note = f"{len(chosen)} norms, {shifted} of them shifted; {len(refused)} values refused"
        return replace(program, refused={**program.refused, **refused}, note=note)

    def _ratios(self, ranges: Factors) -> Factors:
        """Return r: the ranges over their mean, within the limit; 1 if no value was ever measured."""
        mean = ranges.mean()
        if mean <= 0:
            return np.ones_like(ranges)
        ratios: Factors = np.clip(ranges / mean, 1 / self.limit, self.limit)
        return ratios

    def _shifted(self, low: Factors, high: Factors) -> tuple[Factors, Factors]:
        """Return (r, o)."""
        widths = high - low
        r = self._ratios(widths)
        safe = np.maximum(widths, widths.mean() / self.limit) if widths.any() else np.ones_like(widths)
        least = (low / safe).mean() * widths.mean()  # -z D
        return r, low / r - least


def _extremes(stats: Stats, site: RescalingSite, where: str) -> tuple[Factors, Factors]:
    """Return the extremes `[C]` of the channels over all calls, from the first of the readers that was measured."""
    for name in (*site.inputs, site.name):
        extremes = [stats.channels[name, k] for k in range(stats.groups) if (name, k) in stats.channels]
        if extremes and extremes[0].shape == (2, site.channels):
            each = np.stack(extremes).astype(np.float64)
            return each[:, 0].min(axis=0), each[:, 1].max(axis=0)
    raise StatsError(
        f"the channels of {site.inputs[0]!r} were not measured by themselves",
        where=where,
        hint="measure the inputs of layers: --set observe.channels=inputs",
    )
