"""round_weights: round weights so that the outputs of their layers change least.

After insert_qdq every quantized layer computes W' x with W' = s q and q = rint(W / s). Rounding each weight to the
nearest point is best only for uncorrelated inputs; pixels and channels are correlated. Here q is chosen to lower

    E = tr((W - W') H (W - W')^T),        H = sum over calls of X X^T / mean(X^2),

where X are the layer's inputs (unfolded for convolutions, compiler/rounding/gram.py) in the quantized graph, in which
the layers further up are rounded already. The initializer in front of QuantizeLinear becomes s q, so the graph and its
speed do not change. `float_model` keeps the float weights.

Methods (compiler/rounding/matrix.py has formulas and sources): `nearest`, `gptq`, `gptaq`, `comq`, and `obq`
(compiler/rounding/exact.py), which is exact for layers of up to `exact_inputs` inputs and goes through larger ones in
blocks of that many. Scales: `keep` those of the plan; `mse`
searches those of each row again by mean square; `output` searches by the diagonal of H and, when q is known, takes the
best scale for it. With any method, a row stays rounded to nearest with the plan's scale if the method does not lower
its error. Rows may have widths of their own (assign_bits) or a codebook (choose_levels); each stays on its grid.
`refits` times, the levels of each row's codebook are fitted to the codes and the row is rounded to the new ones
(compiler/rounding/codebook.py, GANQ); the best of all rounds stays.
Weights that are 0 in the float graph, such as those that prune_weights removed, stay 0: the others are rounded to make
up for them, as if H were restricted to what is left (by obq in each block, by gptq and comq column after column).

`weighting` puts gradients of `probes` random projections of the prediction into H, so that E is nearer to its error
(compiler/gradients/curvature.py): `guided` weights positions, with a matrix for each of `row_groups` parts of the rows
(GuidedQuant); `oac` sums gradients of samples by the weight (OAC); `yaqa` adds a matrix between the rows, which gptq
goes through in turn (YAQA, compiler/rounding/two_sided.py; a weight keeps all of its rows or none).

Statistics: latents of the float trajectory at `calls` network calls spread evenly over it, of the first `samples`
images of the calibration at each call (whatever allocate_steps chose), and `columns` positions for each layer, shared
equally by calls and samples. A few images suffice, because an image has many positions. With
`balance` each call's share is divided by its mean square; otherwise the calls with the largest inputs would dominate.

Layers are rounded in stages, in the graph's order. The matrices H of one stage fit into `memory_gb` (a stage has at
least one layer, and a layer that is being rounded needs a second matrix), and a stage has at most `stage` layers, so
nearly all layers before a layer are rounded when its inputs are collected. The others of its stage are still rounded to
nearest then.
A weight that several layers read is rounded once, with the sum of their H, at the first of them. BLAS uses as many
threads as its environment variables say, whatever the context says.

Measured on the digits with weights of 4 bits (w8a8-steps, 8 calibration samples, 46 weights; SQNR of epsilon in dB over
10 calls of 8 images that calibration did not see, and at the first and the last call):

    nearest 24.8 (37.8, 14.4)             gptq 28.6 (49.8, 17.9)          gptaq 28.9 (49.7, 18.2)
    nearest, output 25.0 (38.9, 14.6)     gptq, output 28.3 (49.4, 17.6)  comq, output 27.4 (48.2, 16.7)

(gptaq with the scales `output` too). The layers' own error falls to 14 % of nearest's, with comq to 21 %; scales that
fit one layer's calibration inputs better do not help after gptq. With 32 calibration samples and 50 steps, images of
w8a8-steps with 4-bit weights go from 30.9 to 40.9 dB, epsilon from 29.6 to 34.2. One layer of 11,520 inputs and 1280
outputs takes 43 seconds of one core and 1.6 GB after its statistics, which take 1.3 seconds for 1024 columns. The
Stable Diffusion 1.5 configuration (256 weights, up to 23,040 inputs) takes 35 minutes of two cores for four samples at
four calls; the whole compilation peaks at 11.9 GB.

With `weighting`, static activations and 20 calls (epsilon; PSNR of 32 images, median and p10; dB):

    digits      none 27.7, 40.0, 28.2    guided 27.2, 38.6, 28.3    oac 27.2, 36.4, 26.7    yaqa 27.5, 41.6, 28.6
    mnist-onnx  none 25.1, 27.5, 21.1    guided 25.2, 31.0, 21.5    oac 24.6, 25.1, 19.2    yaqa 25.5, 33.7, 28.0
    digits-dit  none 23.3, 30.8, 26.7    guided 23.3, 32.6, 27.2    oac 23.3, 33.1, 26.6    yaqa 23.6, 37.0, 31.3
    mnist-onnx with 3 bits: none 21.5, 16.7, 12.0    guided 22.1, 16.6, 11.9    yaqa 23.6, 25.6, 21.8
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.core.formats import Grid, Levels, Vectors, of_rows
from mezzotint.compiler.core.option_checks import require_not_negative, require_positive
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding import matrix as rounding
from mezzotint.compiler.rounding.codebook import fitted_in_turns
from mezzotint.compiler.rounding.exact import obq
from mezzotint.compiler.rounding.layer_inputs import Gathered, Inputs, Latents, chosen_latents, gather
from mezzotint.compiler.rounding.parts import parts_in_memory
from mezzotint.compiler.rounding.report import RoundingReport
from mezzotint.compiler.rounding.row_scales import refit, search
from mezzotint.compiler.rounding.two_sided import RowFeedback, check_weighting, errors_of_rows, two_sided
from mezzotint.compiler.rounding.vectors import gptq_vectors, vector_order
from mezzotint.compiler.rounding.weights import (
    QuantizedWeight,
    chosen_weights,
    grid_of,
    layer_name,
    replace_weight,
    with_grids,
)
from mezzotint.compiler.training.torch_check import device_is_there, require_torch
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.sampling.deployment import Deployment

RoundingMethod = Literal["nearest", "obq", "gptq", "gptaq", "comq"]


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Weights rounded against the inputs of their layers.

    - `method`, `scales`: as above.
    - `damp` (of the mean diagonal of H) and `block` (columns): those of gptq. `act_order`: the largest inputs first,
      for comq the loudest columns; otherwise columns in their own order.
    - `alpha`: the share of the inputs' error that gptaq undoes. `sweeps`: of comq over all columns.
    - `refits`: of the codebooks' levels, 0 for those of the plan. `weighting`, `row_groups`, `probes`: as above.
    - `exact_inputs`, `calls`, `samples`, `columns`, `balance`, `stage` (layers), `memory_gb` (GB): as above.
    - `layers`: patterns of node names (as in a shell: `*`, `?`); empty means all. Other layers stay at nearest.
    """

    method: RoundingMethod = "gptq"
    scales: Literal["keep", "mse", "output"] = "keep"
    damp: float = 0.01
    act_order: bool = True
    block: int = 128
    alpha: float = 0.25
    sweeps: int = 3
    refits: int = 0
    weighting: Literal["none", "guided", "oac", "yaqa"] = "none"
    row_groups: int = 4
    probes: int = 1
    exact_inputs: int = 320
    calls: int = 10
    samples: int = 8
    columns: int = 8192
    balance: bool = True
    memory_gb: float = 3.0
    stage: int = 8
    layers: tuple[str, ...] = ()

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})
    before: ClassVar[frozenset[str]] = frozenset({"rounded"})
    gives: ClassVar[frozenset[str]] = frozenset({"rounded"})

    def __post_init__(self) -> None:
        counts = ("block", "sweeps", "row_groups", "probes", "exact_inputs", "calls", "samples", "columns", "stage")
        require_positive(self, *counts, "memory_gb")
        require_not_negative(self, "damp", "alpha", "refits")
        check_weighting(self.name, self.method, self.weighting, self.refits)

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        if self.weighting != "none":
            require_torch(self.name, "takes gradients")

    def trains_on(self, device: str) -> bool:
        return self.weighting != "none" and device_is_there(device)

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None or program.plan is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        weights = chosen_weights(program.graph, self.layers, self.name)
        if not weights:
            return program.noted("no layer has quantized weights: nothing to round")
        float_layers = {layer.name: layer for layer in layers(program.float_model.graph)}
        every_input = [Inputs.of(weight, float_layers, self.name) for weight in weights]
        few = replace(context, samples=min(self.samples, context.samples))
        latents = chosen_latents(program, few, self.calls)
        each = 0 if self.weighting == "none" else self.row_groups if self.weighting == "guided" else 1
        stages = list(parts_in_memory(every_input, lambda inputs: inputs, self.memory_gb, self.stage, each=each))
        total, done = len(stages) * len(latents) + len(every_input), 0
        report = RoundingReport()
        rounded: set[str] = set()
        changed: dict[str, tuple[QuantizedWeight, str, Floats, Grid]] = {}

        def step() -> None:
            nonlocal done
            done += 1
            context.progress(self.name, done, total)

        for stage in stages:
            gathered = self._gather(program, context, stage, latents, rounded, step)
            for inputs in stage:
                weight = inputs.weight
                planned = grid_of(inputs.float_weights[0], inputs.weight, program.plan)
                rows, scale, grid = self._round(inputs, planned, gathered, report)
                for node, name in zip(weight.readers, inputs.float_weights, strict=True):
                    if grid is not planned or not np.array_equal(scale, weight.scale()):
                        changed[layer_name(node)] = (weight, name, scale, grid)
                replace_weight(program, weight, rows, scale, context.folder, self.name)
                rounded.add(name_of(weight.value))
                gathered.forget(inputs)
                step()
        plan = with_grids(program.plan, changed, self.name) if changed else program.plan
        return replace(program, plan=plan, note=report.note(len(every_input), len(stages)))

    def _gather(
        self,
        program: Program,
        context: Context,
        stage: Sequence[Inputs],
        latents: Sequence[Latents],
        rounded: Collection[str],
        step: Callable[[], None],
    ) -> Gathered:
        """Return the matrices of a stage. `rounded` names the constants that are grid points already."""
        common: dict[str, Any] = {"rounded": rounded, "columns": self.columns, "balance": self.balance, "step": step}
        if self.weighting == "none":
            return gather(program, context, stage, latents, shifts=self.method == "gptaq", **common)
        from mezzotint.compiler.gradients.stage_curvature import gather_weighted

        numbers: dict[str, Any] = {"row_groups": self.row_groups, "probes": self.probes}
        return gather_weighted(program, context, stage, latents, self.weighting, **numbers, **common)

    def _round(
        self, inputs: Inputs, grid: Grid, gathered: Gathered, report: RoundingReport
    ) -> tuple[Floats, Floats, Grid]:
        """Return (rounded rows, scales, grid) of one weight, group by group of its convolution."""
        weight = inputs.weight
        if self.scales != "keep" and not weight.per_row:
            raise RecipeError(
                "a weight has one scale for all of its outputs",
                where=weight.name,
                hint="set round_weights.scales to keep",
            )
        floats, scale = inputs.rows(), weight.scale().copy()
        grams, shift, sides = gathered.gram(inputs), gathered.shift(inputs), gathered.side(inputs)
        values = np.empty_like(floats)
        table = grid.table.copy() if self.refits and isinstance(grid, Levels) else None
        each = len(floats) // len(grams)
        for g, gram in enumerate(grams):
            part = slice(g * each, (g + 1) * each)
            rounding.check_gram(gram, weight.name)
            moved, side = None if shift is None else shift[part], None if sides is None else sides[g]
            values[part], scale[part], chosen = self._part(
                floats[part], scale[part], gram, moved, side, of_rows(grid, part), weight.name, report
            )
            if table is not None and isinstance(chosen, Levels):
                table[part] = chosen.table
        report.layer(values, weight.name, self._form(grams.shape[2]))
        return values, scale, grid if table is None else Levels(table)

    def _part(
        self,
        floats: Floats,
        kept: Floats,
        gram: Floats,
        shift: Floats | None,
        side: Floats | None,
        grid: Grid,
        where: str,
        report: RoundingReport,
    ) -> tuple[Floats, Floats, Grid]:
        if isinstance(grid, Vectors) and (self.method in ("comq", "obq") or side is not None):
            rounder = self.method if side is None else "the weighting yaqa"
            raise RecipeError(f"{rounder} rounds no vectors", where=where, hint="set round_weights.method to gptq")
        target: npt.NDArray[np.floating] = floats
        scale, best, left = kept, grid, floats != 0
        held = None if left.all() else left
        if self.scales != "keep":
            importance = np.diagonal(gram) if self.scales == "output" else np.ones(gram.shape[1], np.float32)
            scale = search(floats, kept, grid, importance)
        root, feedback = None, None if side is None else RowFeedback.of(side, self.act_order, self.damp, where)
        if self.method not in ("nearest", "comq"):
            order = rounding.input_order(gram, self.act_order)
            if isinstance(grid, Vectors):
                order = vector_order(gram, grid.table.shape[1], self.act_order)
            root = rounding.inverse_root(gram, order, self.damp, where)
            report.damped(where, self.damp, root.damp)
            if shift is not None:
                target = rounding.shifted_target(floats, shift, root, self.alpha).astype(np.float32)
        if isinstance(grid, Levels) and self.refits:
            again = partial(self._integers, target, gram, root, feedback, held, scale)
            best, integers = fitted_in_turns(target, gram, scale, grid, again, self.refits, where)
        else:
            integers = self._integers(target, gram, root, feedback, held, scale, grid)
        del root
        if self.scales == "output":
            scale = refit(target, integers, gram, scale)
        values = scale[:, None] * integers
        plain = kept[:, None] * rounding.nearest(floats, kept, grid)
        error = errors_of_rows(values - target, gram, side)
        simple = errors_of_rows(plain - target, gram, side)
        better = error < simple
        report.rows(where, np.where(better, error, simple), simple, better)
        if isinstance(best, Levels) and isinstance(grid, Levels) and best is not grid:
            best = Levels(np.where(better[:, None], best.table, grid.table))
        return np.where(better[:, None], values, plain), np.where(better, scale, kept), best

    def _form(self, inputs: int) -> str:
        """Return how a layer with so many inputs is rounded, in words."""
        in_blocks = self.method == "obq" and inputs > self.exact_inputs
        return f"obq in blocks of {self.exact_inputs}" if in_blocks else self.method

    def _integers(
        self,
        target: npt.NDArray[np.floating],
        gram: Floats,
        root: rounding.Root | None,
        feedback: RowFeedback | None,
        held: rounding.Kept | None,
        scale: Floats,
        grid: Grid,
    ) -> Floats:
        if isinstance(grid, Vectors) and root is not None:
            return gptq_vectors(target, root, scale, grid, block=self.block)
        if self.method == "comq":
            return rounding.comq(
                target, gram, scale, grid, sweeps=self.sweeps, block=self.block, kept=held, sort=self.act_order
            )
        if root is None:
            return rounding.nearest(target, scale, grid)
        if self.method == "obq":
            return obq(target, root, scale, grid, exact=self.exact_inputs, kept=held)
        if feedback is not None:
            return two_sided(target, root, feedback, scale, grid, kept=held)
        return rounding.gptq(target, root, scale, grid, block=self.block, kept=held)
