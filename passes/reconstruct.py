"""reconstruct: learn which way each weight rounds, against the outputs of its layer or block in the float graph.

AdaRound (arXiv 2004.10568) and BRECQ (arXiv 2102.05426), the reconstruction of PTQD, Q-Diffusion, TFMQ-DM and EDA-DM.
A weight rounds down or up by a variable in [0, 1] that is trained softly, with a regularizer that drives it to an end,
and is hard when it is written (compiler/training/fit_rounding.py has the loss). Units are trained in the graph's
order: their inputs come from the prefix that is trained already, their targets from the float graph. What is trained
is the graph behind the passes: split shortcuts, smoothed channels, tables of timesteps, quantizers of outputs.

Where the time embedding is quantized (w8a8-time), all that depends on the timestep alone is the first unit, against
what it gives to the rest at every deployed timestep, and its weights are in no other unit (TFMQ-DM, arXiv 2311.16503:
trained with a block's images, they would fit those). A branch that freeze_time made tables of has nothing to train.

The fit starts at the rounding that the graph has: behind round_weights at that of GPTQ. A unit whose hard rounding is
no better than its start keeps the start. The manifest has the errors of each unit before and behind hard rounding, and
the curve of its loss.

Statistics: latents of the float trajectory at `calls` network calls spread evenly over it, of the first `samples`
calibration images. One step of the fit takes `batch` samples of one call. A unit's inputs and targets lie in files of
the working folder, so memory holds one unit and one batch.

With a cache (`--cache`), each trained unit is kept there, and a training that was stopped goes on with the unit that it
was at: the same command takes the others from the cache, and the bundle has the same bytes.

Measured on mnist-onnx with static weights of 4 bits (DDIM, 20 steps; epsilon and PSNR of 32 images, median and 10th
percentile, in dB; the rounding alone):

    to nearest                                       21.1    30.1 / 28.9
    by blocks                                        24.7    35.7 / 34.0
    with QDrop, drop = 0.5                           23.9    35.4 / 33.8
    with QDrop and inner = 1 (eda-dm's calls)        24.4    34.3 / 33.2
    with split shortcuts                             24.7    36.3 / 35.1
    with a row of scales for each call (tfmq)        25.0    36.0 / 34.7
    GPTQ                                             26.9    38.5 / 37.3
    by blocks from GPTQ's rounding (3 of 6 better)   26.8    38.1 / 36.5

`brecq` with `behind=start` (weights of 8 bits, and scales of activations; 32 images): 27.9, 32.2 / 24.0, and behind the
trained units 28.1, 28.8 / 22.3, where workers cannot share the units.

So activations of 8 bits need no QDrop, and no recipe that trains reaches GPTQ: a unit's mean square does not say what
images see. On the digits blocks and GPTQ have the same epsilon (27.6 and 27.5 dB), and images 33.8 and 38.1 dB.

Larger units, with weights of 4 bits and 200 steps, as on the leaderboard (mnist-onnx, epsilon and images as above;
scales of activations are trained behind the weights, in cbq with them):

    brecq                                            22.5    18.9 / 16.7
    mrecg                                            20.9    21.8 / 16.7
    brecq, window = 2                                19.6    12.3 / 10.4
    cbq (learning_rate 0.03, regularization 1)       21.5    23.6 / 17.5
    cbq, regularization = 10                         19.7    14.2 / 11.2
    cbq, brecq's rates (0.15 and 100)                19.5    15.5 / 12.1
    cbq, brecq's rates, low_rank = 0                 20.3    26.2 / 20.6
    cbq, 0.03 and 10, low_rank = 0                   22.3    21.1 / 17.3
    brecq, activations of 4 bits                     13.3    13.0 / 11.1
    q-vlm, activations of 4 bits                     12.8    12.0 / 10.3

So none of them has a better epsilon than single blocks here: two blocks at once need smaller steps, and a product of
low rank a weak regularization, or weights end on the wrong side. Images of one calibration differ by 3 dB by chance.

The annealing matters: with learning_rate 0.03 and regularization 10 a unit keeps 58 % of its error, although the soft
weights keep 26 %, since many are still between two integers in the end; with 0.15 and 100 it keeps 40 % (soft 34 %),
and images gain 0.9 dB. From 0.5 on the learning rate is too large (one block keeps 89 %). The figures of the digits are
with the first of these. Blocks take 4.5 minutes on the digits (19 units) and 40 seconds on mnist-onnx (6).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from mezzotint.compiler.core.option_checks import require_not_negative, require_positive
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.rounding.layer_inputs import chosen_latents
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.training.block_data import LossWatcher
from mezzotint.compiler.training.joined_units import joined_units, ties_by_capacity, windows_of
from mezzotint.compiler.training.training_pass import TrainingPass
from mezzotint.compiler.training.unit_entropies import ties_by_entropy
from mezzotint.compiler.training.units import GraphUnit, UnitToTrain, find_units, quantizers_of_units, time_unit
from mezzotint.runtime.bundle.training import TrainedUnit


@dataclass(frozen=True)
class Reconstruct(TrainingPass):
    """Weights rounded by training, layer by layer or block by block.

    - `unit`: `layer` (AdaRound) or `block` (BRECQ).
    - `joined`: how many pairs of neighbouring units are trained as one, with what lies between them
      (compiler/training/joined_units.py).
    - `joined_by`: they are those whose weights differ most in bits (`capacity`: MRECG), or those of whose activations
      the first unit's have the highest `entropy` (Q-VLM).
    - `joined_most`: a joined unit is of at most so many; 0 has no bound.
    - `window`: how many neighbouring units are trained together, in windows that each begin one unit further, from the
      rounding that the window before left (CBQ).
    - `behind`: a unit reads what the `trained` units before it compute, or what the graph computed at the `start` of
      the pass. Then units do not know each other, and workers train them at once.
    - `iterations`, `learning_rate`, `batch`: steps of Adam for a unit, their learning rate, and samples in a step.
    - `regularization`: weight of the term that drives weights to the grid, beside a loss that is 1 at the start.
    - `calls`, `samples`: as above.
    - `drop`: the probability with which an element of an activation is not quantized in a step of the fit (QDrop).
    - `scale_shares`: how far an iteration moves the ends of the grids of a unit's activations at first, in shares of
      their size; it falls to 0. 0 leaves them alone: learn_scales learns them behind the weights.
    - `low_rank`: the rank of the product that moves the variables of a weight's rounding (CBQ); 0 moves each alone.
    - `curvature`: `fisher` weights errors of the outputs by their Fisher matrix, a diagonal and a part of rank `rank`
      (FIMA-Q; compiler/gradients/block_fisher.py); `none` counts all elements equally.
    - `inner`: weight of the errors of the layers inside a block beside that of its outputs (EDA-DM).
    - `precision`: of the forward passes of the fit, `float32` or `bfloat16` (torch's autocast; quantizers compute in
      float32). Errors and images are measured in float32.
    - `units`: patterns of units' names (as in a shell: `*`, `?`); empty means all. Others keep their rounding.
    - `held_out`: images of other noise that judge all units together: none of them is kept where images are worse. 0
      keeps them unjudged, as papers do.
    """

    unit: Literal["layer", "block"] = "block"
    joined: int = 0
    joined_by: Literal["capacity", "entropy"] = "capacity"
    joined_most: int = 0
    window: int = 1
    behind: Literal["trained", "start"] = "trained"
    iterations: int = 300
    learning_rate: float = 0.15
    regularization: float = 100.0
    batch: int = 8
    calls: int = 10
    samples: int = 16
    drop: float = 0.0
    scale_shares: float = 0.0
    low_rank: int = 0
    inner: float = 0.0
    curvature: Literal["none", "fisher"] = "none"
    rank: int = 4
    precision: Literal["float32", "bfloat16"] = "float32"
    units: tuple[str, ...] = ()
    held_out: int = 16

    gives: ClassVar[frozenset[str]] = frozenset({"rounded"})

    def __post_init__(self) -> None:
        require_positive(
            self, "iterations", "learning_rate", "regularization", "batch", "calls", "samples", "rank", "window"
        )
        require_not_negative(self, "inner", "held_out", "scale_shares", "joined", "joined_most", "low_rank")
        if self.window > 1 and self.behind == "start":
            raise RecipeError(
                f"windows of {self.window} units start at the rounding that the one before left, and "
                "reconstruct.behind is start",
                where=self.name,
                hint="set reconstruct.behind to trained",
            )
        if not 0 <= self.drop < 1:
            raise RecipeError(
                f"reconstruct.drop is {self.drop}", where=self.name, hint="choose a probability from 0 to less than 1"
            )

    def run(self, program: Program, context: Context) -> Program:
        self.plan_of(program)
        from mezzotint.compiler.training.rounding_of_unit import RoundingTrainer
        from mezzotint.compiler.training.unit_batches import Annealing
        from mezzotint.compiler.training.unit_cache import UnitCache
        from mezzotint.compiler.training.units_in_turn import UnitsInTurn

        chosen, left = self._chosen(program)
        few = replace(context, samples=min(self.samples, context.samples))
        latents = chosen_latents(program, few, self.calls)
        numbers = (self.iterations, self.learning_rate, self.regularization, self.batch)
        schedule = Annealing(
            *numbers, inner=self.inner, drop=self.drop, precision=self.precision, scale_shares=self.scale_shares
        )
        fisher = None
        if self.curvature == "fisher":
            from mezzotint.compiler.gradients.block_fisher import measure_fishers

            fisher = partial(measure_fishers, rank=self.rank)
        trainer = RoundingTrainer(latents, schedule, self.name, fisher, self.low_rank)
        decisive = {name: value for name, value in self.options().items() if name not in ("units", "held_out")}
        cache = UnitCache(program, context, {"pass": self.name, **decisive}, apart=self.behind == "start")

        def watch(unit: UnitToTrain) -> LossWatcher:
            batches = len(program.deployment.timesteps) if unit.timely else len(latents)
            return self.watcher(context.progress, unit.name, batches + self.iterations)

        rounded, fits = UnitsInTurn(context, trainer, chosen, cache, watch).trained(program, self.behind)
        after = replace(rounded, training=(*rounded.training, *fits))
        return self.judged(program, after, context, self.held_out, _note(fits, left))

    def _chosen(self, program: Program) -> tuple[list[UnitToTrain], int]:
        """Return the units to train, the time branch first, and the number of weights in no unit.

        A weight that several units read is in none. Raise RecipeError for a pattern that matches no unit.
        """
        branch = time_unit(program)
        units = find_units(program, self.unit)
        if self.joined or self.window > 1:
            units = [unit for unit in units if self._weights(program, unit, branch)]
        if self.joined:
            ties = (ties_by_entropy if self.joined_by == "entropy" else ties_by_capacity)(units, program)
            units = joined_units(units, ties, self.joined, program.graph, self.joined_most)
        units = windows_of(units, self.window, program.graph) if self.window > 1 else units
        units = [*([branch] if branch else []), *units]
        parts = [(unit, self._weights(program, unit, branch)) for unit in units]
        trained = [unit for unit, weights in parts if weights]
        left = len(find_weights(program.graph)) - len({weight for _, weights in parts for weight in weights})
        chosen = self.matching(trained, self.units, "quantized weights")
        quantizers: dict[str, list[str]] = {}
        if self.scale_shares:
            quantizers, _ = quantizers_of_units(program.graph, trained, weights=False, activations=True)
        weights_of = {unit.name: weights for unit, weights in parts}
        return [
            UnitToTrain(
                unit.name,
                unit.computed,
                weights=tuple(weights_of[unit.name]),
                quantizers=tuple(quantizers.get(unit.name, ())),
                timely=unit is branch,
            )
            for unit in chosen
        ], left

    def _weights(self, program: Program, unit: GraphUnit, branch: GraphUnit | None) -> list[str]:
        """Return the weights whose readers are all in a unit. Those of the time branch are in no other unit."""
        found = []
        for weight in find_weights(program.graph):
            readers = {name_of(node.outputs[0]) for node in weight.readers}
            timely = branch is not None and readers <= branch.computed
            if readers <= unit.computed and timely == (unit is branch):
                found.append(weight.name)
        return found


def _note(fits: Sequence[TrainedUnit], left: int) -> str:
    shares = [(fit.hard / fit.start, fit.soft / fit.start) for fit in fits if fit.start > 0]
    hard, soft = np.minimum(shares, 1).mean(axis=0) if shares else (1.0, 1.0)
    better = sum(fit.hard < fit.start for fit in fits)
    note = f"{better} of {len(fits)} units better; error {hard:.0%} of the start's (soft {soft:.0%}), mean"
    return (note if fits else "nothing to train") + (
        f"; {left} weights are read by several units and stay" if left else ""
    )
