"""assign_bits: choose the width of each layer's weights under a budget, by the error that it makes in epsilon.

Each layer is quantized by itself at each width, and the effect on epsilon is measured at a few calls of the float
trajectory (compiler/bits/profile.py). Errors of different layers are nearly independent, so the squared error of an
allocation is close to the sum of theirs, and the best allocation under a budget is an integer program (HAWQ-V3, arXiv
2011.10680; compiler/bits/allocation.py solves it exactly):

    minimise sum_l e[l, c(l)]    subject to    sum_l cost[l, c(l)] <= budget         e: mean over the calls, relative

Exactly one of these budgets must be given:

- `mean_bits`: bits for each weight of the layers that are not islands; a weight in float has 32.
- `size`: of the file, as a share of all parameters in fp32, with islands, norms, biases and tables.
- `latency`: of the layers, as a share of their time on integer kernels. All widths use 8-bit kernels, so only layers in
  float change it; they take `float_cost` times the time of integer multiplications.
- `bops`: multiplications times bits of weights times bits of activations, relative to W8A8.

Scores: `sqnr` as above; `hawq`, noise from the trace of the Gauss-Newton matrix (compiler/gradients/traces.py); `lrp`,
noise from the relevance that epsilon gives to the layer (compiler/gradients/relevance.py), both by one backward pass
for all layers; `mixdq`, layers of cross-attention and feed-forward by the SSIM of images, all others by that squared
error (arXiv 2405.17873; compiler/bits/mixdq.py). The scope `layer` measures the noise in each layer's own output: a few
runs for all layers, for networks too large for one run for each layer and width.

Measured on the digits (46 weights, 2 samples, 3 calls; error of the weights alone): 45.8 dB with 8 bits everywhere,
20.1 dB with 4, and 44.2 dB with 5.0 bits a weight (predicted 42.9). The noise comes from the outermost convolutions at
the last calls; 4 bits suffice for the deep layers, which hold most of the weights. The sum is 0.3 to 1.7 dB too
pessimistic.

With `parts` above 1 the output channels of a weight are sorted (`order`) and cut into that many parts, each with a
width of its own; a part's error is its share of the layer's (compiler/bits/parts.py). MPQ-DM (arXiv 2412.11549) gives
the tenth of the channels with the largest kurtosis one bit more, and the tenth with the smallest one bit less, if the
layer's error falls. Here the integer program may give any of `widths` to any part, and channels are sorted by their
rounding error by default. Measured at 4.2 bits a weight (w8a8-steps, 20 DDIM steps, 8 calibration samples; SQNR of
epsilon in dB, of the weights alone as the pass measures it, and with everything quantized; median PSNR in dB of 16
images of other noise):

    widths 4, 8           1 part  28.2, 31.7, 29.6     10 parts  35.8, 34.3, 27.5     by kurtosis  35.2, 34.0, 30.2
    the same and gptq     1 part        35.0, 39.4     10 parts        36.0, 42.3
    widths 2, 4, 8        1 part  42.5, 35.7, 29.6     10 parts  42.5, 35.8, 32.7

With two widths, parts gain as much as a third width does; with three, the activations' error exceeds the rest. The sum
is more pessimistic with parts (31.1 predicted for 35.8). Kernels are the same, files 0.2 to 0.7 % larger.
Median and p10 of 32 images by w4a8, against the recipe without this pass: digits 41.4 and 32.8 dB against 38.6 and
31.0, mnist-onnx 32.7 and 24.1 against 31.7 and 22.7.

With `levels`, a method of choose_levels, weights of up to 4 bits are judged on the levels of that method and get them,
each of its width; 1 bit needs them. Tables of levels are not in the budget of `mean_bits`.

With `floats` a layer may stay in float, and the error of its activations is measured as well, with the scales of this
plan: then the pass belongs behind all passes that make scales. `activation_widths` also allows activations of fewer
bits (simulated on 8-bit kernels, so they save no time), under a budget of `bops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from mezzotint.compiler.bits.allocation import Allocation, allocate
from mezzotint.compiler.bits.budget import Budget, BudgetKind
from mezzotint.compiler.bits.content import content_layers
from mezzotint.compiler.bits.mixdq import ShortTrajectories, content_scores, split_budget
from mezzotint.compiler.bits.options import BY_GRADIENTS, budgets_of, check_options
from mezzotint.compiler.bits.parts import ChannelOrder, Parts, cut, joined_bytes
from mezzotint.compiler.bits.profile import Profile, Profiler, Weighting
from mezzotint.compiler.bits.report import BitReport
from mezzotint.compiler.bits.simulate import Scene, Simulator
from mezzotint.compiler.bits.units import (
    FLOAT,
    BitChoice,
    Unit,
    WeightQuantizers,
    free_units,
    quantized_model,
    with_choices,
    with_macs,
)
from mezzotint.compiler.core.execute import Feeds
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Plan, Program, Quantizer
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.ops import Layer
from mezzotint.compiler.graph.require import required
from mezzotint.compiler.rescaling.importance import input_importance
from mezzotint.compiler.rounding.level_fits import LevelFit
from mezzotint.compiler.rounding.weights import weight_rows
from mezzotint.compiler.scales.weights import WeightMethod
from mezzotint.compiler.training.torch_check import device_is_there, require_torch
from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.sampling.deployment import Deployment


@dataclass(frozen=True)
class AssignBits(Pass):
    """Widths of layers, or of parts of their output channels, under one budget.

    - `mean_bits`, `size`, `latency`, `bops`: the budget. `islands`: as in insert_qdq; they stay in float.
    - `calls`, `samples`: the profile uses so many calls of the deployment, evenly spaced, and images.
    - `weighting`: `relative` counts every call equally, `absolute` by the power of epsilon there.
    - `weights`: as in choose_scales. `levels`: as above, or null for uniform grids.
    - `splits`, `length` (calls of an image): of mixdq. `spread`, `probes`: of hawq, which adds probes until the
      standard error of each trace is that share of it, or there are so many.
    """

    mean_bits: float | None = None
    size: float | None = None
    latency: float | None = None
    bops: float | None = None
    widths: tuple[int, ...] = (4, 8)
    activation_widths: tuple[int, ...] = (8,)
    floats: bool = False
    score: Literal["sqnr", "hawq", "lrp", "mixdq"] = "sqnr"
    scope: Literal["output", "layer"] = "output"
    weighting: Weighting = "relative"
    calls: int = 5
    samples: int = 4
    weights: WeightMethod = "mse"
    islands: tuple[str, ...] = ("first", "last")
    float_cost: float = 4.0
    splits: int = 7
    length: int = 8
    probes: int = 32
    spread: float = 0.1
    parts: int = 1
    order: ChannelOrder = "error"
    levels: Literal["kmeans", "normal", "affine"] | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"stats", "plan"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        if self.score in BY_GRADIENTS:
            require_torch(self.name, "takes gradients")
        if not budgets_of(self):
            raise RecipeError(
                "assign_bits has no budget",
                where=self.name,
                hint=f"give one of {', '.join(get_args(BudgetKind))}, such as --set assign_bits.mean_bits=5",
            )

    def trains_on(self, device: str) -> bool:
        return self.score in BY_GRADIENTS and device_is_there(device)

    def run(self, program: Program, context: Context) -> Program:
        self.check((), program.deployment)
        plan = program.require_plan()
        kinds = budgets_of(self)
        with_attention = kinds[0] in ("latency", "bops")
        units, kept = free_units(program, self.islands, self.name, with_attention=with_attention)
        if not units:
            return replace(program, note="no layer to choose for")
        if kinds[0] in ("latency", "bops"):
            units = with_macs(units, program, context)
        choices = [self._choices(unit) for unit in units]
        budget = Budget.of(kinds[0], getattr(self, kinds[0]), units, choices, program, self.float_cost)
        if self.size is not None and self.parts > 1:
            budget = replace(budget, base=budget.base + 8 * joined_bytes(units))
        budget.check(self.name)
        quantizers = WeightQuantizers(plan, self.weights, self.name, self._fits(program, units))
        search = _Search(self, program, context, units, choices, budget, quantizers)
        chosen, note = search.run()
        return replace(program, plan=replace(chosen, islands={**kept, **chosen.islands}), note=note)

    def _fits(self, program: Program, units: Sequence[Unit]) -> Callable[[Layer, Quantizer], Quantizer] | None:
        """Return the function that gives a weight's quantizer levels, or None without them."""
        if self.levels is None:
            return None
        stats, fit = program.require_stats(), LevelFit(self.levels)
        readers = {layer.name: unit.layers for unit in units for layer in unit.layers}

        def fitted(layer: Layer, quantizer: Quantizer) -> Quantizer:
            rows = weight_rows(layer.require_weight(), layer.require_weight_axis())
            importance = input_importance(readers[layer.name], rows.shape[1], stats, self.name)
            return fit.quantizer(quantizer, rows, importance, self.name, layer.name)

        return fitted

    def _choices(self, unit: Unit) -> list[BitChoice]:
        widths = self.widths if unit.weight is not None else (8,)
        choices = [BitChoice(b, a) for b in sorted(widths) for a in sorted(self.activation_widths)]
        return choices + [FLOAT] * self.floats


