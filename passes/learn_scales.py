"""learn_scales: learn scales and zero points by gradients, against the outputs of the float graph.

LSQ (arXiv 1902.08153): the gradient reaches a scale through the rounding. Here both ends of a grid are learned, in
units relative to the grid, so one learning rate fits scales of any size (compiler/training/learned_scales.py has the
formulas, fit_scales.py the loss). Tables are learned row by row, which is the temporal quantizer of DilateQuant (arXiv
2409.14307) and EfficientDM (arXiv 2310.03270); a row that no recorded call uses stays as it is. With weights left
alone this is the last phase of Q-Diffusion's reconstruction (arXiv 2302.04304).

What is trained is the graph behind the passes, with the quantizers of convolutions' outputs. Units are trained in the
graph's order: their inputs come from the prefix that is trained already, their targets from the float graph. A unit
that is no better behind the fit, on all recorded data, keeps its start. A quantizer that several units read, or that
shares its constants with one of another unit, belongs to no unit and stays; the note says how many. Weights are rounded
anew on their learned scales, but weights on the grid already (round_weights, reconstruct) keep their integers.

With `weight_steps` the weights themselves move too, with straight-through gradients, as in LSQ's own training
(compiler/training/moving_weights.py). By blocks this is DilateQuant's distillation: one block behind the other, its
weights, their scales and all rows of its tables together. `mixed` lets a step take its samples from several calls, as
DilateQuant's parallel quantizer does, so that more rows move in a step.

Statistics: latents of the float trajectory at `calls` network calls spread evenly over it, of the first `samples`
calibration images. A step takes `batch` samples of one call, so a row has about iterations / rows steps.

Measured (epsilon, PSNR median / 10th percentile in dB; 32 unseen images, DDIM, 20 steps), mnist-onnx, w8a8-steps with
activations of 4 bits and weights of 8:

    measured ranges                             15.4    19.6 / 16.9
    by blocks, learning rate 0.003              15.8    21.3 / 17.3    (rows without shared offsets)
    by blocks, 0.01                             19.1    25.0 / 19.9
    by blocks, 0.03                             19.8    24.6 / 18.8
    through the network                         19.5    24.6 / 18.3
    through the network, 1000 iterations        20.3    25.5 / 20.2
    through the network, form: network          19.8    25.2 / 19.4
    ranges of least squared error, measured     16.9    19.4 / 16.7    and from there, form: network  19.0  22.9 / 19.1

So wide ranges are the better start, 0.01 is the default, and a network of the timestep is worth more than free rows (as
TDQ says). On the digits with 4 bits for both (w8a8-best: GPTQ), 200 iterations through the network: 14.4, 19.8 / 15.2
before, 16.7, 23.8 / 17.1 behind, and with the weights' scales 17.3, 22.6 / 16.7.

Epsilon always gains; images need not, where they were good. On mnist-onnx, with bits for both:

    tdq, 4 bits    11.5    14.6 / 12.9    behind    14.6    16.0 / 13.9
    lsq, 4 bits     7.1    13.0 / 12.3    behind    11.5    13.6 / 11.5
    tdq, 6 bits    19.8    25.7 / 21.1    behind    23.1    25.7 / 18.7    (a fifth of the rate: 21.2, 23.5 / 18.7)
    lsq, 6 bits    16.2    25.6 / 20.2    behind    19.5    20.7 / 17.2

With weights that move, 4 bits for both (mnist-onnx, dilatequant, 300 iterations, 64 images):

    w8a8, dilate                                11.4    15.3 / 12.6    and    11.2    17.3 / 13.4
    dilatequant, untrained                      13.1    16.6 / 13.0
    by blocks, one behind the other             16.9    19.7 / 15.8
    all at once (distill; see below)            17.4    21.3 / 17.4
    lsq, its weights rounded anew and moving    15.6    18.1 / 14.0    and    16.5    20.2 / 14.9

So the paper's form is better than no training, and worse than distill with blocks = 1.0 and scales = activations, which
also moves biases and keeps the best images: a copy of the recipe with this pass in the place of learn_scales has it.

It takes about a minute of one core on mnist-onnx, four on the digits; with weights and mixed = 4 about two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mezzotint.compiler.core.option_checks import require_not_negative, require_positive
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.rounding.layer_inputs import chosen_latents
from mezzotint.compiler.training.block_data import LossWatcher
from mezzotint.compiler.training.training_pass import TrainingPass
from mezzotint.compiler.training.units import UnitToTrain, find_units, quantizers_of_units
from mezzotint.runtime.bundle.training import TrainedUnit


@dataclass(frozen=True)
class LearnScales(TrainingPass):
    """Scales and zero points by training, through layers, blocks or the whole network.

    - `what`: quantizers of `activations`, of `weights`, or `both` together.
    - `through`: the unit whose outputs are compared: `layer`, `block`, or the whole `network`.
    - `behind`: a unit reads what the `trained` units before it compute, or what the graph computed at the `start` of
      the pass. Then units do not know each other, and workers train them at once.
    - `iterations`, `learning_rate`, `batch`: steps of Adam for a unit, the share by which a step moves the ends of a
      grid at first (it falls to 0), and samples in a step.
    - `weight_steps`: how far an iteration moves the weights of these scales at first, in steps of their grids; it falls
      to 0. 0 leaves weights alone.
    - `mixed`: calls of the sampler that a step takes its samples from, at most `batch`.
    - `zero_points`: learn both ends of the grids of activations, not the scales alone.
    - `form`: a table's `rows` have offsets of their own, or a small `network` of the timestep gives those of all rows.
    - `inner`: weight of the errors of the layers inside a unit beside that of its outputs.
    - `precision`: of the forward passes of the fit, `float32` or `bfloat16` (torch's autocast; quantizers compute in
      float32). Errors and images are measured in float32.
    - `calls`, `samples`: as above.
    - `units`: patterns of units' names (as in a shell: `*`, `?`); empty means all. Others keep their scales.
    - `held_out`: images of other noise that judge all units together: none of them is kept where images are worse. 0
      keeps them unjudged, as papers do.
    """

    what: Literal["activations", "weights", "both"] = "activations"
    through: Literal["layer", "block", "network"] = "block"
    behind: Literal["trained", "start"] = "trained"
    iterations: int = 300
    learning_rate: float = 1e-2
    batch: int = 8
    weight_steps: float = 0.0
    mixed: int = 1
    zero_points: bool = True
    form: Literal["rows", "network"] = "rows"
    inner: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    calls: int = 20
    samples: int = 16
    units: tuple[str, ...] = ()
    held_out: int = 16

    def __post_init__(self) -> None:
        require_positive(self, "iterations", "learning_rate", "batch", "mixed", "calls", "samples")
        require_not_negative(self, "weight_steps", "inner", "held_out")
        if self.weight_steps and self.what == "activations":
            raise RecipeError(
                "learn_scales.weight_steps moves weights, and learn_scales.what leaves their scales alone",
                where=self.name,
                hint="learn the scales of weights, or of both",
            )
        if self.form == "network" and self.what == "weights":
            raise RecipeError(
                "learn_scales.form is network, and weights have no tables over the timestep",
                where=self.name,
                hint="learn the scales of activations, or of both",
            )
        if self.units and self.through == "network":
            raise RecipeError(
                "learn_scales.units chooses layers or blocks, and learn_scales.through is network",
                where=self.name,
                hint="leave out one of the two",
            )

    def run(self, program: Program, context: Context) -> Program:
        plan = self.plan_of(program)
        from mezzotint.compiler.training.fit_scales import ScaleTrainer
        from mezzotint.compiler.training.unit_batches import Annealing
        from mezzotint.compiler.training.unit_cache import UnitCache
        from mezzotint.compiler.training.units_in_turn import UnitsInTurn

        if self.form == "network" and not plan.groups:
            raise RecipeError(
                "learn_scales.form is network, and the plan has no tables over the timestep",
                where=self.name,
                hint="put group_steps and step_scales in front of insert_qdq",
            )
        chosen, left = self._chosen(program)
        few = replace(context, samples=min(self.samples, context.samples))
        latents = chosen_latents(program, few, self.calls)
        decisive = {name: value for name, value in self.options().items() if name not in ("units", "held_out")}
        numbers = (self.iterations, self.learning_rate, 0.0, self.batch)
        trainer = ScaleTrainer(
            latents,
            Annealing(*numbers, inner=self.inner, precision=self.precision),
            self.zero_points and program.free_zero_points,
            self.form == "network",
            self.weight_steps,
            min(self.mixed, self.batch),
            self.name,
        )
        cache = UnitCache(program, context, {"pass": self.name, **decisive}, apart=self.behind == "start")

        def watch(unit: UnitToTrain) -> LossWatcher:
            return self.watcher(context.progress, unit.name, len(latents) + self.iterations)

        learned, fits = UnitsInTurn(context, trainer, chosen, cache, watch).trained(program, self.behind)
        after = replace(learned, training=(*learned.training, *fits))
        return self.judged(program, after, context, self.held_out, _note(fits, left))

    def _chosen(self, program: Program) -> tuple[list[UnitToTrain], int]:
        """Return the units to train, each with its quantizers, and the number of quantizers without a unit.

        Raise RecipeError for a pattern that matches no unit.
        """
        units = find_units(program, self.through)
        weights, activations = self.what != "activations", self.what != "weights"
        owned, left = quantizers_of_units(program.graph, units, weights=weights, activations=activations)
        trained = [unit for unit in units if unit.name in owned]
        chosen = self.matching(trained, self.units, "quantizers to train")
        return [UnitToTrain(unit.name, unit.computed, quantizers=tuple(owned[unit.name])) for unit in chosen], left


def _note(fits: Sequence[TrainedUnit], left: int) -> str:
    shares = [min(fit.hard / fit.start, 1.0) for fit in fits if fit.start > 0]
    better = sum(fit.hard < fit.start for fit in fits)
    note = f"{better} of {len(fits)} units better; error {np.mean(shares) if shares else 1:.0%} of the start's, mean"
    return (note if fits else "nothing to train") + (
        f"; {left} quantizers belong to no single unit and stay" if left else ""
    )
