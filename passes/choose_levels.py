"""choose_levels: give weights of 2 to 4 bits a codebook of 2^bits levels in place of a uniform grid.

The levels are int8 integers, so that a weight is s l with l of its row's table: the kernels compute with int8 as they
do without, at the same speed, and what is saved is the file. It stores codes of `bits` bits and the tables, and unpacks
them when a session is built (compiler/lowering/codes.py). Nearest, gptq, gptaq, obq and comq round to the nearest level
in place of the nearest integer, and `round_weights.refits` fits the levels again behind them.

Levels are chosen to lower sum_i h_i (w_i - s l)^2, where h_i is the mean square of the weight's input over all calls:
the diagonal of GPTQ's H, but for the borders of images. Methods:

- `kmeans`: the best levels on the int8 grid, by dynamic programming (compiler/scales/kmeans.py). With `tables` row each
  output channel has a table, as in GANQ (arXiv 2501.12956); with tensor all of a weight share one, and the scales of
  rows and the table are fitted in turns.
- `normal`: those for normally distributed weights, as in HIGGS (arXiv 2411.17525).
- `float`: the values of a small float format, as in FP4DiT (arXiv 2503.15465): 4 bits E2M1, E1M2 or E3M0, 3 bits E2M0
  or E1M1; `form` names it, or best takes the one of least error for each weight. A format of b bits has 2^b - 1 values.
- `log`: two logarithmic grids, for the negative and the positive weights of a row, as in LRQ-DiT (arXiv 2508.03485).
  eta and the share of the magnitudes below the end are searched for each row.
- `affine`: equally spaced levels with a scale and a zero point for each row, as in NeUQI (arXiv 2505.17595;
  compiler/scales/affine_levels.py).
- `vectors`: 2^(bits size) vectors of `size` neighbouring inputs for each weight, by weighted k-means, as in GPTVQ
  (arXiv 2402.15319); `bits size` is at most 8 (compiler/scales/vector_codebooks.py). A weight whose number of inputs
  `size` does not divide keeps its grid. `nearest`, `gptq` and `gptaq` round to vectors (compiler/rounding/vectors.py).

`normal` and `float` have one table for all weights; the scale of a row is searched among 29 fractions of its largest
magnitude (compiler/rounding/row_scales.py). compiler/scales/codebooks.py has the formulas.

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
    3 bits kmeans, gptq             23.8 (18.2), 23.5    395          19.9 (14.9), 24.5
    3 bits kmeans, gptq, refits 4   19.7 (14.8), 24.1    395          20.1 (15.0), 24.9

So 3 bits of kmeans with gptq beat 4 bits to nearest on mnist-onnx; on the digits they do in epsilon only, and lose 8 dB
of the images. 16 images tell differences of some dB apart, not less.

Errors: StatsError if the graph changed after observe, or if inputs were not measured by channel; RecipeError for a
float format of another width, and for vectors of too many bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.core.formats import INT8, Grid, Levels, Vectors, round_on
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import Layer, layers
from mezzotint.compiler.graph.require import required
from mezzotint.compiler.rescaling.scaling import channel_axis
from mezzotint.compiler.rounding.row_scales import search
from mezzotint.compiler.rounding.weights import weight_rows
from mezzotint.compiler.scales import kmeans
from mezzotint.compiler.scales.affine_levels import affine_levels
from mezzotint.compiler.scales.codebooks import FLOAT_FORMS, float_levels, normal_levels, twin_log_levels
from mezzotint.compiler.scales.vector_codebooks import vector_table
from mezzotint.runtime.arrays import Floats

LEVEL_BITS = 4
VECTOR_BITS = 8  # of the code of a vector
LOG_ETAS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
LOG_SHARES = (1.0, 0.99, 0.98)
TURNS = 3  # of scales and a shared table

_Table = npt.NDArray[np.int8]


@dataclass(frozen=True)
class ChooseLevels(Pass):
    """Codebooks for weights of 2 to 4 bits.

    - `method`, `tables` (of kmeans), `form` (of float), `size` (of vectors): as above.
    - `weighted`: errors are weighted by the inputs, which observe.channels=inputs measures; otherwise their weights are
      equal.
    """

    method: Literal["kmeans", "normal", "float", "log", "affine", "vectors"] = "kmeans"
    tables: Literal["row", "tensor"] = "row"
    form: Literal["best", "e2m1", "e1m2", "e3m0", "e2m0", "e1m1"] = "best"
    size: Literal[2, 4] = 2
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
            warning = f"{self.name}: no weight has 2 to {LEVEL_BITS} bits, so that none got a codebook"
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
        importance = self._importance(readers, rows.shape[1], stats)
        bits = quantizer.format.bits
        if self.method == "vectors":
            if bits * self.size > VECTOR_BITS:
                raise RecipeError(
                    f"a code of {self.size} weights of {bits} bits has more than {VECTOR_BITS} bits",
                    where=first.name,
                    hint="set choose_levels.size to 2, or fewer bits",
                )
            if rows.shape[1] % self.size:
                return quantizer, 1.0
        table, scale = self._fit(rows, importance, bits, first.name)
        codebook = Vectors(table) if self.method == "vectors" else Levels(table)
        old = np.broadcast_to(quantizer.scale.reshape(-1), len(rows))
        before = sum(_errors(rows, old, quantizer.grid, importance))
        after = sum(_errors(rows, scale, codebook, importance))
        new = replace(
            quantizer,
            format=INT8,
            scale=scale,
            zero_point=np.zeros(len(scale), np.int8),
            by=self.name,
            levels=table if isinstance(codebook, Levels) else None,
            vectors=table if isinstance(codebook, Vectors) else None,
        )
        return new, float(after / before) if before else 1.0

    def _importance(self, readers: list[Layer], inputs: int, stats: Stats) -> Floats:
        """Return the mean square of each input `[groups, inputs]`, summed over the layers that read a weight."""
        groups = {_groups(layer) for layer in readers}
        if len(groups) > 1:
            raise StatsError("one weight is read by convolutions of different groups", where=readers[0].name)
        total = np.zeros((groups.pop(), inputs))
        for layer in readers:
            squares = stats.mean_squares(name_of(layer.activations[0]), channel_axis(layer)) if self.weighted else None
            if squares is None:
                if self.weighted:
                    raise StatsError(
                        "its input was not measured by channel",
                        where=layer.name,
                        hint="--set choose_levels.weighted=false",
                    )
                total += 1.0
            else:
                parts = squares.reshape(len(total), -1)
                total += np.repeat(parts, inputs // parts.shape[1], axis=1)
        total[total.sum(axis=1) == 0] = 1.0  # silent inputs: every level is as good as any other
        return total.astype(np.float32)

    def _fit(self, rows: Floats, importance: Floats, bits: int, where: str) -> tuple[_Table, Floats]:
        """Return levels `[count]` or `[rows, count]`, and scales `[rows]`."""
        count = 1 << bits
        if self.method == "kmeans" and self.tables == "row":
            scale = kmeans.own_scales(rows)
            tables = [kmeans.best_levels(rows[p], scale[p], h, count) for p, h in _parts(rows, importance)]
            return np.concatenate(tables), scale
        if self.method in ("kmeans", "vectors"):
            scale = kmeans.own_scales(rows)
            each = np.repeat(importance, len(rows) // len(importance), axis=0)
            table = self._shared(rows, scale, each, count)
            for _ in range(TURNS - 1):
                grid = Vectors(table) if self.method == "vectors" else Levels(table)
                scale = _searched(rows, scale, grid, importance)
                table = self._shared(rows, scale, each, count)
            return table, scale
        if self.method == "log":
            return _best_log(rows, importance, bits)
        if self.method == "affine":
            found = [affine_levels(rows[p], h, bits) for p, h in _parts(rows, importance)]
            return np.concatenate([table for table, _ in found]), np.concatenate([scale for _, scale in found])
        tables = [normal_levels(bits)] if self.method == "normal" else self._float_tables(bits, where)
        fitted = [(table, _searched(rows, kmeans.own_scales(rows), Levels(table), importance)) for table in tables]
        return min(fitted, key=lambda one: sum(_errors(rows, one[1], Levels(one[0]), importance)))

    def _shared(self, rows: Floats, scale: Floats, importance: Floats, count: int) -> _Table:
        if self.method == "vectors":
            return vector_table(rows, scale, importance, count**self.size, self.size)
        return kmeans.shared_levels(rows, scale, importance, count)

    def _float_tables(self, bits: int, where: str) -> list[_Table]:
        forms = FLOAT_FORMS.get(bits, {})
        names = list(forms) if self.form == "best" else [self.form]
        if not forms or not set(names) <= set(forms):
            raise RecipeError(
                f"a weight has {bits} bits, and the float format is {self.form}",
                where=where,
                hint="; ".join(f"{b} bits: {', '.join(each)}" for b, each in FLOAT_FORMS.items()),
            )
        return [float_levels(*forms[name]) for name in names]


def _narrow(quantizer: Quantizer) -> bool:
    return quantizer.uniform and quantizer.format.bits <= LEVEL_BITS


def _groups(layer: Layer) -> int:
    return int(layer.node.attributes["group"].as_int()) if "group" in layer.node.attributes else 1


def _parts(rows: Floats, importance: Floats) -> Iterator[tuple[slice, Floats]]:
    """Yield the rows of each group of a convolution with the importance of its inputs `[d]`."""
    each = len(rows) // len(importance)
    for g, h in enumerate(importance):
        yield slice(g * each, (g + 1) * each), h


def _searched(rows: Floats, scale: Floats, grid: Grid, importance: Floats) -> Floats:
    found = [search(rows[p], scale[p], grid, h) for p, h in _parts(rows, importance)]
    return np.concatenate(found)


def _errors(rows: Floats, scale: Floats, grid: Grid, importance: Floats) -> npt.NDArray[np.float64]:
    """Return sum_i h_i (w_i - s l)^2 of each row."""
    difference = rows - scale[:, None] * round_on(rows / scale[:, None], grid, 0)
    parts = [np.square(difference[p]) @ h.astype(np.float64) for p, h in _parts(rows, importance)]
    return np.concatenate(parts)


def _best_log(rows: Floats, importance: Floats, bits: int) -> tuple[_Table, Floats]:
    table, scale = twin_log_levels(rows, LOG_ETAS[0], LOG_SHARES[0], bits)
    error = _errors(rows, scale, Levels(table), importance)
    for eta in LOG_ETAS:
        for share in LOG_SHARES:
            tried, its_scale = twin_log_levels(rows, eta, share, bits)
            loss = _errors(rows, its_scale, Levels(tried), importance)
            better = loss < error
            table[better], scale[better], error[better] = tried[better], its_scale[better], loss[better]
    return table, scale
