"""balance_heads: factors for the heads of an attention, so that one scale for each operand serves all of them.

    q k^T = (q s) (k / s)^T        s for each channel of a head: rows of the layers that make queries and keys
    p v w = p (v / s) (s w)        s for each head: rows of the layer that makes values, columns of those that read them

SageAttention (arXiv 2410.02367) has a scale for each block of tokens of each head. An integer kernel of onnxruntime has
one for each operand, so here the loud channels of one factor become louder in the other, where that is expected to
help. Nothing is computed at run time. With a and b the largest magnitudes of the channels of q and k, and A and B their
mean squares, the error of the scores is

    max(a s)^2 sum(B / s^2)  +  max(b / s)^2 sum(A s^2)

and s = (b^alpha / a^(1 - alpha)), for channels or for heads, with the alpha that makes it least; s = 1 is a candidate.
A quiet head needs no factor of its own behind that: its scores have the smaller error already, and the softmax sees the
error itself, not its share. Factors of values are powers of the heads' largest values, chosen by the expected error of
the layers behind (compiler/rescaling/smoothing.py), whose weights take them. `center` measures all of them without
their mean token, for center_attention behind this pass.

Products whose operands take no factors are listed as refused: norms of heads, rotary embeddings.

Measured with nothing but the attention quantized, SQNR of epsilon. On digits-dit factors of 0.7 dB expected on average
moved it by -0.3 dB at 8 bits and by nothing at 4, hence `gain`. A random network with queries 30 times as large in one
head, keys as small, and loud values too, goes from 20.5 to 35.0 dB, and from 18.0 to 35.0 where one channel of the
queries is loud.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.calibration.calibrate import follow_trajectories
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.attention import attention_of
from mezzotint.compiler.graph.nodes import Names, name_of, remove_dead
from mezzotint.compiler.graph.score_products import score_products
from mezzotint.compiler.rescaling.scaling import Factors
from mezzotint.compiler.rescaling.search import Bits, WeightBits
from mezzotint.compiler.rescaling.sites import Pair, RescalingSite, find_pairs, find_sites, rescale_pair, rescale_site
from mezzotint.compiler.rescaling.smoothing import Evidence, GroupedWeight, Widths, tamed
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep

_Place = TypeVar("_Place")
_Operands = dict[_Place, dict[str, "_Operand"]]

ALPHAS = tuple(i / 8 for i in range(9))
SILENT_PEAK = 1e-5  # of the loudest channel: a silent one would get the factor 0 or infinity


@dataclass(frozen=True)
class BalanceHeads(GraphPass):
    """Which factors are chosen, and for which plan.

    - `products`: factors of queries and keys; `values`: those of values.
    - `center`: the mean token does not count, because center_attention takes it out behind this pass.
    - `weight_bits`, `activation_bits`: those of the plan to come (choose_scales).
    - `gain`: the fewest decibels that factors must be expected to gain.
    """

    products: bool = True
    values: bool = True
    center: bool = False
    weight_bits: WeightBits = 8
    activation_bits: Bits = 8
    gain: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # products are rounded in another order

    def __post_init__(self) -> None:
        if not (self.products or self.values):
            hint = "choose products or values, or leave the pass out"
            raise RecipeError(f"{self.name} has nothing to balance", where=self.name, hint=hint)

    def run(self, program: Program, context: Context) -> Program:
        graph, names = program.graph, Names(program.graph)
        pairs, sites = self._places(graph)
        refused = {pair.name: pair.reason for pair in pairs if pair.reason}
        wanted = {name: operand for place in (*pairs.values(), *sites.values()) for name, operand in place.items()}
        self._measure(program, context, wanted)
        gains: dict[str, list[float]] = {"products of queries and keys": [], "values": []}
        for pair, operands in pairs.items():
            query, key = operands.values()
            factors, gain = _best(query.of(pair.channels), key.of(pair.channels), query.width)
            if not pair.reason and gain >= self.gain:
                rescale_pair(graph, names, pair, factors)
                gains["products of queries and keys"].append(gain)
        for site, operands in sites.items():
            (value,) = operands.values()
            found = self._of_values(site, value)
            if found is not None:
                rescale_site(graph, names, site, found[0])
                gains["values"].append(found[1])
        remove_dead(graph)
        said = [f"{len(g)} {what} balanced, {np.mean(g):.1f} dB expected on average" for what, g in gains.items() if g]
        return replace(program, refused={**program.refused, **refused}, note="; ".join(said) or "nothing gains enough")

    def _places(
        self, graph: ir.Graph
    ) -> tuple[dict[Pair, dict[str, _Operand]], dict[RescalingSite, dict[str, _Operand]]]:
        """Return the products and the values that may take factors, each with the operands to measure."""
        found = score_products(graph)
        by_node = {pair.node: pair for pair in find_pairs(graph)}
        by_value = {site.value: site for site in find_sites(graph) if site.kind == "value"}
        pairs: _Operands[Pair] = {}
        sites: _Operands[RescalingSite] = {}
        for products in found:
            pair = by_node.get(products.scores)
            if self.products and pair is not None:
                query, key = products.scores.inputs[:2]
                pairs[pair] = {name_of(query): _Operand(query, -1), name_of(key): _Operand(key, -2)}
            attention = attention_of(products.softmax)
            site = None if attention is None else by_value.get(attention.output)
            if self.values and site is not None and products.mix is not None:
                value = products.mix.inputs[1]
                sites[site] = {name_of(value): _Operand(value, -1)}
        return pairs, sites

    def _measure(self, program: Program, context: Context, wanted: Mapping[str, _Operand]) -> None:
        """Let each operand see its values in all calls of the deployment."""
        if not wanted:
            return
        with Executor(program.model, context.folder, taps=list(wanted), threads=context.threads) as executor:

            def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
                seen = executor.call(program.signature, x, t, conditions)
                for name, operand in wanted.items():
                    operand.add(seen[name], center=self.center)
                return np.asarray(seen[program.signature.output], np.float32)

            follow_trajectories(program, context, denoiser, self.name)

    def _of_values(self, site: RescalingSite, value: _Operand) -> tuple[Factors, float] | None:
        """Return (factors `[C]`, gain) of the heads of values, or None where they gain too little."""
        seen = value.of(site.channels)
        if site.channels != value.heads * value.width:
            return None
        widths = Widths(self.weight_bits, self.activation_bits, timed=False)
        weights = [GroupedWeight(layer) for layer in site.readers]
        evidence = Evidence(np.stack([seen.low, seen.high])[None], seen.square, weights, widths)
        loud = _by_head(_audible(seen.peaks), value.width)
        best = None if evidence.silent else evidence.best({f"{a:g}": tamed(loud**a) for a in ALPHAS})
        return None if best is None or best[2] < self.gain else (best[1], best[2])


@dataclass(frozen=True)
class _Channels:
    """Extremes and mean squares `[C]` of the channels of an operand, head by head."""

    low: Factors
    high: Factors
    square: Factors

    @property
    def peaks(self) -> Factors:
        return np.maximum(-self.low, self.high)


@dataclass(eq=False)
class _Operand:
    """What a factor of a product is like: `[batch, heads, ...]` or `[batch, ...]`; `channel` is an axis."""

    value: ir.Value | None
    channel: int
    heads: int = 1
    width: int = 1
    samples: list[_Channels] = field(default_factory=list)

    def add(self, array: npt.NDArray[Any], *, center: bool) -> None:
        """Take in the values of one call."""
        tokens = np.moveaxis(array, self.channel, -1).astype(np.float64)  # [..., tokens, width]
        if center:
            tokens = tokens - tokens.mean(axis=-2, keepdims=True)
        if tokens.ndim < 4:
            tokens = tokens[:, None]
        by_channel = np.moveaxis(tokens, 1, -2).reshape(-1, tokens.shape[1], tokens.shape[-1])
        self.heads, self.width = by_channel.shape[1:]
        ends = (by_channel.min(axis=0), by_channel.max(axis=0), np.square(by_channel).mean(axis=0))
        self.samples.append(_Channels(*ends))

    def of(self, channels: int) -> _Channels:
        """Return what was seen of heads and channels, or of channels alone where heads have their factors in common."""
        seen = self.samples
        low, high = np.min([s.low for s in seen], axis=0), np.max([s.high for s in seen], axis=0)
        square = np.mean([s.square for s in seen], axis=0)
        if channels == self.width:
            return _Channels(low.min(axis=0), high.max(axis=0), square.mean(axis=0))
        return _Channels(low.reshape(-1), high.reshape(-1), square.reshape(-1))


def _audible(peaks: Factors) -> Factors:
    return np.maximum(peaks, SILENT_PEAK * max(float(peaks.max()), 1e-30))


def _by_head(peaks: Factors, width: int) -> Factors:
    """Return the largest of each head's channels, for each of them."""
    return np.repeat(peaks.reshape(-1, width).max(axis=1), width)


def _best(query: _Channels, key: _Channels, width: int) -> tuple[Factors, float]:
    """Return the factors of the queries that make the error of the scores least, and the decibels that they gain."""
    a, b = _audible(query.peaks), _audible(key.peaks)
    heads = _by_head(a, width), _by_head(b, width)
    candidates = [tamed(k**x / q ** (1 - x)) for q, k in ((a, b), heads) for x in ALPHAS]

    def error(s: Factors) -> float:
        of_queries = float((a * s).max() ** 2 * (key.square / s**2).sum())
        return of_queries + float((b / s).max() ** 2 * (query.square * s**2).sum())

    best = min(candidates, key=error)
    return best, float(10 * np.log10(max(error(np.ones_like(a)), 1e-300) / max(error(best), 1e-300)))
