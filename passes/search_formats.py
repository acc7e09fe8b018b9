"""search_formats: choose bits and a number format for each layer by the images of whole configurations.

assign_bits measures each layer by itself and adds the errors up. Here whole configurations are measured, on the images
of short trajectories, and a regression says which layers matter (compiler/bits/configurations.py): what layers do to
each other is in the measurement. A choice is a width of `widths` with one of `formats`:

- `uniform`: the integer grid of choose_scales.
- `kmeans`, `float`, `log`, `affine`: the codebooks of choose_levels, for 2 to 4 bits. They cost the same code bits, and
  a table for each weight or each of its rows, which counts in the budget.

With `sparsities`, uniform weights are rounded by GPTQ and may have such a share of zeros, by Optimal Brain Surgeon
(compiler/pruning/compressed.py): they cost the bits of what stays, and one for each weight, as in the file. The graph
gets the weights whose images were measured. APQ (arXiv 2006.08509) searches pruning and widths in one space in this
way, and the architecture too, which is given here.

`mean_bits` counts each weight of the layers that are not `islands`, with tables. Each of the `configurations` fills the
budget; they are drawn in `rounds`, and the regression learns in between. An image has `length` calls and there are
`samples` of them; activations are in float meanwhile. The best measured configuration stays.

Memory: the weights of one configuration in float32; pruned ones lie in the working folder, a byte for each weight at
each width and sparsity. The search runs configurations x length x samples network calls,
10 to 50 times what observe runs.

Measured: see the recipes `qua2sedimo`, `fliqs` and `apq` on the leaderboards. With zeros at the size of gptq in 4 bits
(files within 0.3 %; 16 calibration samples, 32 images; epsilon, PSNR median / p10, dB):

    mnist-onnx, gptq               25.1    27.5 / 21.1
    apq                            25.4    31.3 / 23.4
    144 configurations             25.5    32.0 / 25.2
    digits, gptq                   27.6    39.3 / 25.5
    apq                            28.1    34.7 / 23.0

Errors: StatsError if the graph changed after observe, or inputs were not measured by channel; RecipeError for a budget
that no configuration meets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from mezzotint.compiler.bits.allocation import smallest
from mezzotint.compiler.bits.configurations import Configuration, SearchState
from mezzotint.compiler.bits.mixdq import ShortTrajectories
from mezzotint.compiler.bits.simulate import Simulator
from mezzotint.compiler.bits.units import Unit, WeightQuantizers, free_units
from mezzotint.compiler.core.option_checks import require_positive, require_widths
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.pruning.compressed import CompressedWeight, compressed_weights
from mezzotint.compiler.rescaling.importance import input_importance
from mezzotint.compiler.rounding.level_fits import LevelFit, level_errors
from mezzotint.compiler.rounding.weights import weight_rows
from mezzotint.compiler.scales.weights import rounded_weight
from mezzotint.runtime.arrays import AnyArray, Floats

WeightFormat = Literal["uniform", "kmeans", "float", "log", "affine"]
CODEBOOK_BITS = (2, 3, 4)


@dataclass(frozen=True)
class SearchFormats(Pass):
    """Bits, formats and sparsities of weights under a budget of `mean_bits`; all options as above."""

    mean_bits: float = 4.0
    widths: tuple[int, ...] = (3, 4, 8)
    formats: tuple[WeightFormat, ...] = ("uniform", "kmeans")
    configurations: int = 48
    rounds: int = 4
    sparsities: tuple[float, ...] = ()
    samples: int = 2
    length: int = 8
    islands: tuple[str, ...] = ("first", "last")

    needs: ClassVar[frozenset[str]] = frozenset({"stats", "plan"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        require_positive(self, "mean_bits", "configurations", "rounds", "samples", "length")
        require_widths(self, "widths")
        known = get_args(WeightFormat)
        if not self.formats or not set(self.formats) <= set(known):
            hint = f"choose among {', '.join(known)}"
            raise RecipeError(f"{self.name}.formats is {self.formats}", where=self.name, hint=hint)
        if not any(self._allowed(bits, kind) for bits in self.widths for kind in self.formats):
            hint = f"codebooks have {CODEBOOK_BITS[0]} to {CODEBOOK_BITS[-1]} bits: add uniform, or a smaller width"
            raise RecipeError("no width has any of the formats", where=self.name, hint=hint)
        if self.sparsities and self.formats != ("uniform",):
            hint = f"set {self.name}.formats to uniform alone: codebooks are neither pruned nor rounded by GPTQ here"
            raise RecipeError("sparsities are those of uniform weights", where=f"{self.name}.sparsities", hint=hint)
        for share in self.sparsities:
            if not 0 < share < 1:
                hint = "choose above 0 and below 1; the dense weight is always a choice"
                raise RecipeError(f"a sparsity is {share:g}", where=f"{self.name}.sparsities", hint=hint)

    @staticmethod
    def _allowed(bits: int, kind: WeightFormat) -> bool:
        return kind == "uniform" or (bits in CODEBOOK_BITS and not (kind == "float" and bits < 3))

    def run(self, program: Program, context: Context) -> Program:
        plan, stats = program.require_plan(), program.require_stats()
        stats.check_graph(graphs.digest(program.model), self.name)
        units, kept = free_units(program, self.islands, self.name)
        if not units:
            return program.noted("no layer to choose for")
        quantizers = WeightQuantizers(plan, "mse", self.name)
        compressed = self._compressed(program, context)
        choices: list[list[_Choice]] = []
        for done, unit in enumerate(units, 1):
            forms = compressed.get(name_of(unit.weight))
            choices.append(self._choices(unit, quantizers, stats) if forms is None else [*map(_Choice.of, forms)])
            context.progress(f"{self.name}: choices", done, len(units))
        costs = [[choice.cost for choice in row] for row in choices]
        size = sum(unit.size for unit in units)
        limit = int(self.mean_bits * size)
        if smallest(costs) > limit:
            raise RecipeError(
                f"the smallest configuration has {smallest(costs) / size:.3f} bits a weight",
                where=f"{self.name}.mean_bits",
                hint="allow more, or smaller widths",
            )
        state = SearchState([[choice.error for choice in row] for row in choices], costs, limit, context.seed)
        best = self._searched(program, context, units, choices, state)
        taken = [row[k] for row, k in zip(choices, best, strict=True)]
        for unit, choice in zip(units, taken, strict=True):
            if choice.form is not None:
                weight = unit.require_weight()
                weight.const_value = store.kept(choice.form.values(), name_of(weight), context.folder)
        return replace(
            program,
            plan=replace(
                plan,
                quantizers={**plan.quantizers, **_chosen(units, taken, plan.quantizers)},
                islands={**plan.islands, **kept},
            ),
            note=self._note(taken, state, size),
        )

    def _compressed(self, program: Program, context: Context) -> Mapping[str, Sequence[CompressedWeight]]:
        if not self.sparsities:
            return {}
        return compressed_weights(program, context, self.widths, (0.0, *self.sparsities), self.islands, self.name)

    def _choices(self, unit: Unit, quantizers: WeightQuantizers, stats: Stats) -> list[_Choice]:
        """Return the choices of a unit with their errors, relative to the outputs' power, and their costs in bits."""
        layer, weight = unit.layers[0], unit.require_weight()
        rows = weight_rows(weight, layer.require_weight_axis())
        importance = input_importance(unit.layers, rows.shape[1], stats, self.name)
        parts = rows.reshape(len(importance), -1, rows.shape[1])
        power = max(float(np.einsum("grd,grd,gd->", parts, parts, importance, dtype=np.float64)), 1e-300)
        found = []
        for bits in sorted(self.widths):
            for kind in self.formats:
                if self._allowed(bits, kind):
                    quantizer = quantizers(layer, bits)
                    if kind != "uniform":
                        fit = LevelFit(method=kind)
                        quantizer = fit.quantizer(quantizer, rows, importance, self.name, layer.name)
                    scale = np.broadcast_to(quantizer.scale.reshape(-1), len(rows))
                    error = float(level_errors(rows, scale, quantizer.grid, importance).sum())
                    table = 0 if quantizer.levels is None else 8 * int(quantizer.levels.size)
                    found.append(_Choice(bits, kind, quantizer, error / power, bits * unit.size + table))
        return found

    def _searched(
        self,
        program: Program,
        context: Context,
        units: Sequence[Unit],
        choices: Sequence[Sequence[_Choice]],
        state: SearchState,
    ) -> Configuration:
        """Return the configuration with the least error of images."""
        images = ShortTrajectories(program, context, self.samples, self.length)
        names = [name_of(unit.weight) for unit in units]
        with Simulator(program, context, weights=names) as simulator:
            reference = images.draw(simulator)
            power = max(float(np.mean(np.square(reference, dtype=np.float64))), 1e-300)

            def measured(configuration: Configuration) -> float:
                fed: dict[str, AnyArray] = {
                    name: row[k].rounded(unit)
                    for name, unit, row, k in zip(names, units, choices, configuration, strict=True)
                }
                moved = images.draw(simulator, lambda _: fed) - reference
                context.progress(f"{self.name}: images", len(state.found) + 1, self.configurations)
                return max(float(np.mean(np.square(moved, dtype=np.float64))) / power, 1e-12)

            return state.search(measured, self.configurations, self.rounds)

    def _note(self, taken: Sequence[_Choice], state: SearchState, size: int) -> str:
        counts = Counter(choice.words for choice in taken)
        words = ", ".join(f"{n} of {what}" for what, n in sorted(counts.items()))
        errors = list(state.found.values())
        return (
            f"{words}: {sum(choice.cost for choice in taken) / size:.3f} bits a weight; images "
            f"{-10 * np.log10(min(errors)):.1f} dB, the first configuration's {-10 * np.log10(errors[0]):.1f}, the "
            f"worst of {len(errors)} {-10 * np.log10(max(errors)):.1f}"
        )


