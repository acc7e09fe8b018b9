"""distill: train the quantized network against the float network, through all of its layers.

Weights move in steps of their grids with straight-through gradients, all of their elements or as low-rank adapters
that are merged when the weights are written (compiler/training/moving_weights.py); biases, their rows for timesteps,
and factors of norms move too, and so do scales of activations (learned_scales.py). What is written are integers, scales
and biases: nothing is left at run time.

Data are the float network's own trajectories from noise, so no image is needed. The loss of a stretch of the trajectory
is relative to its error at the start, and with `unroll` the errors of successive calls add up in it; `blocks` adds the
errors of the blocks' outputs and `relations` those of the cosines between positions: compiler/training/network_loss.py.
Images of held-out noise judge at `checks` points, and the best state is kept; at the end the written graph is judged
beside the one before, and thrown away if its images are worse.

EfficientDM (arXiv 2310.03270): adapters, steps of the grid as the unit, scales for each call, the output of each call.
QuEST (arXiv 2402.03666) trains linear layers and scales against the outputs of blocks too, MPQ-DM (arXiv 2412.11549)
with relations, EfQAT (arXiv 2411.11038) the `critical` rows alone; the others save no time here, since torch computes
their gradients too. One block behind the other, as DilateQuant (arXiv 2409.14307) does it, is learn_scales.

Measured from GPTQ's 4-bit weights and tables, images of other noise, 20 DDIM steps (epsilon, PSNR median / 10th
percentile, dB):

    digits, 32 images                              31.7    40.1 / 32.0
    1958 iterations                                34.6    43.7 / 34.7
    2000 iterations, weight_steps 1e-3             34.4    44.8 / 37.6
    digits, activations of 4 bits too              14.2    21.0 / 16.9
    2000 iterations, all scales too (64 images)    21.2    29.4 / 20.6
    digits, 6 bits for both                        23.9    34.0 / 25.5
    2000 iterations, weight_steps 1e-3             28.5    40.2 / 27.8
    mnist-onnx, 64 images                          31.3    33.3 / 26.8
    1500 iterations, float_shares 1e-4             34.7    35.0 / 31.1
    2000 iterations, weight_steps 1e-3             34.9    37.4 / 30.6
    4000 iterations, weight_steps 1e-3             34.9    34.4 / 27.1
    three calls in a row, 300 iterations           33.5    34.9 / 27.2    (48 images)

Levels that move with the weights gain little (mnist-onnx, 32 images; epsilon, PSNR median / 10th percentile, dB):

    ganq, 2 bits                                   18.1    14.1 / 11.0
    pv-tuning, 400 iterations, level_steps 0       22.6    23.7 / 17.9
    level_steps 1e-3, 3e-3, 1e-2                   22.7, 22.6, 21.0    22.1, 22.4, 20.7 / 16.2, 17.6, 16.0
    dgms, 3 bits, 300 iterations, level_steps 0    23.8    26.4 / 20.1
    level_steps 3e-3                               23.9    26.1 / 20.6

Branches that fade gain nothing (64 images):

    mnist-onnx, qvgen at W4A4, branch_rank 32      17.3    22.0 / 17.2
    branch_rank 0                                  17.4    22.3 / 18.0
    digits, w4a4, branch_rank 32                   21.6    30.0 / 22.4
    branch_rank 0                                  21.6    30.7 / 21.7

From signs, on mnist-onnx too; products at run time gain nothing there:

    ganq, 1 bit                                     9.3    12.0 / 10.7
    onebit, 200 iterations                         12.8    14.5 / 12.4
    inputs scaled only where that is exact         12.8    14.6 / 12.8

Scales that follow mean magnitudes gain no images, and scales that are frozen lose some (W4A4, 200 iterations, 32
images; mnist-onnx, and digits):

    lsq                                            15.7    19.9 / 16.2    17.4    21.4 / 14.7
    both kinds of scales learned                   16.2    20.0 / 17.5    17.1    22.2 / 17.5
    ofq                                            16.3    19.0 / 15.9    16.4    22.1 / 17.7
    gaqat                                          13.9    18.5 / 14.8    16.1    18.8 / 14.7

This state of ofq is one before its annealing, which gains a little where the last one is kept (mnist-onnx, one check):

    ofq                                            16.6    19.8 / 15.9
    boundary 0                                     16.5    19.3 / 15.3
    both kinds of scales learned, boundary 0       16.5    19.3 / 17.2

Nested widths are better than what 8 bits are rounded to, but for matryoshka's 4 bits. At 4 bits double-rounding gains
images and loses epsilon against a training of its own, at 2 bits matryoshka gains both (mnist-onnx, 4 and 2 bits, 100
iterations, 32 images):

    8 bits trained alone, rounded to fewer         19.8    16.6 / 12.8     6.6    10.0 /  8.7
    lsq, trained at the width                      24.5    22.6 / 17.3    12.7    10.4 /  9.7
    both kinds of scales, trained at the width     24.7    22.7 / 17.5    13.5    13.3 / 11.7
    double-rounding                                22.9    23.9 / 18.6     8.9    11.8 / 10.2
    double-rounding, nested=cut                    20.4    17.2 / 14.4    10.1    12.1 / 11.4
    matryoshka                                     16.9    12.4 / 10.8    15.8    13.7 / 12.1

On the digits, 40 iterations are too few to make the mean of three widths better than at the start, which is written (4
bits; matryoshka was not measured there):

    both kinds of scales, trained at the width     25.7    32.7 / 23.0
    double-rounding                                24.3    25.9 / 21.1

Few images judge badly: 16 of them threw away what 48 keep. Long fits want small steps: docs/explanation/training.md.

With `minutes`, the first iterations are timed, and the fit has as many as fit into that time; the note has the number.
`distill.iterations` with this number, and without `minutes`, gives the same result again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from mezzotint.compiler.core.option_checks import require_not_negative, require_positive
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.layer_inputs import Inputs
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.training.training_pass import TrainingPass
from mezzotint.runtime.sampling.deployment import Deployment


@dataclass(frozen=True)
class Distill(TrainingPass):
    """The training of the whole network, and the images that judge it.

    - `weights`: `all` elements of quantized weights move, or low-rank `adapters` of `rank`, or `none`.
    - `critical`: the share of the output channels of each of them that move, those of the largest mean magnitude.
    - `kinds`: the layers whose weights move, of `conv` and `linear`.
    - `floats`: biases, tables of biases, and factors and offsets of norms move.
    - `scales`: the scales that are learned: of `activations`, of `both` activations and the weights that move, or
      `none`. With `statistics` those of activations are, and those of the weights that move follow the mean magnitudes
      of their rows (OFQ; compiler/training/steady_weights.py).
    - `iterations`, `batch`: steps of Adam, and samples in a step.
    - `weight_steps`, `float_shares`, `scale_shares`: how far an iteration moves quantized weights at first, in steps of
      their grids, and float weights and the ends of grids, in shares of their size. All fall to 0.
    - `level_steps`: the same of the levels of weights that move, in their mean distances; 0 leaves them where
      choose_levels put them.
    - `branch_rank`: the rank of a float branch that is added to each weight that moves, and fades in the first half of
      the fit (QVGen; compiler/training/fading_branches.py). 0 means none.
    - `boundary`: in the last quarter of the fit, quantized weights move only where they are so near to the threshold
      between two integers, in steps of their grids (OFQ's annealing). 0 means that all move.
    - `freeze_below`, `freeze_window`: learned scales whose gradients changed their sign in a smaller share of so many
      iterations are frozen for the next ones (GAQAT; compiler/training/steady_scales.py). 0 freezes none.
    - `nested`: weights move so that their integers serve all of `nested_widths`, of 2 to 8 bits. Those of fewer bits
      are those of the most bits, `cut` to the leading ones or `rounded` again (compiler/training/nested_widths.py). The
      file has the width of the plan. `nested_shares` are those of the widths in the loss and in the images that
      judge; empty means equal ones.
    - `unroll`: calls of the sampler in a row whose errors add up in the loss, at most all of them.
    - `blocks`, `relations`: weights of the errors inside of the network beside that of its output, which is 1.
    - `samples`, `held_out`: images whose trajectories are trained on, and others that judge.
    - `checks`: how often images judge, evenly over the iterations.
    - `minutes`: about the longest that the fit takes; null means as long as it takes.
    - `precision`: of the forward passes of the fit, `float32` or `bfloat16` (torch's autocast; quantizers compute in
      float32). Images that judge are those of float32.
    """

    weights: Literal["all", "adapters", "none"] = "all"
    kinds: tuple[Literal["conv", "linear"], ...] = ("conv", "linear")
    floats: bool = True
    scales: Literal["activations", "both", "statistics", "none"] = "none"
    rank: int = 32
    critical: float = 1.0
    iterations: int = 1000
    weight_steps: float = 3e-3
    float_shares: float = 3e-4
    scale_shares: float = 1e-2
    level_steps: float = 0.0
    branch_rank: int = 0
    boundary: float = 0.0
    freeze_below: float = 0.0
    freeze_window: int = 20
    nested: Literal["none", "cut", "rounded"] = "none"
    nested_widths: tuple[int, ...] = (8, 4, 2)
    nested_shares: tuple[float, ...] = ()
    batch: int = 8
    unroll: int = 1
    blocks: float = 0.0
    relations: float = 0.0
    samples: int = 128
    held_out: int = 32
    checks: int = 3
    minutes: float | None = None
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        require_positive(
            self, "rank", "iterations", "weight_steps", "float_shares", "scale_shares", "batch", "unroll", "samples"
        )
        require_positive(self, "held_out", "checks", *(() if self.minutes is None else ("minutes",)))
        require_not_negative(self, "blocks", "relations", "level_steps", "branch_rank", "boundary", "freeze_below")
        if self.level_steps and self.weights == "none":
            hint = "let weights move too, or set distill.level_steps to 0"
            raise RecipeError("levels move with their weights, which stay", where=self.name, hint=hint)
        if self.branch_rank and self.weights == "none":
            hint = "let weights move too, or set distill.branch_rank to 0"
            raise RecipeError("branches are added to weights that move, and all stay", where=self.name, hint=hint)
        if self.scales == "statistics" and self.weights == "none":
            hint = "let weights move too, or choose distill.scales=activations"
            raise RecipeError("scales follow weights that move, and all stay", where=self.name, hint=hint)
        if self.boundary and self.weights != "all":
            hint = "choose distill.weights=all, or set distill.boundary to 0"
            raise RecipeError("weights stay one by one, which adapters and none cannot", where=self.name, hint=hint)
        if self.boundary and self.level_steps:
            hint = "set distill.level_steps or distill.boundary to 0"
            raise RecipeError("thresholds are those of levels that stay", where=self.name, hint=hint)
        if self.level_steps and self.critical < 1:
            hint = "set distill.critical to 1, or distill.level_steps to 0"
            raise RecipeError("levels are those of all rows, and some rows stay", where=self.name, hint=hint)
        if self.freeze_below > 1 or self.freeze_window < 2:
            wrong = "freeze_below" if self.freeze_below > 1 else "freeze_window"
            hint = "choose a share of at most 1, and a window of 2 iterations or more"
            raise RecipeError(f"{self.name}.{wrong} is {getattr(self, wrong)}", where=self.name, hint=hint)
        if self.freeze_below and self.scales == "none":
            hint = "choose distill.scales=both, or set distill.freeze_below to 0"
            raise RecipeError("no scale is learned that could be frozen", where=self.name, hint=hint)
        self._check_nested()
        if not 0 < self.critical <= 1:
            hint = "choose a share of the rows, above 0 and at most 1"
            raise RecipeError(f"{self.name}.critical is {self.critical}", where=self.name, hint=hint)
        if self.weights == "none" and not self.floats and self.scales == "none":
            raise RecipeError("nothing moves", where=self.name, hint="let weights, floats or scales move")

    def _check_nested(self) -> None:
        widths = self.nested_widths
        if not widths or len({*widths}) < len(widths) or not all(2 <= width <= 8 for width in widths):
            hint = "choose different widths of 2 to 8 bits, such as [8, 4, 2]"
            raise RecipeError(f"{self.name}.nested_widths is {[*widths]}", where=self.name, hint=hint)
        if not all(share > 0 for share in self.nested_shares):
            hint = f"give a number above 0 for each of {self.name}.nested_widths, or none"
            raise RecipeError(f"{self.name}.nested_shares is {[*self.nested_shares]}", where=self.name, hint=hint)
        if self.nested == "none":
            return
        if self.weights == "none":
            hint = f"let weights move too, or set {self.name}.nested to none"
            raise RecipeError("integers of nested widths are those of weights that move", where=self.name, hint=hint)
        others = ("level_steps", "boundary", "branch_rank", "blocks", "relations")
        if used := [name for name in others if getattr(self, name)]:
            hint = f"set {self.name}.{used[0]} to 0, or {self.name}.nested to none"
            raise RecipeError(f"{used[0]} is that of one width, and there are several", where=self.name, hint=hint)

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        super().check(passes, deployment)
        self._shares_of_widths()  # here, so that both options can be set one after the other

    def _shares_of_widths(self) -> dict[int, float]:
        """Return the share of each nested width; they sum to 1. Raise RecipeError where one has none."""
        widths, shares = self.nested_widths, self.nested_shares or (1.0,) * len(self.nested_widths)
        if len(shares) != len(widths):
            hint = f"give {len(widths)} numbers, or none"
            raise RecipeError(
                f"{self.name}.nested_widths has {len(widths)} widths, and nested_shares {len(shares)} shares",
                where=self.name,
                hint=hint,
            )
        return {width: share / sum(shares) for width, share in zip(widths, shares, strict=True)}

    def run(self, program: Program, context: Context) -> Program:
        plan = self.plan_of(program)
        if self.level_steps and all(quantizer.levels is None for quantizer in plan.quantizers.values()):
            hint = "choose_levels gives levels to weights of 1 to 4 bits: --set choose_scales.weight_bits=3; or set "
            raise RecipeError("no weight has levels to train", where=self.name, hint=f"{hint}distill.level_steps to 0")
        from mezzotint.compiler.training.distillation import Distillation, Moves, network_calls
        from mezzotint.compiler.training.network_loss import NetworkFit

        own = {field.name: getattr(self, field.name) for field in fields(NetworkFit)}
        fit = NetworkFit(**{**own, "unroll": min(self.unroll, len(program.deployment.calls))})
        chosen = self._chosen(program)
        moving = {f.name: getattr(self, f.name) for f in fields(Moves) if f.name not in ("quantized", "nested_shares")}
        by_width = self._shares_of_widths()
        moves = Moves(quantized=tuple(chosen), **moving, nested_shares=by_width)
        before = replace(program, model=program.model.clone())
        nested = self.nested != "none"
        total = network_calls(program, context, fit, len(by_width) if nested else 1) + self.iterations
        step = self.watcher(context.progress, "the network", total)
        after, result = Distillation(context, moves, fit, self.name, self.options()).train(program, step)
        note = (
            f"{len(chosen)} of {len(find_weights(before.graph))} weights move; images {result.image_db[0]:.2f} -> "
            f"{result.image_db[result.kept]:.2f} dB at check {result.kept} of {self.checks}"
        )
        if result.iterations < self.iterations:
            note += f"; {result.iterations} of {self.iterations} iterations fit into {self.minutes:g} minutes"
        if nested:
            widest = f"integers are those of {max(self.nested_widths)} bits, {self.nested}"
            return after.noted(f"{note}, the mean of {len(by_width)} widths by their shares; {widest}")
        if result.kept == 0:
            return replace(before, training=after.training).noted(f"{note}; nothing is written")
        return self.judged(before, after, context, self.held_out, note)

    def _chosen(self, program: Program) -> list[Inputs]:
        """Return the quantized weights that move."""
        if self.weights == "none":
            return []
        floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
        kinds = {"Conv": "conv", "Gemm": "linear", "MatMul": "linear"}
        return [
            Inputs.of(weight, floats, self.name)
            for weight in find_weights(program.graph)
            if kinds[weight.readers[0].op_type] in self.kinds
        ]