@dataclass(frozen=True, eq=False)
class _Search:
    """One run of the pass: the profile, the allocation and its report."""

    options: AssignBits
    program: Program
    context: Context
    units: Sequence[Unit]
    choices: Sequence[Sequence[BitChoice]]
    budget: Budget
    quantizers: WeightQuantizers

    def run(self) -> tuple[Plan, str]:
        """Return (the plan with the chosen widths and its report, the note)."""
        o = self.options
        narrow = sorted(o.activation_widths) if o.floats or o.activation_widths != (8,) else []
        widths = tuple(sorted(o.widths))
        profiler = Profiler(self.program, self.context, self.quantizers, self.units, widths, tuple(narrow))
        last = len(self.program.deployment.timesteps) - 1
        calls = sorted({round(float(c)) for c in np.linspace(0, last, o.calls)})
        with profiler.simulator() as simulator:
            scenes = simulator.follow(self.context, calls, o.samples, f"{o.name}: float trajectory")
            profile = self._profile(profiler, simulator, scenes)
            errors = [
                [profile.error(unit.name, choice, o.weighting) for choice in row]
                for unit, row in zip(self.units, self.choices, strict=True)
            ]
            parts = cut(
                self.units,
                self.choices,
                errors,
                self.budget.costs,
                profiler.rounded,
                parts=o.parts,
                order=o.order,
                step=self._cutting,
            )
            allocation, splits = self._solve(profiler, simulator, parts)

        def measured(chosen: Sequence[BitChoice]) -> float:
            with self._allocated(profiler, parts.units, chosen) as (whole, fed):
                return profile.share(whole.noise(scenes, fed), o.weighting)

        budget = replace(self.budget, costs=parts.costs)
        bit_report = BitReport(parts.units, parts.choices, parts.errors, budget, measured)
        report = bit_report.to_json(allocation, profile, scenes)
        report |= {"score": o.score, "scope": o.scope, "weighting": o.weighting, "splits": splits}
        if o.score == "mixdq":
            report |= {"content": sorted(content_layers(self.program))}
        if o.parts > 1:
            report |= {"parts": o.parts, "order": o.order, "channels": bit_report.channels(allocation)}
        if profile.traces:
            report |= {"traces": {name: trace.to_json() for name, trace in profile.traces.items()}}
        plan = with_choices(parts.units, bit_report.picked(allocation), self.quantizers)
        return replace(plan, report=report), bit_report.note(report) + profile.note()

    def _profile(self, profiler: Profiler, simulator: Simulator, scenes: Sequence[Scene]) -> Profile:
        o = self.options
        if o.score == "hawq":
            from mezzotint.compiler.gradients.traces import hawq_profile

            return hawq_profile(profiler, simulator, scenes, o.probes, o.spread)
        if o.score == "lrp":
            from mezzotint.compiler.gradients.relevance import lrp_profile

            return lrp_profile(profiler, simulator, scenes)
        measure = profiler.own_outputs if self.options.scope == "layer" else profiler.outputs
        return measure(simulator, scenes)

    def _cutting(self, done: int) -> None:
        if self.options.parts > 1:
            self.context.progress(f"{self.options.name}: channels", done + 1, len(self.units))

    def _solve(self, profiler: Profiler, simulator: Simulator, parts: Parts) -> tuple[Allocation, list[float]]:
        if self.options.score == "mixdq":
            return self._split(profiler, simulator, parts.errors)
        allocation = allocate(parts.errors, parts.costs, self.budget.limit)
        return required(allocation, "an allocation within the budget", self.options.name), []

    def _split(
        self, profiler: Profiler, simulator: Simulator, errors: list[list[float]]
    ) -> tuple[Allocation, list[float]]:
        """Return the allocation of mixdq's search; see compiler/bits/mixdq.py."""
        pictures = ShortTrajectories(self.program, self.context, self.options.samples, self.options.length)
        reference = pictures.draw(simulator)
        names = content_layers(self.program)
        content = [unit.name in names for unit in self.units]
        scores = content_scores(profiler, simulator, pictures, reference, self.choices, errors, content)

        def measured(chosen: tuple[int, ...]) -> float:
            taken = [row[c] for row, c in zip(self.choices, chosen, strict=True)]
            with self._allocated(profiler, self.units, taken) as (whole, fed):
                return pictures.unlike(reference, pictures.draw(whole, fed))

        return split_budget(scores, self.budget.costs, content, self.budget.limit, self.options.splits, measured)

    @contextmanager
    def _allocated(
        self, profiler: Profiler, units: Sequence[Unit], chosen: Sequence[BitChoice]
    ) -> Iterator[tuple[Simulator, Callable[[int], Feeds]]]:
        """Yield a simulator of a whole allocation, and the feeds of each call."""
        plan = with_choices(units, chosen, self.quantizers)
        taken = [(unit, choice) for unit, choice in zip(units, chosen, strict=True) if choice != FLOAT]
        on = [layer for unit, _ in taken for layer in unit.layers] if profiler.activation_widths else []
        model = quantized_model(self.program, self.units, plan)
        with Simulator(self.program, self.context, layers=on, plan=self.quantizers.plan, model=model) as simulator:

            def fed(call: int) -> Feeds:
                feeds: dict[str, AnyArray] = {}
                for unit, choice in taken:
                    feeds |= profiler.switched(simulator, unit, choice.activation, call) if on else {}
                return feeds

            yield simulator, fed
