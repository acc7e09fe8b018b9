"""distill: train the quantized network against the float network, through all of its layers.

Weights move in steps of their grids with straight-through gradients, all of their elements or as low-rank adapters
that are merged when the weights are written (compiler/training/moving_weights.py); biases, their rows for timesteps,
and factors of norms move too, and so do scales of activations (learned_scales.py). What is written are integers, scales
and biases: nothing is left at run time.

Data are the float network's own trajectories from noise, so no image is needed. The loss of a stretch of the trajectory
is relative to its error at the start, and with `unroll` the errors of successive calls add up in it; `blocks` adds the
errors of the blocks' outputs and `relations` those of the cosines between positions (compiler/training/fit_network.py).
Images of held-out noise judge at `checks` points, and the best state is kept; at the end the written graph is judged
beside the one before, and thrown away if its images are no better.

EfficientDM (arXiv 2310.03270): adapters, steps of the grid as the unit, scales for each call, the output of each call.
DilateQuant (arXiv 2409.14307) trains weights and scales against the outputs of blocks, QuEST (arXiv 2402.03666) linear
layers and scales, MPQ-DM (arXiv 2412.11549) relations too.

Measured on mnist-onnx with GPTQ's 4-bit weights and tables (48 images of other noise, 20 DDIM steps; epsilon, PSNR
median / 10th percentile): 31.2 dB, 33.5 / 27.2; three calls in a row, 300 iterations: 33.5 dB, 34.9 / 27.2; one call,
1000 iterations: 33.9 dB, 34.9 / 26.2. Few images judge badly: 16 of them threw away what 48 keep.

The fit stops after `minutes`; the note then has the number of iterations that gives the same result again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.trial import judged
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.layer_inputs import Inputs
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.runtime.sampling.deployment import Deployment

if TYPE_CHECKING:
    from mezzotint.compiler.training.fit_network import NetworkFit


@dataclass(frozen=True)
class Distill(Pass):
    """The training of the whole network, and the images that judge it.

    - `weights`: `all` elements of quantized weights move, or low-rank `adapters` of `rank`, or `none`.
    - `kinds`: the layers whose weights move, of `conv` and `linear`.
    - `floats`: biases, tables of biases, and factors and offsets of norms move.
    - `scales`: the scales that are learned: of `activations`, or `none`.
    - `iterations`, `batch`: steps of Adam, and samples in a step.
    - `weight_steps`, `shares`: how far a step moves quantized weights at first, in steps of their grids, and the rest,
      in shares of their size. Both fall to 0.
    - `unroll`: calls of the sampler in a row whose errors add up in the loss, at most all of them.
    - `blocks`, `relations`: weights of the errors inside of the network beside that of its output, which is 1.
    - `samples`, `held_out`: images whose trajectories are trained on, and others that judge.
    - `checks`: how often images judge, evenly over the iterations.
    - `minutes`: the longest that the fit takes; null means as long as it takes.
    """

    weights: Literal["all", "adapters", "none"] = "all"
    kinds: tuple[Literal["conv", "linear"], ...] = ("conv", "linear")
    floats: bool = True
    scales: Literal["activations", "none"] = "none"
    rank: int = 32
    iterations: int = 300
    weight_steps: float = 3e-3
    shares: float = 1e-3
    batch: int = 8
    unroll: int = 3
    blocks: float = 0.0
    relations: float = 0.0
    samples: int = 64
    held_out: int = 32
    checks: int = 3
    minutes: float | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        numbers = ("rank", "iterations", "weight_steps", "shares", "batch", "unroll", "samples", "held_out", "checks")
        for name in numbers:
            if not 0 < getattr(self, name) < np.inf:
                raise RecipeError(
                    f"distill.{name} is {getattr(self, name)}", where=self.name, hint="choose more than 0"
                )
        for name in ("blocks", "relations"):
            if not 0 <= getattr(self, name) < np.inf:
                raise RecipeError(f"distill.{name} is {getattr(self, name)}", where=self.name, hint="choose 0 or more")
        if self.minutes is not None and not 0 < self.minutes < np.inf:
            raise RecipeError(f"distill.minutes is {self.minutes}", where=self.name, hint="choose more than 0, or null")
        if self.weights == "none" and not self.floats and self.scales == "none":
            raise RecipeError("nothing moves", where=self.name, hint="let weights, floats or scales move")

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        if find_spec("torch") is None:
            raise RecipeError(
                "distill trains with torch, which is not installed",
                where=self.name,
                hint="install the extra: pip install 'mezzotint[torch]', or choose a recipe that does not train",
            )

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None or program.plan is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        from mezzotint.compiler.training.distillation import Moves, distill_network

        chosen = self._chosen(program)
        before = replace(program, model=program.model.clone())
        moves = Moves(self.weights, tuple(chosen), self.floats, self.scales == "activations", self.rank)
        calls = len(program.deployment.calls)
        # Both trajectories, the errors at the start, and the images of each check; an iteration counts as one call.
        judging = -(-self.held_out // context.batch) * calls
        whole = (-(-self.samples // context.batch) * calls) + calls + judging * (self.checks + 2) + self.iterations
        done = itertools.count(1)

        def step(loss: float | None) -> None:
            label = self.name if loss is None else f"{self.name}: loss {loss:.2f}"
            context.progress(label, min(next(done), whole), whole)

        after, result = distill_network(
            program, context, moves, self._schedule(calls), self.samples, self.held_out, self.name, step
        )
        note = (
            f"{len(chosen)} of {len(find_weights(before.graph))} weights move; images {result.image_db[0]:.2f} -> "
            f"{result.image_db[result.kept]:.2f} dB at check {result.kept} of {len(result.image_db) - 1}"
        )
        if result.timed_out:
            note += f"; stopped after {self.minutes:g} minutes, at distill.iterations={result.iterations}"
        if result.kept == 0:
            return replace(before, training=after.training).noted(f"{note}; nothing is written")
        kept = judged(before, after, context, self.held_out, note, self.name)
        return replace(kept, training=after.training)

    def _schedule(self, calls: int) -> NetworkFit:
        from mezzotint.compiler.training.fit_network import NetworkFit

        return NetworkFit(
            self.iterations,
            self.weight_steps,
            self.shares,
            self.batch,
            min(self.unroll, calls),
            self.blocks,
            self.relations,
            self.checks,
            self.minutes,
        )

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