@dataclass(frozen=True, eq=False)
class _Choice:
    """A width and a format of one weight: its quantizer, its error and its cost. `form` has pruned and rounded it."""

    bits: int
    kind: WeightFormat
    quantizer: Quantizer
    error: float
    cost: int
    form: CompressedWeight | None = None

    @staticmethod
    def of(form: CompressedWeight) -> _Choice:
        return _Choice(form.bits, "uniform", form.quantizer, form.share, form.bits_in_file, form)

    @property
    def words(self) -> str:
        zeros = "" if self.form is None or not self.form.sparsity else f" with {self.form.sparsity:.1%} zeros"
        return f"{self.bits} {self.kind}{zeros}"

    def rounded(self, unit: Unit) -> Floats:
        """Return the weight as the kernels would have it."""
        if self.form is not None:
            return self.form.values()
        return rounded_weight(numpy_of(unit.require_weight()), self.quantizer)


def _chosen(units: Sequence[Unit], taken: Sequence[_Choice], known: Mapping[Site, Quantizer]) -> dict[Site, Quantizer]:
    """Return the quantizers of all sites of the units' weights."""
    found = {}
    for unit, choice in zip(units, taken, strict=True):
        for layer in unit.layers:
            for site in (Site(name_of(layer.weight)), Site(name_of(layer.weight), layer.name)):
                if site in known and known[site].axis == layer.weight_axis:
                    found[site] = choice.quantizer
    return found
