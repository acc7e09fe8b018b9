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
goes through in turn (YAQA, compiler/rounding/two_sided.py; a weight keeps all of its rows or none). `scores` takes no
gradients: what counts of queries, keys and values is what attention makes of their errors (aespa,
compiler/rounding/score_stage.py), with gptq between the rows of queries and keys as well.

Statistics: latents of the float trajectory at `calls` network calls spread evenly over it, of the first `samples`
images of the calibration at each call (whatever allocate_steps chose), and `columns` positions for each layer, shared
equally by calls and samples. A few images suffice, because an image has many positions. With
`balance` each call's share is divided by its mean square; otherwise the calls with the largest inputs would dominate.

Layers are rounded in stages, in the graph's order. The matrices H of one stage fit into `memory_gb` (a stage has at
least one layer, and a layer that is being rounded needs a second matrix), and a stage has at most `stage` layers, so
nearly all layers before a layer are rounded when its inputs are collected. The others of its stage are still rounded to
nearest then.
A weight that several layers read is rounded once, with the sum of their H, at the first of them. BLAS uses as many
threads as its environment variables say, whatever the context says. The workers of `--cluster` run the batches of a
stage, unless `weighting` takes gradients, and round its weights, with as many threads of BLAS as this process has: last
bits depend on them.

Measured on the digits with weights of 4 bits (w8a8-steps, 8 calibration samples, 46 weights; SQNR of epsilon in dB over
10 calls of 8 images that calibration did not see, and at the first and the last call):

    nearest 24.8 (37.8, 14.4)             gptq 28.6 (49.8, 17.9)          gptaq 28.9 (49.7, 18.2)
    nearest, output 25.0 (38.9, 14.6)     gptq, output 28.3 (49.4, 17.6)  comq, output 27.4 (48.2, 16.7)

(gptaq with the scales `output` too). The layers' own error falls to 14 % of nearest's, with comq to 21 %; scales that
fit one layer's calibration inputs better do not help after gptq. With 32 calibration samples and 50 steps, images of
w8a8-steps with 4-bit weights go from 30.9 to 40.9 dB, epsilon from 29.6 to 34.2. One layer of 11,520 inputs and 1280
outputs takes 16 seconds of one core and 1.6 GB after its statistics, which take 1.3 seconds for 1024 columns. The
Stable Diffusion 1.5 configuration (272 weights, up to 23,040 inputs) takes 18 minutes of two cores for four samples at
four calls; the whole compilation, with branches of low rank, peaks at 12.6 GB.

With `weighting`, static activations and 20 calls (epsilon; PSNR of 32 images, median and p10; dB):

    digits      none 27.7, 40.0, 28.2    guided 27.2, 38.6, 28.3    oac 27.2, 36.4, 26.7    yaqa 27.5, 41.6, 28.6
    mnist-onnx  none 25.1, 27.5, 21.1    guided 25.2, 31.0, 21.5    oac 24.6, 25.1, 19.2    yaqa 25.5, 33.7, 28.0
    digits-dit  none 23.3, 30.8, 26.7    guided 23.3, 32.6, 27.2    oac 23.3, 33.1, 26.6    yaqa 23.6, 37.0, 31.3
    mnist-onnx with 3 bits: none 21.5, 16.7, 12.0    guided 22.1, 16.6, 11.9    yaqa 23.6, 25.6, 21.8
    digits-dit, scores (15 of 36 weights; 16 calibration samples): none 23.2, 31.7, 25.8    scores 23.3, 31.8, 26.1
    the same with 3 bits: none 20.1, 22.9, 18.0    scores 20.2, 23.8, 18.6
    digits, scores (12 of 49 weights): none 27.6, 39.3, 25.5    scores 27.7, 37.9, 25.0
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import numpy as np

