"""split_shortcuts: the parts of a concatenation are quantized apart, in front of the layer that reads them.

The decoder of a UNet joins what it computed with a skip connection, and the two may be of very different size: one
grid for both then leaves the quiet one a few steps. Three forms (compiler/shortcuts/segments.py) keep the function:

layers   layer(a, W_a, bias) + layer(b, W_b): each part has quantizers of its own, and so have the columns of the
         weight that read it (Q-Diffusion, arXiv 2302.04304). A convolution rounds each of the partial sums to 8 bits.
powers   layer(Concat(a / f, b / g), [f W_a, g W_b], bias), f and g powers of two: one layer still, and a Mul in front
         of it. Parts of equal size share a grid well, but the weights now share a scale where they no longer are
         (DMQ's factors on skip connections; here they are not learned but sought).
factors  the same with steps of a quarter of an octave.

`best` takes for each layer the form that moves the fewest bytes, unless one that moves more brings `gain` dB of the
layer's expected error, of activations, weights and outputs together (compiler/shortcuts/segment_errors.py has the
formulas). All but `layers` follow a few trajectories themselves to see the parts: Observe belongs behind this pass, as
it changes the graph. Norms and all other readers keep the concatenation.

SegQuant's input segments (arXiv 2507.14811) are this same pass: any number of parts, convolutions and linear layers,
Reshapes and Transposes on the way. What else that paper does has nothing to gain here. A scale for each output segment
(adaptive norms, fused projections, gated units) is coarser than the scale per output channel that weights always have,
and linear layers have no output quantizer. Scales for the two signs of an activation (SiLU, GELU): over the 23 SiLU
outputs that convolutions read on the digits they are 3.6 dB better (median of the activation alone) than an
asymmetric uint8 grid, for twice the multiplications; one bit is 6 dB. Against a symmetric int8 grid it is 9.

Deviations from Q-Diffusion: layers are found in the graph, not by names, whatever their kernel; the paper takes the
1x1 shortcuts only. The bias, a time table too, stays with the first part.

Measured on the digits (w8a8-steps, 20 steps, 6 calibration samples, 8 pictures): the parts of its six shortcuts differ
by a factor of 1.0 to 2.1 in range, so there is little to gain, and no power of two pays. Epsilon in dB, pooled:

                                                      W8A8    W4A8    W6A6    time of a call (W8A8)
    whole                                             36.45   27.47   24.43   1.00
    layers                                            36.57   27.32   24.63   1.05
    factors                                           36.52   27.49   24.52   1.07
    layers written as MatMuls, summed in float        36.64   27.35   24.64   1.04

(single pictures vary by more than these forms do; the time is that of one core, batch 4). The last form rounds no
partial sums but turns each part around, and is not worth a file. Of the five that are no islands `best` leaves all
whole at W8A8 and W6A6, and takes one apart at W4A8. Parts that differ 50-fold and count alike (tests): a convolution
goes from 15 to 43 dB with layers and 41 with powers, a linear layer to 49 and 47.
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
from mezzotint.compiler.shortcuts.segment_errors import Costs, Form, measure
from mezzotint.compiler.shortcuts.segments import Joined, divide_parts, find_joined, split_layer

STEPS = {"powers": 1.0, "factors": 0.25, "best": 1.0}  # octaves between the factors that are tried
LISTED_LAYERS = 4  # layers that a note lists


@dataclass(frozen=True)
class SplitShortcuts(GraphPass):
    """`method` and `gain` as above; `samples` is how many calibration samples are followed to choose.

    `activation_bits` and `weight_bits` are what the choice is for (choose_scales has options of the same names).
    `islands`, as in insert_qdq, are left whole: in float there is nothing to gain.
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
        found, left = find_joined(graph, set(time_branch(graph, program.signature).values))
        total = len(found) + len(left)
        if not total:
            return program.noted("no layer reads a concatenation")
        islands = Islands(program, list(layers(graph)), self.islands, self.name)
        left |= {joined.name: reason for joined in found if (reason := islands.reason(joined.layer))}
        chosen = [joined for joined in found if joined.name not in left]
        names = Names(graph)
        forms: Counter[Form] = Counter()
        factored = []
        for joined, form, factors in self._decided(program, context, chosen):
            forms[form] += 1
            if form == "layers":
                split_layer(graph, names, joined)
            elif form == "factors":
                divide_parts(graph, names, joined, factors)
                factored.append(f"{joined.name} by {', '.join(f'{f:.3g}' for f in factors)}")
        remove_dead(graph)
        words = [f"{forms['layers']} of {total} layers behind a concatenation taken apart"]
        words += [f"{len(factored)} divided ({_some(factored)})"] if factored else []
        words += [f"{forms['whole']} whole, as nothing pays"] if forms["whole"] else []
        words += [f"{len(left)} left ({_some([f'{name}: {why}' for name, why in left.items()])})"] if left else []
        return program.noted("; ".join(words))

    def _decided(
        self, program: Program, context: Context, found: list[Joined]
    ) -> Iterator[tuple[Joined, Form, tuple[float, ...]]]:
        """Each layer with the form that it gets, and its factors."""
        if self.method == "layers" or not found:
            yield from ((joined, "layers", ()) for joined in found)
            return
        seen = measure(program, context, [joined.name for joined in found], self.samples, self.name)
        for joined in found:
            costs = Costs(joined, seen[joined.name], *self._formats())
            factors = costs.best_factors(STEPS[self.method])
            useful = len(set(factors)) > 1
            if self.method == "best":
                yield joined, *self._cheapest(costs, factors if useful else ())
            else:
                yield joined, "factors" if useful else "whole", factors

    def _cheapest(self, costs: Costs, factors: tuple[float, ...]) -> tuple[Form, tuple[float, ...]]:
        """The form that moves least, unless one that moves more brings `gain` dB for it."""
        best: Form = "whole"
        error = costs.error(best)
        dearer: list[Form] = ["layers", "factors"] if factors else ["layers"]
        for form in sorted(dearer, key=costs.traffic):
            other = costs.error(form, factors if form == "factors" else ())
            if 10 * log10(max(error, 1e-30) / max(other, 1e-30)) >= self.gain:
                best, error = form, other
        return best, factors if best == "factors" else ()

    def _formats(self) -> tuple[Format, Format]:
        weights = INT8 if self.weight_bits == 8 else Format(self.weight_bits, signed=True, symmetric=True)
        return (UINT8 if self.activation_bits == 8 else Format(self.activation_bits)), weights


def _some(words: list[str]) -> str:
    more = f", and {len(words) - LISTED_LAYERS} more" if len(words) > LISTED_LAYERS else ""
    return "; ".join(words[:LISTED_LAYERS]) + more
