"""split_shortcuts: quantize the parts of a concatenation separately, in front of the layer that reads them.

The decoder of a UNet joins its own features with a skip connection, and the two may differ much in size; one grid for
both then leaves the smaller one a few steps. Three forms (compiler/shortcuts/segments.py) keep the function:

- `layers`: layer(a, W_a, bias) + layer(b, W_b). Each part has quantizers of its own, and so have the columns of the
  weight that read it (Q-Diffusion, arXiv 2302.04304). A convolution rounds each of the partial sums to 8 bits.
- `factors`: layer(Concat(a / f, b / g), [f W_a, g W_b], bias), with factors for f and g in steps of a quarter of an
  octave. The layer stays one, with a Mul in front of it. Parts of equal size share a grid well, but the columns of the
  weight, now of different size, share a scale.
- `powers`: as `factors`, with a power of two for each channel (DMQ's factors on skip connections, arXiv 2507.12933;
  compiler/shortcuts/channel_powers.py chooses them).

`best` takes for each layer the form (`factors` in whole octaves) that moves the fewest bytes, unless one that moves
more gains `gain` dB of the layer's expected error along the trajectory, that of activations, outputs and weights
together (compiler/shortcuts/segment_errors.py has the formulas; a weight's error is the same at every call, and counts
as often). All methods but `layers` follow a few trajectories to measure
the parts. The pass changes the graph, so observe belongs behind it. Norms and all other readers keep the concatenation.

SegQuant's input segments (arXiv 2507.14811) are this pass: any number of parts, convolutions and linear layers,
Reshapes and Transposes in between. The other ideas of that paper gain nothing here. A scale for each output segment
(adaptive norms, fused projections, gated units) is coarser than the scale per output channel that weights always have,
and linear layers have no output quantizer. Scales for the two signs of an activation (SiLU, GELU) are 3.6 dB better
than an asymmetric uint8 grid (median over the 23 SiLU outputs that convolutions read on the digits, activation alone),
for twice the multiplications; one bit is 6 dB. Against a symmetric int8 grid they are 9 dB better.

Deviations from Q-Diffusion: layers are found in the graph and not by names, whatever their kernel; the paper takes only
the 1x1 shortcuts. The bias, also one from a time table, stays with the first part.

Measured on the digits (w8a8-steps, 20 steps, 6 calibration samples, 8 images): the parts of its six shortcuts differ by
a factor of 1.0 to 2.1 in range, so there is little to gain, and no power of two pays. Epsilon in dB, pooled:

                                                      W8A8    W4A8    W6A6    time of a call (W8A8)
    whole                                             36.45   27.47   24.43   1.00
    layers                                            36.57   27.32   24.63   1.05
    factors                                           36.52   27.49   24.52   1.07
    layers written as MatMuls, summed in float        36.64   27.35   24.64   1.04

(Single images vary by more than these forms do; the time is that of one core, batch 4.) The last form rounds no partial
sums but transposes each part, and does not earn a file of its own. Of the five shortcuts that are no islands, `best`
leaves all whole at W8A8 and W6A6, and splits one at W4A8. With parts that differ 50-fold and matter equally (tests), a
convolution goes from 15 to 43 dB with `layers` and 41 with `powers`, a linear layer to 49 and 47.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import log10
from typing import ClassVar, Literal

from mezzotint.compiler.core.formats import INT8, UINT8, Format
from mezzotint.compiler.core.islands import Islands
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import Names, remove_dead
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.graph.topology import time_branch
from mezzotint.compiler.shortcuts.segment_errors import Form, FormCosts, measure_segments
from mezzotint.compiler.shortcuts.segments import Joined, divide_channels, find_joined, split_layer

STEPS = {"factors": 0.25, "best": 1.0}  # octaves between the factors of parts that are tried
LISTED_LAYERS = 4  # layers that a note lists


@dataclass(frozen=True)
class SplitShortcuts(GraphPass):
    """Layers over a concatenation, with grids for each part.

    - `method`: as above. `gain`: in dB, for `best`.
    - `samples`: the number of calibration samples that are followed to choose.
    - `activation_bits`, `weight_bits`: the widths that the choice assumes (choose_scales has options of the same
      names).
    - `islands`: as in insert_qdq; they are left whole, since float layers gain nothing.
    """

    method: Literal["layers", "powers", "factors", "best"] = "layers"
    gain: float = 1.0
    samples: int = 4
    activation_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    weight_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    islands: tuple[str, ...] = ("first", "last")

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # sums are taken in another order

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise RecipeError(
                f"split_shortcuts.samples is {self.samples}", where=self.name, hint="choose 1 or more; 4 are plenty"
            )
        if not self.gain >= 0:
            raise RecipeError(
                f"split_shortcuts.gain is {self.gain}", where=self.name, hint="choose 0 (any gain pays) or more dB"
            )

    def run(self, program: Program, context: Context) -> Program:
        graph = program.graph
        every_joined, left = find_joined(graph, set(time_branch(graph, program.signature).values))
        total = len(every_joined) + len(left)
        if not total:
            return program.noted("no layer reads a concatenation")
        islands = Islands(program, list(layers(graph)), self.islands, self.name)
        left |= {joined.name: reason for joined in every_joined if (reason := islands.reason(joined.layer))}
        chosen = [joined for joined in every_joined if joined.name not in left]
        names = Names(graph)
        forms: Counter[Form] = Counter()
        factored = []
        for joined, form, factors in self._decided(program, context, chosen):
            forms[form] += 1
            if form == "layers":
                split_layer(graph, names, joined)
            elif form == "factors":
                divide_channels(graph, names, joined, factors)
                factored.append(f"{joined.name} by {_range(factors, len(joined.sizes))}")
        remove_dead(graph)
        words = [f"{forms['layers']} of {total} layers behind a concatenation taken apart"]
        words += [f"{len(factored)} divided ({_some(factored)})"] if factored else []
        words += [f"{forms['whole']} whole, as nothing pays"] if forms["whole"] else []
        words += [f"{len(left)} left ({_some([f'{name}: {why}' for name, why in left.items()])})"] if left else []
        return program.noted("; ".join(words))

    def _decided(
        self, program: Program, context: Context, chosen: list[Joined]
    ) -> Iterator[tuple[Joined, Form, tuple[float, ...]]]:
        """Yield each layer with its form and its factors."""
        if self.method == "layers" or not chosen:
            yield from ((joined, "layers", ()) for joined in chosen)
            return
        seen = measure_segments(program, context, [joined.name for joined in chosen], self.samples, self.name)
        for joined in chosen:
            costs = FormCosts(joined, seen[joined.name], *self._formats())
            powers = self.method == "powers"
            factors = costs.channel_factors() if powers else costs.best_factors(STEPS[self.method])
            useful = len(set(factors)) > 1
            if self.method == "best":
                yield joined, *self._cheapest(costs, factors if useful else ())
            else:
                yield joined, "factors" if useful else "whole", factors

    def _cheapest(self, costs: FormCosts, factors: tuple[float, ...]) -> tuple[Form, tuple[float, ...]]:
        """Return the form that moves the fewest bytes, unless one that moves more gains `gain` dB."""
        best: Form = "whole"
        error = costs.cost(best)
        dearer: list[Form] = ["layers", "factors"] if factors else ["layers"]
        for form in sorted(dearer, key=costs.traffic):
            other = costs.cost(form, factors if form == "factors" else ())
            if 10 * log10(max(error, 1e-30) / max(other, 1e-30)) >= self.gain:
                best, error = form, other
        return best, factors if best == "factors" else ()

    def _formats(self) -> tuple[Format, Format]:
        weights = INT8 if self.weight_bits == 8 else Format(self.weight_bits, signed=True, symmetric=True)
        return (UINT8 if self.activation_bits == 8 else Format(self.activation_bits)), weights


def _range(factors: tuple[float, ...], parts: int) -> str:
    """Return the factors of parts, or the least and the largest of those of channels, in words."""
    if len(factors) == parts:
        return ", ".join(f"{f:.3g}" for f in factors)
    return f"{min(factors):.3g} to {max(factors):.3g}, by channel"


def _some(words: list[str]) -> str:
    more = f", and {len(words) - LISTED_LAYERS} more" if len(words) > LISTED_LAYERS else ""
    return "; ".join(words[:LISTED_LAYERS]) + more
