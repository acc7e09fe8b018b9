"""expand_weights: give what rounding takes from a weight to further layers beside it, with scales of their own.

    layer(x, W) + bias    ->    layer(x, W_1) + bias + layer(x, W_2) + ...        W_1 = Q(W),  W_2 = Q(W - Q(W)), ...

Source: REx (Residual Error Expansion, arXiv 2203.14645), which needs no data: the error of a weight falls by the number
of levels with each term, so two terms of 4 bits are nearly as good as one of 8. All terms are integer layers that read
the same quantized input. The file holds `terms` times the bits of a weight, and a call as many multiplications.

The graph computes the same as before: W_1 lies on the grid that choose_scales finds again by the same method, and the
last term is what is left, in float until then. The pass stands in front of observe, because each convolution among the
terms has an output of its own; their sum is float.

Measured at W4A8 (DDIM, 20 steps, 32 images; epsilon, and median / p10 of the images' PSNR, in dB; one term, then two):
digits 23.6, 26.4 / 20.6 and 29.0, 43.0 / 31.8; digits-dit 24.3, 29.1 / 24.4 and 34.3, 48.1 / 44.4; mnist-onnx 19.3,
14.7 / 11.3 and 26.8, 40.7 / 29.8. Files are 1.8 to 1.9 times as large, about as those of 8 bits.

Deviations: all output channels have all terms, where the paper may leave out those that err least; no ensembles of
terms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import Names, name_of
from mezzotint.compiler.low_rank.expansion import expanded, write_terms
from mezzotint.compiler.pruning.patterns import PruningPattern
from mezzotint.compiler.pruning.prunable import find_prunable
from mezzotint.compiler.scales.weights import WeightMethod

MOST_TERMS = 4


@dataclass(frozen=True)
class ExpandWeights(GraphPass):
    """Layers with constant weights, as sums of layers of few bits.

    - `terms`: layers that replace one, from 2 on. `weight_bits`, `weights`: of each, as in choose_scales.
    - `islands`: as in insert_qdq; they stay single.
    """

    terms: int = 2
    weight_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    weights: WeightMethod = "mse"
    islands: tuple[str, ...] = ("first", "last")

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # sums are taken in another order

    def __post_init__(self) -> None:
        if not 2 <= self.terms <= MOST_TERMS:
            raise RecipeError(
                f"{self.name}.terms is {self.terms}", where=self.name, hint=f"choose 2 to {MOST_TERMS} terms"
            )

    def run(self, program: Program, context: Context) -> Program:
        weights, single = find_prunable(program, self.islands, PruningPattern("unstructured"), self.name)
        names = Names(program.graph)
        for done, weight in enumerate(weights):
            rows = expanded(weight.inputs.rows(), self.weight_bits, self.weights, self.terms)
            terms, value = [weight.shaped(term) for term in rows], weight.inputs.floats
            write_terms(program.graph, names, weight.unit.layers, terms[1:], context.folder)
            value.const_value = store.kept(terms[0], name_of(value), context.folder)
            context.progress(self.name, done + 1, len(weights))
        note = f"{len(weights)} weights became {self.terms} of {self.weight_bits} bits each; {len(single)} stay single"
        return replace(program, refused={**program.refused, **single}, note=note)
