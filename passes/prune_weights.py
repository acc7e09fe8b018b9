"""prune_weights: remove weights so that the outputs of their layers change least, and let the others make up for it.

A layer with the inputs X computes W X. Its pruned weight W' with a given share of zeros is chosen to lower

    E = tr((W - W') H (W - W')^T),        H = sum over calls of X X^T / mean(X^2)

by Optimal Brain Surgeon, row after row: ExactOBS of Optimal Brain Compression (OBC, Frantar and Alistarh, arXiv
2208.11580; compiler/pruning/greedy.py has the formulas). The rows of a layer compete for its share by a heap over them,
and what stays is solved anew, exactly. Layers with more than `exact_inputs` inputs are pruned in blocks of `block`
columns, with all later columns free, and what stays is improved by `polish` steps of conjugate gradients. A ridge of
`damp` times the mean diagonal of H keeps it regular, and is raised tenfold where that is not enough.

- `pattern`: `unstructured`; `N:M`, of which every M consecutive inputs keep N (TensorRT's sparse kernels take 2:4);
  `blocks` of 4 consecutive inputs. Inputs are consecutive along the input channels (compiler/pruning/patterns.py).
  Layers whose channels are no multiple of M or 4 stay dense.
- `method`: `obs`; `magnitude` is the baseline, in which the smallest weights go and the others stay as they are.

How much goes: exactly one of these is given, and N:M needs none.

- `sparsity`: the same share of zeros for each layer, above 0 and below 1.
- `size`: of the file, as a share of all parameters in fp32, with a bit for each weight (or block) of a sparse layer.
- `flops`: multiplications by weights that stay, as a share of all.
- `bops`: the same times the bits of both factors, relative to W8A8; activations count 8.

The last three choose the sparsity of each layer among `levels` (N:M: pruned or dense) by the integer program of
assign_bits, which takes the place of OBC's dynamic program (compiler/pruning/levels.py). `bits` is the width that the
weights will have. `score`: how much the error of a layer matters is measured in epsilon, or by its own outputs alone.

The pass stands in front of observe: inputs are those of the dense network, as in OBC, scales are then searched on what
stays, and round_weights keeps zeros (`obc-compound`). The file stores what stays and a bit for each weight, unpacked
when a session is built (compiler/lowering/sparse_packing.py): of 134 M weights at most, because each takes 25 bytes
then; large 2:4 weights of 4 bits take 7, and have no such limit (pair_packing.py). No kernel of onnxruntime skips
zeros: the gain is size.

Measured on mnist-onnx in float (14 of 17 weights pruned; DDIM, 20 steps, 16 calibration samples, 16 images from other
noise; SQNR of epsilon, and median and p10 of the images' PSNR, in dB):

                     magnitude               obs
    50 %             12.7   11.6 /  9.9      27.4   22.8 / 17.2
    60 %             12.9   13.3 / 11.1      24.9   20.1 / 16.0
    2:4              11.7   13.6 / 11.6      23.2   18.9 / 14.7
    blocks, 50 %      9.9    5.9 /  5.1      22.4   17.7 / 15.8

With layers of their own sparsity (`size` 0.5, 48 % of the values 0; 8 images) epsilon is at 34.7 and images at 26.4 dB.
In 4 bits and 8-bit activations by obq: dense 25.5, 22.9 / 18.4; 2:4 first 21.4, 18.6 / 14.6, in 0.84 of its file.
On the digits (49 of 51 weights; `exact_inputs` 320; 10 steps, 8 images) the same two columns are 14.5, 16.3 / 14.9 and
26.0, 31.3 / 25.7 at 50 %, and 12.9, 16.4 / 14.3 and 22.9, 28.3 / 22.1 in 2:4.

An exact row takes 35 ms of one core at 1152 inputs and half of the weights. A layer of 320 outputs and 2880 inputs in
blocks takes 1.8 s; in 2:4 it errs by 2.2 % of its outputs' power (3.1 % without `polish`, 13.4 % by magnitude; random
correlated inputs), and blocks of 128 gain nothing more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import numpy as np

from mezzotint.compiler.bits.units import with_macs
from mezzotint.compiler.core.option_checks import require_not_negative, require_positive
from mezzotint.compiler.core.pipeline import Context, GraphPass, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.pruning.layer_pruning import LayerPruner, PrunedLayer, PruningMethod
from mezzotint.compiler.pruning.levels import LayerLevels, SparsityBudget, SparsityProgram
from mezzotint.compiler.pruning.patterns import PruningPattern
from mezzotint.compiler.pruning.prunable import PrunableWeight, find_prunable
from mezzotint.compiler.pruning.sparsity_profile import epsilon_shares
from mezzotint.compiler.pruning.weight_inputs import WeightInputs
from mezzotint.compiler.rounding.layer_inputs import Gathered
from mezzotint.compiler.rounding.report import damped_words
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.sampling.deployment import Deployment

LEVELS = (0.0, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class PruneWeights(GraphPass):
    """Weights pruned against the inputs of their layers.

    - `pattern`, `method`, the budgets, `levels`, `bits`, `score`, `exact_inputs`, `block`, `polish`, `damp`: as above.
    - `calls`, `samples`, `columns`, `balance`, `memory_gb` (GB): as in round_weights. `islands`: as in insert_qdq; they
      stay dense.
    """

    pattern: str = "unstructured"
    method: PruningMethod = "obs"
    sparsity: float | None = None
    size: float | None = None
    flops: float | None = None
    bops: float | None = None
    levels: tuple[float, ...] = LEVELS
    bits: Literal[2, 3, 4, 5, 6, 7, 8, 32] = 32
    score: Literal["output", "layer"] = "output"
    exact_inputs: int = 1500
    block: int = 64
    polish: int = 8
    damp: float = 0.01
    calls: int = 10
    samples: int = 8
    columns: int = 8192
    balance: bool = True
    memory_gb: float = 3.0
    islands: tuple[str, ...] = ("first", "last")

    def __post_init__(self) -> None:
        PruningPattern.of(self.pattern, self.name)
        require_positive(self, "exact_inputs", "block", "calls", "samples", "columns", "memory_gb")
        require_not_negative(self, "polish", "damp")
        for share in (self.sparsity, *self.levels):
            if share is not None and not 0 <= share < 1:
                raise RecipeError(
                    f"a sparsity is {share:g}",
                    where=self.name,
                    hint="choose below 1: a layer of zeros computes nothing",
                )
        if not self.levels or len(set(self.levels)) < len(self.levels):
            raise RecipeError("prune_weights.levels are not different", where=self.name, hint="such as [0, 0.5, 0.75]")

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        given = [name for name in ("sparsity", *get_args(SparsityBudget)) if getattr(self, name) is not None]
        bad = [name for name in given if not getattr(self, name) > 0]
        if bad:
            raise RecipeError(
                f"{self.name}.{bad[0]} is {getattr(self, bad[0])}", where=self.name, hint="choose above 0"
            )
        fixed = PruningPattern.of(self.pattern, self.name).sparsity
        if fixed is not None and self.sparsity not in (None, fixed):
            raise RecipeError(
                f"the pattern {self.pattern} has a sparsity of {fixed:g}, and {self.sparsity:g} is given",
                where=f"{self.name}.sparsity",
                hint="set prune_weights.sparsity to null, or choose the pattern unstructured",
            )
        if len(given) > 1 or (fixed is None and not given):
            raise RecipeError(
                f"prune_weights has {len(given)} budgets" + (f": {', '.join(given)}" if given else ""),
                where=self.name,
                hint="give one of sparsity, size, flops and bops, such as --set prune_weights.sparsity=0.5",
            )

    def run(self, program: Program, context: Context) -> Program:
        self.check((), program.deployment)
        pattern = PruningPattern.of(self.pattern, self.name)
        weights, dense = find_prunable(program, self.islands, pattern, self.name)
        if not weights:
            raise RecipeError(
                f"no layer can be pruned by the pattern {self.pattern}: {next(iter(dense.values()), 'there is none')}",
                where=f"{self.name}.pattern",
                hint="choose the pattern unstructured, or fewer islands",
            )
        return _Work(self, program, context, pattern, weights, dense).run()


@dataclass(eq=False)
class _Work:
    """One run of the pass. H is measured on the dense graph."""

    options: PruneWeights
    program: Program
    context: Context
    pattern: PruningPattern
    weights: Sequence[PrunableWeight]
    dense: Mapping[str, str]
    damps: dict[str, float] = field(default_factory=dict)

    def run(self) -> Program:
        o = self.options
        self.inputs = WeightInputs.of(self.program, self.context, o)
        self.pruner = LayerPruner(self.pattern, o.method, o.exact_inputs, o.block, o.polish, o.damp)
        kind = next((kind for kind in get_args(SparsityBudget) if getattr(o, kind) is not None), None)
        same = o.sparsity if self.pattern.sparsity is None else self.pattern.sparsity
        chosen, words = {weight.name: float(same or 0) for weight in self.weights}, ""
        if kind is not None:
            chosen, words = self._allocated(kind)
        errors: list[float] = []
        gone = 0

        for weight, gathered in self.inputs.each(self.weights, o.name):
            if chosen[weight.name] > 0:
                layer = self._pruned(self.pruner, weight, gathered, chosen[weight.name])
                values = weight.shaped(layer.values)
                floats = weight.inputs.floats
                floats.const_value = store.kept(values, name_of(floats), self.context.folder)
                gone += int(np.count_nonzero(values == 0))
                errors.append(layer.share)
        return replace(self.program, note=self._note(chosen, errors, gone, words))

    def _pruned(self, pruner: LayerPruner, weight: PrunableWeight, gathered: Gathered, sparsity: float) -> PrunedLayer:
        layer = pruner.prune_groups(
            weight.inputs.rows(), gathered.gram(weight.inputs), weight.channels, sparsity, weight.name
        )
        if layer.damp > self.options.damp:
            self.damps[weight.name] = layer.damp
        return layer

    def _allocated(self, kind: SparsityBudget) -> tuple[dict[str, float], str]:
        """Return (the sparsity of each layer, the budget that it takes, in words)."""
        o, fixed = self.options, self.pattern.sparsity
        levels = [0.0, fixed] if fixed is not None else sorted({0.0, *o.levels})
        middle = levels[len(levels) // 2]
        fast = replace(self.pruner, exact=0)  # the profile needs errors, not the best weights
        errors: dict[str, dict[float, float]] = {}
        samples: dict[str, Callable[[], Floats]] = {}

        for weight, gathered in self.inputs.each(self.weights, f"{o.name}: levels"):
            found = errors[weight.name] = {0.0: 0.0}
            for level in levels[1:]:
                layer = self._pruned(fast, weight, gathered, level)
                found[level] = layer.share
                if level == middle:
                    samples[weight.name] = partial(weight.shaped, layer.values)
        if o.score == "output":
            shares = epsilon_shares(self.inputs.source, self.inputs.few, self.weights, samples, o.calls, o.name)
            for name, found in errors.items():
                factor = shares[name] / found[middle] if found[middle] > 0 else 0.0
                errors[name] = {level: factor * error for level, error in found.items()}
        units = [weight.unit for weight in self.weights]
        units = units if kind == "size" else with_macs(units, self.inputs.source, self.context)
        layers = [LayerLevels(unit.name, unit.size, unit.macs, errors[unit.name]) for unit in units]
        parameters = int(self.program.source.get("parameter_bytes", store.parameter_bytes(self.program.model)))
        others = store.parameter_bytes(self.program.model) - 4 * sum(unit.size for unit in units)
        amount = float(getattr(o, kind))
        allocation = SparsityProgram(kind, amount, self.pattern, o.bits, others, parameters)
        chosen, taken = allocation.choose(layers, o.name)
        return chosen, f"; {allocation.words(taken)}"

    def _note(self, chosen: Mapping[str, float], errors: Sequence[float], gone: int, words: str) -> str:
        total = sum(weight.size for weight in self.weights)
        levels = sorted({s for s in chosen.values() if s > 0})
        spread = f" ({levels[0]:.0%} to {levels[-1]:.0%} of a layer)" if len(levels) > 1 else ""
        mean = float(np.mean(errors)) if errors else 0.0
        return (
            f"{len(errors)} of {len(self.weights) + len(self.dense)} weights pruned, {self.options.pattern}: {gone} of "
            f"{total} values are 0{spread}; squared error of their outputs {mean:.2%} of the power (mean){words}"
            + damped_words(self.damps)
        )