from mezzotint.compiler.core.formats import Grid
from mezzotint.compiler.core.option_checks import require_not_negative, require_positive
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Plan, Program
from mezzotint.compiler.errors import StatsError
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.gathering import gather
from mezzotint.compiler.rounding.layer_inputs import Gathered, Inputs, Latents, chosen_latents
from mezzotint.compiler.rounding.parts import parts_in_memory
from mezzotint.compiler.rounding.report import RoundingReport
from mezzotint.compiler.rounding.rounder import RoundingMethod, WeightMatrix, WeightRounder, rounded_in_order
from mezzotint.compiler.rounding.score_stage import gather_scores, projections_of
from mezzotint.compiler.rounding.two_sided import check_weighting
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

WITHOUT_GRADIENTS = ("none", "scores")


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
    weighting: Literal["none", "guided", "oac", "yaqa", "scores"] = "none"
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
        if self.weighting not in WITHOUT_GRADIENTS:
            require_torch(self.name, "takes gradients")

    def trains_on(self, device: str) -> bool:
        return self.weighting not in WITHOUT_GRADIENTS and device_is_there(device)

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
        each = 0 if self.weighting in WITHOUT_GRADIENTS else self.row_groups if self.weighting == "guided" else 1
        stages = list(parts_in_memory(every_input, lambda inputs: inputs, self.memory_gb, self.stage, each=each))
        total, done = len(stages) * len(latents) + len(every_input), 0
        rounder = WeightRounder(**{field.name: getattr(self, field.name) for field in fields(WeightRounder)})
        report = RoundingReport()
        rounded: set[str] = set()
        changed: dict[str, tuple[QuantizedWeight, str, Floats, Grid]] = {}

        def step() -> None:
            nonlocal done
            done += 1
            context.progress(self.name, done, total)

        for stage in stages:
            gathered = self._gather(program, context, stage, latents, rounded, step)
            matrices = _Matrices(stage, gathered, program.plan)
            for inputs, found in zip(stage, rounded_in_order(rounder, matrices, context, self.name), strict=True):
                weight = inputs.weight
                for node, name in zip(weight.readers, inputs.float_weights, strict=True):
                    if found.grid is not None or not np.array_equal(found.scale, weight.scale()):
                        grid = matrices.grid(inputs) if found.grid is None else found.grid
                        changed[layer_name(node)] = (weight, name, found.scale, grid)
                report.add(found.report)
                replace_weight(program, weight, found.rows, found.scale, context.folder, self.name)
                rounded.add(name_of(weight.value))
                gathered.forget(inputs)
                step()
        plan = with_grids(program.plan, changed, self.name) if changed else program.plan
        words = ""
        if self.weighting == "scores":
            words = f"; {len(projections_of(program, every_input))} by what attention makes of their errors"
        return replace(program, plan=plan, note=report.note(len(every_input), len(stages)) + words)

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
        if self.weighting == "scores":
            return gather_scores(program, context, stage, latents, **common)
        from mezzotint.compiler.gradients.stage_curvature import gather_weighted

        numbers: dict[str, Any] = {"row_groups": self.row_groups, "probes": self.probes}
        return gather_weighted(program, context, stage, latents, self.weighting, **numbers, **common)


@dataclass(frozen=True)
class _Matrices(Sequence[WeightMatrix]):
    """The weights of a stage with their matrices, each put together when it is asked for."""

    stage: Sequence[Inputs]
    gathered: Gathered
    plan: Plan

    def __len__(self) -> int:
        return len(self.stage)

    def __getitem__(self, index: Any) -> Any:
        inputs = self.stage[index]
        weight, gathered = inputs.weight, self.gathered
        return WeightMatrix(
            weight.name,
            inputs.rows(),
            weight.scale(),
            weight.per_row,
            self.grid(inputs),
            gathered.gram(inputs),
            gathered.shift(inputs),
            gathered.side(inputs),
        )

    def grid(self, inputs: Inputs) -> Grid:
        """Return the grid of a weight, as the plan has it."""
        return grid_of(inputs.float_weights[0], inputs.weight, self.plan)
