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
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar, Literal

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
from mezzotint.compiler.rounding.layer_inputs import Gathered, Inputs, chosen_latents, gather
from mezzotint.compiler.rounding.parts import parts_in_memory
from mezzotint.compiler.rounding.report import RoundingReport
from mezzotint.compiler.rounding.row_scales import refit, search
from mezzotint.compiler.rounding.vectors import gptq_vectors, vector_order
from mezzotint.compiler.rounding.weights import (
    QuantizedWeight,
    find_weights,
    grid_of,
    layer_name,
    replace_weight,
    with_grids,
)
from mezzotint.runtime.arrays import Floats

RoundingMethod = Literal["nearest", "obq", "gptq", "gptaq", "comq"]


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Weights rounded against the inputs of their layers.

    - `method`, `scales`: as above.
    - `damp` (of the mean diagonal of H) and `block` (columns): those of gptq. `act_order`: the largest inputs first,
      for comq the loudest columns; otherwise columns in their own order.
    - `alpha`: the share of the inputs' error that gptaq undoes. `sweeps`: of comq over all columns.
    - `refits`: of the codebooks' levels, 0 for those of the plan.
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
        require_positive(self, "block", "sweeps", "exact_inputs", "calls", "samples", "columns", "memory_gb", "stage")
        require_not_negative(self, "damp", "alpha", "refits")

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None or program.plan is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        weights = self._chosen(program)
        if not weights:
            return program.noted("no layer has quantized weights: nothing to round")
        float_layers = {layer.name: layer for layer in layers(program.float_model.graph)}
        every_input = [Inputs.of(weight, float_layers, self.name) for weight in weights]
        few = replace(context, samples=min(self.samples, context.samples))
        latents = chosen_latents(program, few, self.calls)
        stages = list(parts_in_memory(every_input, lambda inputs: inputs, self.memory_gb, self.stage))
        total, done = len(stages) * len(latents) + len(every_input), 0
        report = RoundingReport()
        rounded: set[str] = set()
        changed: dict[str, tuple[QuantizedWeight, str, Floats, Grid]] = {}

        def step() -> None:
            nonlocal done
            done += 1
            context.progress(self.name, done, total)

        for stage in stages:
            gathered = gather(
                program,
                context,
                stage,
                latents,
                rounded=rounded,
                columns=self.columns,
                balance=self.balance,
                shifts=self.method == "gptaq",
                step=step,
            )
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

    def _chosen(self, program: Program) -> list[QuantizedWeight]:
        """Return the weights to round. Raise RecipeError for a pattern that matches no layer."""
        weights = find_weights(program.graph)
        names = {id(w): [layer_name(node) for node in w.readers] for w in weights}
        for pattern in self.layers:
            if not any(fnmatchcase(name, pattern) for w in weights for name in names[id(w)]):
                raise RecipeError(
                    f"round_weights.layers: {pattern!r} matches no layer with quantized weights",
                    where=self.name,
                    hint="patterns are those of a shell: `*`, `?`",
                )
        patterns = self.layers or ("*",)
        return [w for w in weights if any(fnmatchcase(name, p) for p in patterns for name in names[id(w)])]

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
        grams, shift = gathered.gram(inputs), gathered.shift(inputs)
        values = np.empty_like(floats)
        table = grid.table.copy() if self.refits and isinstance(grid, Levels) else None
        each = len(floats) // len(grams)
        for g, gram in enumerate(grams):
            part = slice(g * each, (g + 1) * each)
            rounding.check_gram(gram, weight.name)
            moved = None if shift is None else shift[part]
            values[part], scale[part], chosen = self._part(
                floats[part], scale[part], gram, moved, of_rows(grid, part), weight.name, report
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
        grid: Grid,
        where: str,
        report: RoundingReport,
    ) -> tuple[Floats, Floats, Grid]:
        if isinstance(grid, Vectors) and self.method in ("comq", "obq"):
            raise RecipeError(f"{self.method} rounds no vectors", where=where, hint="set round_weights.method to gptq")
        target: npt.NDArray[np.floating] = floats
        scale, best, left = kept, grid, floats != 0
        held = None if left.all() else left
        if self.scales != "keep":
            importance = np.diagonal(gram) if self.scales == "output" else np.ones(gram.shape[1], np.float32)
            scale = search(floats, kept, grid, importance)
        root = None
        if self.method not in ("nearest", "comq"):
            order = rounding.input_order(gram, self.act_order)
            if isinstance(grid, Vectors):
                order = vector_order(gram, grid.table.shape[1], self.act_order)
            root = rounding.inverse_root(gram, order, self.damp, where)
            report.damped(where, self.damp, root.damp)
            if shift is not None:
                target = rounding.shifted_target(floats, shift, root, self.alpha).astype(np.float32)
        if isinstance(grid, Levels) and self.refits:
            again = partial(self._integers, target, gram, root, held, scale)
            best, integers = fitted_in_turns(target, gram, scale, grid, again, self.refits, where)
        else:
            integers = self._integers(target, gram, root, held, scale, grid)
        del root
        if self.scales == "output":
            scale = refit(target, integers, gram, scale)
        values = scale[:, None] * integers
        plain = kept[:, None] * rounding.nearest(floats, kept, grid)
        error = rounding.row_errors(values - target, gram)
        simple = rounding.row_errors(plain - target, gram)
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
        return rounding.gptq(target, root, scale, grid, block=self.block, kept=held)
