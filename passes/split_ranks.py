"""split_ranks: take a part of low rank out of a layer's weight, and leave it in float beside the layer.

    layer(x, W) + bias    ->    layer(x, R) + bias + up(down(x)),        W = R + up down

R is quantized to few bits like any other weight, with its own scale for the layer's output; the branch of rank r is two
small layers in float, which read x in front of its quantizer. A linear layer becomes two MatMuls, a convolution one of
its own kernel with r outputs and a 1x1 convolution (compiler/low_rank/branches.py). The graph computes the same as
before, so the pass stands in front of observe, and all that rounds weights behind it rounds the residuals.

The branch is fitted in turns with the rounding of R (compiler/low_rank/residual.py has the formulas), until the error
of the layer's outputs falls no more. That error is known from H = X X^T of the calibration, and has the rounding of x
to `activation_bits` in it: what the branch takes over is not multiplied by that noise. A layer that no branch helps
stays whole.

- `weighting`: what of H counts in the fit: all of it (`output`), its diagonal (`inputs`), or nothing (`none`: the
  largest singular values, as in SVDQuant, arXiv 2411.05007).
- `rounding`: what the fit rounds R with: to the `nearest`, or with `gptq` if round_weights does so behind it.

The rank of a layer is at most `rank`, and its branch has at most `share` of the values of its weight. With `spread`
"errors" the share is that of all layers together, and the ranks are those of least error in epsilon (QuantVSR, arXiv
2508.04485, has ranks by complexity); with `mean_bits` the widths of the residuals, out of `widths`, are chosen by the
same program, whose budget is the bits of residual and branch for each weight (MLoRQ, arXiv 2507.09616;
compiler/low_rank/ranks.py).

Measured (DDIM, 20 steps, 16 calibration samples, 32 images; SQNR of epsilon, and median / p10 of the images' PSNR, in
dB): gptq and, with a float branch, svdquant.

                      W4A4                                    W4A8
                      gptq                svdquant            gptq                svdquant
    digits            13.3, 16.4 / 12.8   17.5, 20.8 / 15.3
    digits-dit         8.4, 18.1 / 15.8   15.4, 24.6 / 20.2   30.7, 36.1 / 29.3   33.1, 41.5 / 36.5
    mnist-onnx        11.5, 17.3 / 13.5   14.5, 19.0 / 15.3   25.1, 27.5 / 21.1   27.5, 29.9 / 22.6

The files are 16 to 19 % larger: 4.7 bits for each weight. mlorq's are not (0.99 to 1.01 of gptq's): W4A8 has 32.3,
36.3 / 29.5 on digits-dit, but 25.6, 21.3 / 16.8 on mnist-onnx; there W4A4 has 15.4, 16.7 / 13.9, and W3A8, in 0.81 of
gptq's file, 24.4, 18.7 / 14.9 (gptq 21.5, 16.7 / 12.0).

What the fit weighs by (mnist-onnx without smoothing, epsilon): `none` 13.2 at W4A4 and 27.4 at W4A8, `inputs` 12.9 and
27.8, `output` 11.8 and 27.1, `output` with the rounding by gptq 11.8 and 28.2. Activations of 4 bits err where inputs
are large, which the even noise of the formula does not know. Ranks by the error in epsilon have 15.3 at W4A4, and even
ones 13.2.

The branches cost time: a convolution of 4 outputs is hardly faster than one of 64. On mnist-onnx they take three
quarters of the time of all integer kernels, on digits-dit (linear layers) a seventh.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from mezzotint.compiler.core.option_checks import require_not_negative, require_positive, require_widths
from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import Names, name_of
from mezzotint.compiler.low_rank.branches import obstacle, write_branch
from mezzotint.compiler.low_rank.layer_split import LayerSplitter, LayerView, SplitRounding
from mezzotint.compiler.low_rank.ranks import LayerShape, RankBudget, RankChoice
from mezzotint.compiler.low_rank.residual import FitWeighting, SplitWeight
from mezzotint.compiler.pruning.patterns import PruningPattern
from mezzotint.compiler.pruning.prunable import PrunableWeight, find_prunable
from mezzotint.compiler.pruning.sparsity_profile import epsilon_shares
from mezzotint.compiler.pruning.weight_inputs import WeightInputs
from mezzotint.compiler.scales.weights import WeightMethod
from mezzotint.runtime.arrays import Floats

PROFILE_BITS = 4  # the width at which the effect of a layer's error on epsilon is measured


@dataclass(frozen=True)
class SplitRanks(GraphPass):
    """Float branches of low rank beside layers with constant weights.

    - `rank`, `share`, `spread`, `mean_bits`, `widths`, `weighting`, `rounding`: as above.
    - `weight_bits`, `weights`: of the residuals, as in choose_scales. `activation_bits`: as there; "float" leaves the
      noise of the inputs out.
    - `iterations`: fits of a branch, at most. `half`: the branch has the values of half precision, and the residual
      makes up for their rounding.
    - `damp`: of the rounding by gptq. `calls`, `samples`, `columns`, `balance`, `memory_gb` (GB): as in prune_weights.
      `islands`: as in insert_qdq; they stay whole.
    """

    rank: int = 32
    share: float = 0.05
    spread: Literal["even", "errors"] = "even"
    mean_bits: float | None = None
    widths: tuple[int, ...] = (2, 4, 8)
    weighting: FitWeighting = "output"
    rounding: SplitRounding = "nearest"
    weight_bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    activation_bits: Literal[2, 3, 4, 5, 6, 7, 8, "float"] = 8
    weights: WeightMethod = "mse"
    iterations: int = 20
    half: bool = True
    damp: float = 0.01
    calls: int = 10
    samples: int = 8
    columns: int = 8192
    balance: bool = True
    memory_gb: float = 3.0
    islands: tuple[str, ...] = ("first", "last")

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # sums are taken in another order

    def __post_init__(self) -> None:
        require_positive(self, "rank", "share", "iterations", "calls", "samples", "columns", "memory_gb")
        require_not_negative(self, "damp")
        if self.share >= 1:
            raise RecipeError(f"{self.name}.share is {self.share:g}", where=self.name, hint="choose a share below 1")
        if self.mean_bits is not None:
            require_positive(self, "mean_bits")
            require_widths(self, "widths")

    def run(self, program: Program, context: Context) -> Program:
        weights, whole = find_prunable(program, self.islands, PruningPattern("unstructured"), self.name)
        for weight in weights:
            if (reason := obstacle(weight.unit.layers[0])) is not None:
                whole[weight.name] = reason
        weights = [weight for weight in weights if weight.name not in whole]
        if not weights:
            return program.noted("no layer can have a branch")
        return _Work(self, program, context, weights, whole).run()


@dataclass(eq=False)
class _Work:
    """One run of the pass. H is measured on the graph without branches."""

    options: SplitRanks
    program: Program
    context: Context
    weights: Sequence[PrunableWeight]
    whole: dict[str, str]
    splits: dict[str, SplitWeight] = field(default_factory=dict)

    def run(self) -> Program:
        o = self.options
        self.inputs = WeightInputs.of(self.program, self.context, o)
        self.splitter = LayerSplitter(o.weighting, o.rounding, o.weights, o.iterations, o.half, o.damp)
        self.shapes = [LayerShape(w.name, w.size // w.inputs.inputs, w.inputs.inputs) for w in self.weights]
        chosen = self._chosen()
        names = Names(self.program.graph)

        for weight, view in self._views(o.name):
            choice = chosen[weight.name]
            if not choice.rank:
                self.whole[weight.name] = f"{o.name}: a branch of rank 0 is none"
                continue
            found = self.splits[weight.name] = self.splitter.split(view, choice.rank, choice.bits)
            if found.branch is None:
                self.whole[weight.name] = f"{o.name}: no branch lowers its error"
                continue
            value = weight.inputs.floats
            residual = weight.shaped(view.rows - found.branch.product)
            value.const_value = store.kept(residual, name_of(value), self.context.folder)
            write_branch(self.program.graph, names, weight.unit.layers, found.branch, self.context.folder)
        widths = dict(self.program.widths)
        if o.mean_bits is not None:
            widths |= {layer.name: chosen[w.name].bits for w in self.weights for layer in w.unit.layers}
        refused = {**self.program.refused, **self.whole}
        return replace(self.program, refused=refused, widths=widths, note=self._note(chosen))

    def _views(self, stage: str) -> Iterator[tuple[PrunableWeight, LayerView]]:
        """Yield each weight with what a fit needs of it."""
        bits = None if self.options.activation_bits == "float" else int(self.options.activation_bits)
        for weight, gathered in self.inputs.each(self.weights, stage):
            yield weight, LayerView.of(weight.name, weight.inputs, gathered, bits)

    def _chosen(self) -> dict[str, RankChoice]:
        """Return the width and the rank of each layer."""
        o = self.options
        if o.spread == "even" and o.mean_bits is None:
            return {s.name: RankChoice(o.weight_bits, s.even_rank(o.share, o.rank)) for s in self.shapes}
        widths = (o.weight_bits,) if o.mean_bits is None else o.widths
        shapes = {shape.name: shape for shape in self.shapes}
        errors: dict[str, dict[RankChoice, float]] = {}
        alone: dict[str, float] = {}
        rounded: dict[str, Callable[[], Floats]] = {}
        quick = replace(self.splitter, iterations=min(o.iterations, 2), rounding="nearest")

        for weight, view in self._views(f"{o.name}: ranks"):
            ranks = shapes[weight.name].ranks(o.share, o.rank)
            errors[weight.name] = {
                RankChoice(bits, rank): error
                for bits in widths
                for rank, error in quick.errors(view, ranks, bits).items()
            }
            silent = replace(view, noise=0.0)
            alone[weight.name] = quick.errors(silent, (0,), PROFILE_BITS)[0]
            rows = quick.rounder(view, PROFILE_BITS)(view.rows)
            rounded[weight.name] = partial(weight.shaped, rows)
        shares = epsilon_shares(self.inputs.source, self.inputs.few, self.weights, rounded, o.calls, o.name)
        for name, found in errors.items():
            factor = shares[name] / alone[name] if alone[name] > 0 else 0.0
            errors[name] = {choice: factor * error for choice, error in found.items()}
        budget = RankBudget(o.mean_bits, o.share, 16 if o.half else 32)
        return budget.choose(self.shapes, errors, o.name)

    def _note(self, chosen: Mapping[str, RankChoice]) -> str:
        """Return how many layers have a branch, of which size, and what it is worth."""
        beside = {name: split for name, split in self.splits.items() if split.branch is not None}
        total = sum(shape.size for shape in self.shapes)
        ranks = [split.branch.rank for split in beside.values() if split.branch is not None]
        values = sum(shape.branch(chosen[shape.name].rank) for shape in self.shapes if shape.name in beside)
        bits = sum(chosen[s.name].bits * s.size for s in self.shapes) + (16 if self.options.half else 32) * values
        kept = float(np.mean([s.error / s.whole for s in beside.values() if s.whole > 0])) if beside else 1.0
        spread = f" of rank {min(ranks)} to {max(ranks)}" if ranks else ""
        return (
            f"{len(beside)} of {len(self.weights)} weights have a branch{spread}, of {values / total:.1%} of their "
            f"values; {bits / total:.2f} bits a weight with it; "
            f"error of their outputs {kept:.0%} of that without (mean)"
        )
