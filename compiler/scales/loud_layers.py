"""Layers that 8 bits ruin, because their input has few values far louder than the others.

An activation has one scale for all tokens and channels. A loud channel, or a loud token such as the first of a CLIP
prompt (MixDQ, arXiv 2405.17873), leaves a few levels of the grid to all others. How many is

    levels = geometric mean of |x| / step of an 8-bit grid over the chosen range

15 for normal numbers with the range of 99.999 %, 6 for Laplace's. The geometric mean hardly moves with the outliers,
which a root mean square measures instead of the others. With 3 levels the rounding is 26 dB below the others, if these
are normal. Two kinds of layers are asked:

- products of queries and keys, and of weights and values. A factor that is never negative is what a softmax made:
  almost all of it is near 0, and means to be.
- layers of the prompt, which the sample does not reach: they have few tokens, so that float costs little time. What
  gates make of image tokens has as few levels, and 8 bits do for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from ..core.program import Program, Quantizer, Site
from ..core.stats import Stats, Summary
from ..graph.nodes import name_of
from ..graph.ops import Layer


def typical(summary: Summary) -> float:
    """Return the geometric mean of the magnitudes that are not 0, and 0 where all are."""
    low, high, counts = summary.bins()
    centre = np.abs(low + high) / 2
    some = centre > 2.0**-24
    total = int(counts[some].sum())
    return float(np.exp(np.sum(counts[some] * np.log(centre[some])) / total)) if total else 0.0


def levels_of(summary: Summary, quantizer: Quantizer) -> float:
    """Return the levels between 0 and the typical value on an 8-bit grid over the range of a quantizer."""
    span = float(np.max(quantizer.scale)) * (quantizer.format.qmax - quantizer.format.qmin)
    return typical(summary) / (span / 255) if span > 0 else np.inf


def loud_layers(
    program: Program, every_layer: Iterable[Layer], quantizers: Mapping[Site, Quantizer], stats: Stats, fewest: float
) -> dict[str, str]:
    """Return the layers with an input of fewer levels than `fewest`, each with the reason to keep it in float."""
    found: dict[str, str] = {}
    with_sample = _reached(program)
    for layer in every_layer:
        for value in layer.activations:
            name = name_of(value)
            summary, quantizer = stats.summary(name), quantizers.get(Site(name))
            asked = layer.kind == "attention" or (layer.kind == "linear" and value not in with_sample)
            if not asked or summary is None or quantizer is None or summary.low >= 0 or not summary.count:
                continue
            levels = levels_of(summary, quantizer)
            if 0 < levels < fewest:
                grid = f"8 bits over the range of {name!r} have {levels:.1f} levels up to its typical value"
                found[layer.name] = f"loud activations: {grid}"
    return found


def _reached(program: Program) -> set[ir.Value]:
    """Return the values that depend on the sample."""
    found = {value for value in program.graph.inputs if name_of(value) == program.signature.sample}
    for node in program.graph:
        if any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found
