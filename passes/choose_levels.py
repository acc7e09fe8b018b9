"""choose_levels: give weights of 1 to 4 bits a codebook of 2^bits levels in place of a uniform grid.

The levels are int8 integers, so that a weight is s l with l of its row's table: the kernels compute with int8 as they
do without, at the same speed, and what is saved is the file. It stores codes of `bits` bits and the tables, and unpacks
them when a session is built (compiler/lowering/codes.py). Nearest, gptq, gptaq, obq and comq round to the nearest level
in place of the nearest integer, and `round_weights.refits` fits the levels again behind them.

Levels are chosen to lower sum_i h_i (w_i - s l)^2, where h_i is the mean square of the weight's input over all calls:
the diagonal of GPTQ's H, but for the borders of images. Methods:

- `kmeans`: the best levels on the int8 grid, by dynamic programming (compiler/scales/kmeans.py). With `tables` row each
  output channel has a table, as in GANQ (arXiv 2501.12956); with tensor all of a weight share one, and the scales of
  rows and the table are fitted in turns.
- `normal`: those for normally distributed weights, as in HIGGS (arXiv 2411.17525). With 1 bit they are signs, and the
  scale of a row is the weighted mean of |w|.
- `float`: the values of a small float format, as in FP4DiT (arXiv 2503.15465): 4 bits E2M1, E1M2 or E3M0, 3 bits E2M0
  or E1M1; `form` names it, or best takes the one of least error for each weight. A format of b bits has 2^b - 1 values.
- `log`: two logarithmic grids, for the negative and the positive weights of a row, as in LRQ-DiT (arXiv 2508.03485).
  eta and the share of the magnitudes below the end are searched for each row. It needs 2 bits.
- `affine`: equally spaced levels with a scale and a zero point for each row, as in NeUQI (arXiv 2505.17595;
  compiler/scales/affine_levels.py).
- `vectors`: 2^(bits size) vectors of `size` neighbouring inputs for each weight, by weighted k-means, as in GPTVQ
  (arXiv 2402.15319); `bits size` is at most 8 (compiler/scales/vector_codebooks.py). A weight whose number of inputs
  `size` does not divide keeps its grid, or has levels by kmeans where it has 1 bit. `nearest`, `gptq` and `gptaq`
  round to vectors (compiler/rounding/vectors.py).
- `pyramid`: the integer points of `size` neighbouring inputs whose magnitudes sum to K, as in pyramid vector
  quantization (arXiv 2410.16926), for the largest K that codes of `bits size` bits have room for; with `nested` those
  of K - 2, K - 4 .. too, for groups of smaller magnitude. All weights have one table (compiler/scales/pyramids.py).
  Else as `vectors`.

`normal`, `float` and `pyramid` have one table for all weights; the scale of a row is searched among 29 fractions of its
largest magnitude, and with 1 bit or pyramids fitted to the codes (compiler/rounding/row_scales.py).
compiler/scales/codebooks.py has the formulas.

A uniform grid of 1 bit has the point 0 alone, so that the note compares the levels of 1 bit with weights of 0.
A table of a row costs 2^bits bytes: at 3 bits 2 % of a row of 1,152 inputs, 30 % of one of 72. Weights whose channels
have different widths (assign_bits), and weights of more bits, keep their uniform grids.

Measured at activations of 8 bits (w8a8, 20 DDIM steps, 8 calibration samples, 16 images; PSNR of the images in dB,
median and 10th percentile, and SQNR of epsilon; the size of mnist-onnx's file in kB):

                                    mnist-onnx                        digits
    4 bits uniform, nearest         15.0 (11.2), 19.3    450          28.3 (20.4), 23.4
    4 bits uniform, gptq            27.6 (21.0), 25.2    450
    4 bits e2m1, nearest            17.1 (12.7), 20.0    468
    4 bits best float, gptq         28.3 (21.1), 25.7    462
    4 bits kmeans, nearest          25.1 (21.3), 22.2    487
    4 bits kmeans, gptq, refits 4   30.6 (24.5), 26.2    487
    3 bits uniform, gptq            17.7 (13.4), 22.2    450
    3 bits kmeans, nearest           8.7 (7.7),  15.0    395
    3 bits kmeans, gptq             23.8 (18.2), 23.5    395          30.4 (23.3), 25.5
    3 bits kmeans, gptq, refits 4   19.7 (14.8), 24.1    395          29.9 (23.4), 26.1

So 3 bits of kmeans with gptq beat 4 bits to nearest on both. 16 images tell differences of some dB apart, not less.
With 16 calibration samples and 32 images of mnist-onnx:

    2 bits kmeans, gptq, refits 4 (ganq)          14.1 (11.0), 18.1
    2 bits vectors of 2, gptq (gptvq)             18.0 (13.5), 16.4
    2 bits nested pyramids, gptq (pyramid-vq)     16.7 (13.6), 17.4
    2 bits one pyramid, gptq                      16.0 (14.4), 15.1
    1 bit signs, nearest (higgs)                  10.3 (9.1),   4.9
    1 bit kmeans, gptq, refits 4 (ganq)           12.0 (10.7),  9.3

So pyramids have the better images beside four levels for each row, and the worse epsilon, without a fit.

Errors: StatsError if the graph changed after observe, or if inputs were not measured by channel; RecipeError for a
float format of another width, for vectors of too many bits, and for logarithmic levels of 1 bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import Layer, layers
from mezzotint.compiler.graph.require import required
from mezzotint.compiler.rescaling.importance import input_importance
from mezzotint.compiler.rounding.level_fits import (
    OF_VECTORS,
    FloatForm,
    LevelFit,
    LevelMethod,
    LevelTables,
    level_errors,
)
from mezzotint.compiler.rounding.weights import weight_rows
from mezzotint.compiler.scales.codebooks import LEVEL_BITS

VECTOR_BITS = 8  # of the code of a vector


@dataclass(frozen=True)
class ChooseLevels(Pass):
    """Codebooks for weights of 1 to 4 bits.

    - `method`, `tables` (of kmeans), `form` (of float), `size` (of vectors and pyramids), `nested`: as above.
    - `weighted`: errors are weighted by the inputs, which observe.channels=inputs measures; otherwise their weights are
      equal.
    """

    method: LevelMethod = "kmeans"
    tables: LevelTables = "row"
    form: FloatForm = "best"
    size: Literal[2, 4] = 2
    nested: bool = True
    weighted: bool = True

    needs: ClassVar[frozenset[str]] = frozenset({"stats", "plan"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def run(self, program: Program, context: Context) -> Program:
        plan, stats = program.require_plan(), program.require_stats()
        stats.check_graph(graphs.digest(program.model), self.name)
        if self.weighted and not stats.squares:
            raise StatsError(
                "no input was measured by channel",
                where=self.name,
                hint="measure them: --set observe.channels=inputs, or --set choose_levels.weighted=false",
            )
        readers: dict[Site, list[Layer]] = {}
        for layer in layers(program.graph):
            if layer.weight is not None:
                own = Site(name_of(layer.weight), layer.name)
                readers.setdefault(own if own in plan.quantizers else Site(own.value), []).append(layer)
        chosen = {site: q for site in readers if (q := plan.quantizers.get(site)) is not None and _narrow(q)}
        if not chosen:
            warning = f"{self.name}: no weight has 1 to {LEVEL_BITS} bits, so that none got a codebook"
            hint = "--set choose_scales.weight_bits=3"
            return replace(program, warnings=(*program.warnings, f"{warning}; {hint}"), note="no narrow weights")
        quantizers, shares = dict(plan.quantizers), []
        for done, (site, quantizer) in enumerate(chosen.items(), 1):
            quantizers[site], share = self._with_levels(quantizer, readers[site], stats)
            shares.append(share)
            context.progress(self.name, done, len(chosen))
        found = sum(not quantizers[site].uniform for site in chosen)
        note = (
            f"{found} of {len(chosen)} weights have codebooks; error {np.mean(shares):.0%} of the uniform grids' (mean)"
        )
        return replace(program, plan=replace(plan, quantizers=quantizers), note=note)

    def _with_levels(self, quantizer: Quantizer, readers: list[Layer], stats: Stats) -> tuple[Quantizer, float]:
        """Return a weight's quantizer with a codebook, and its error relative to the uniform one's."""
        first = readers[0]
        weight, axis = required(first.weight, "the weight", first.node), required(quantizer.axis, "an axis", first.node)
        rows = weight_rows(weight, axis)
        importance = input_importance(readers, rows.shape[1], stats if self.weighted else None, self.name)
        bits, method = quantizer.format.bits, self.method
        if self.method in OF_VECTORS:
            if bits * self.size > VECTOR_BITS:
                raise RecipeError(
                    f"a code of {self.size} weights of {bits} bits has more than {VECTOR_BITS} bits",
                    where=first.name,
                    hint="set choose_levels.size to 2, or fewer bits",
                )
            if rows.shape[1] % self.size:
                if bits > 1:
                    return quantizer, 1.0
                method = "kmeans"
        fit = LevelFit(method, self.tables, self.form, self.size, self.nested)
        new = fit.quantizer(quantizer, rows, importance, self.name, first.name)
        old = np.broadcast_to(quantizer.scale.reshape(-1), len(rows))
        before = sum(level_errors(rows, old, quantizer.grid, importance))
        after = sum(level_errors(rows, new.scale, new.grid, importance))
        return new, float(after / before) if before else 1.0


def _narrow(quantizer: Quantizer) -> bool:
    return quantizer.uniform and quantizer.format.bits <= LEVEL_BITS
