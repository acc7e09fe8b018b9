"""allocate_steps: choose how many of the calibration samples count at each network call.

A static scale serves every call, and the statistics behind it weight each call by the number of its samples. Three
methods spend a budget of B = share * samples * calls:

- `uniform`: the same number at every call, B / T.
- `skewed`: as if timesteps were drawn from a normal distribution that leans to the clean end, and clamped (PTQ4DM,
  arXiv 2211.15736): t ~ N(mean * T, (deviation * T)^2), both as shares of the training timesteps. A call gets the
  expected number of draws. Nothing is drawn, so two compilations agree.
- `density`: EDA-DM's allocation (arXiv 2401.04585). With f_t a feature of the middle block on the first batch,

      D_t = #{u != t: MSE(f_t, f_u) <= r}       the number of calls like this one
      V_t = sum_u (1 - cos(f_t, f_u))           its difference from the others
      w_t = norm(D_t) + diversity * norm(V_t)   norm: maps the least to 0 and the most to 1

  and call t gets B w_t / sum(w). The paper sets r for each model (3.0, 0.3). Here r is `radius` times the mean squared
  distance of two calls, so that one value serves all models.

No call gets more samples than exist; the remainder goes to the other calls in proportion. The trajectories are the same
with every method: the allocation only decides which activations enter the statistics.

Errors: RecipeError for a guided deployment, whose calls have two rows for each sample, and for an unknown feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.calibration.calibrate import batch_spans, follow_trajectories
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import consumers, is_op, name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.sampling.condition_network import call_conditions
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep


@dataclass(frozen=True)
class AllocateSteps(Pass):
    """The allocation of calibration samples to network calls.

    - `method`: as above.
    - `share`: the budget as a share of all samples at all calls, above 0 and up to 1.
    - `mean`, `deviation`: of skewed, as shares of the training timesteps.
    - `radius`, `diversity`: of density.
    - `feature`: of density; the name of a value to use in place of the middle block's.
    """

    method: Literal["uniform", "skewed", "density"] = "uniform"
    share: float = 0.5
    mean: float = 0.4
    deviation: float = 0.4
    radius: float = 0.5
    diversity: float = 1.2
    feature: str = ""

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    before: ClassVar[frozenset[str]] = frozenset({"stats", "qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"allocation"})

    def __post_init__(self) -> None:
        self._check("share", 0 < self.share <= 1, "choose above 0, and 1 at most")
        self._check("mean", 0 <= self.mean <= 1, "0 is the clean end of the trajectory, 1 the noisy one")
        self._check("deviation", self.deviation > 0, "choose above 0, such as 0.4")
        self._check("radius", self.radius > 0, "choose above 0, such as 0.5")
        self._check("diversity", self.diversity >= 0, "choose 0 (density alone) or more")

    def _check(self, option: str, fine: bool, hint: str) -> None:
        if not (fine and math.isfinite(getattr(self, option))):
            raise RecipeError(f"{self.name}.{option} is {getattr(self, option)}", where=self.name, hint=hint)

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        if deployment.guided:
            raise RecipeError(
                "samples of a guided deployment cannot be counted one by one: a call has two rows for each",
                where=self.name,
                hint="leave out allocate_steps, or calibrate without guidance",
            )

    def run(self, program: Program, context: Context) -> Program:
        self.check((), program.deployment)
        timesteps = program.deployment.timesteps
        samples = sum(rows for _, rows in batch_spans(program, context))
        budget = max(1, round(self.share * samples * len(timesteps)))
        about = ""
        if self.method == "uniform":
            counts = even(len(timesteps), budget)
        elif self.method == "skewed":
            train = program.schedule.num_train_timesteps
            counts = apportion(normal_mass(timesteps, self.mean * train, self.deviation * train), budget, samples)
        else:
            name = self._feature(program, context)
            features = _features(program, context, name)
            counts = apportion(density_weights(features, self.radius, self.diversity), budget, samples)
            about = f"; the feature is {name}, {features[0, 0].size} numbers"
        silent = f", none at {counts.count(0)}" if 0 in counts else ""
        note = f"{budget} of {samples * len(timesteps)} samples count, {min(counts)} to {max(counts)} at a call{silent}"
        return replace(program, allocation=counts, note=note + about)

    def _feature(self, program: Program, context: Context) -> str:
        if not self.feature:
            return middle_feature(program, context)
        known = [name_of(out) for node in program.graph for out in node.outputs]
        if self.feature not in known:
            close = get_close_matches(self.feature, known, n=1, cutoff=0.0)
            raise RecipeError(
                f"the graph computes no value {self.feature!r}",
                where=f"{self.name}.feature",
                hint=f"did you mean {close[0]!r}?" if close else "the graph has no nodes",
            )
        return self.feature


def even(calls: int, budget: int) -> tuple[int, ...]:
    """Return `budget` cut into `calls` counts that differ by 1 at most, the larger ones spread evenly."""
    return tuple((k + 1) * budget // calls - k * budget // calls for k in range(calls))


def apportion(weights: Doubles, budget: int, most: int) -> tuple[int, ...]:
    """Return `budget` cut in proportion to weights `[calls]` (not negative), with no count above `most`.

    The rest of a full call goes to the others in proportion, evenly where all of those have the weight 0. Rounding is
    by largest remainders, the earlier call first. The counts add up to `budget`.
    """
    amounts, free, left = np.zeros(len(weights)), np.ones(len(weights), bool), float(budget)
    while free.any():
        shares = np.where(free, weights, 0.0)
        shares = np.where(free, 1.0, 0.0) if shares.sum() <= 0 else shares
        shares = shares * (left / shares.sum())
        full = free & (shares >= most)
        if not full.any():
            amounts[free] = shares[free]
            break
        amounts[full], left = most, left - most * int(full.sum())
        free &= ~full
    counts = np.floor(amounts + 1e-9).astype(np.int64)
    by_remainder = np.argsort(counts - amounts, kind="stable")
    counts[by_remainder[: budget - int(counts.sum())]] += 1
    return tuple(int(c) for c in counts)


def normal_mass(timesteps: tuple[Timestep, ...], mean: float, deviation: float) -> Doubles:
    """Return the probability that a normal draw is nearest to each timestep; draws beyond an end count for that end."""
    order = np.argsort(timesteps)
    rising = np.asarray(timesteps, np.float64)[order]
    borders = (rising[:-1] + rising[1:]) / 2
    below = [0.5 * (1 + math.erf((b - mean) / (deviation * math.sqrt(2)))) for b in borders]
    mass = np.empty(len(rising))
    mass[order] = np.diff([0.0, *below, 1.0])
    return mass


def density_weights(features: Doubles, radius: float, diversity: float) -> Doubles:
    """Return EDA-DM's weight of each call from features `[calls, batch, n]`; see the module's docstring."""
    calls = len(features)
    distance, turned = np.zeros((calls, calls)), np.zeros((calls, calls))
    length = np.maximum(np.sqrt(np.einsum("tbn,tbn->tb", features, features)), 1e-12)
    for t in range(calls):
        for u in range(t):
            distance[t, u] = distance[u, t] = np.mean((features[t] - features[u]) ** 2)
            cosine = np.einsum("bn,bn->b", features[t], features[u]) / (length[t] * length[u])
            turned[t, u] = turned[u, t] = np.sum(1 - cosine)
    pairs = max(calls * (calls - 1), 1)
    near = distance <= radius * distance.sum() / pairs
    return _norm(near.sum(axis=1) - 1.0) + diversity * _norm(turned.sum(axis=1))


def _norm(values: Doubles) -> Doubles:
    """Return the values scaled to 0 to 1; all 0 where they are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else np.zeros_like(values)


def middle_feature(program: Program, context: Context) -> str:
    """Return the name of the activation in the middle of a denoiser: an input of a layer at the smallest resolution.

    The resolution of `[B, C, H, W]` is H W, that of `[B, tokens, C]` the tokens, as one call shows them. Only inputs of
    convolutions and linear layers that depend on the sample count. At the turn of a U-Net the most shortcuts wait for
    their concatenation: among the inputs with the most, the one halfway is taken. Raises RecipeError if there is no
    such input.
    """
    inside = _reached(program.graph, program.signature.sample)
    readers = {
        name_of(layer.activations[0]): layer
        for layer in layers(program.graph)
        if layer.kind != "attention" and layer.activations[0] in inside
    }
    shapes = _shapes(program, context, list(readers))
    sizes = {
        name: int(np.prod(shapes[name][2:] if layer.kind == "conv" else shapes[name][1:-1]))
        for name, layer in readers.items()
        if len(shapes[name]) > 2
    }
    waiting = _waiting_shortcuts(program.graph, inside)
    depths = {n: waiting[readers[n].node] for n, size in sizes.items() if size == min(sizes.values())}
    deepest = [name for name, depth in depths.items() if depth == max(depths.values())]
    if not deepest:
        raise RecipeError(
            "no layer of this model reads a feature map",
            where="allocate_steps",
            hint="name a value: --set allocate_steps.feature=NAME, or choose the method uniform or skewed",
        )
    return deepest[len(deepest) // 2]


def _reached(graph: ir.Graph, sample: str) -> set[ir.Value]:
    """Return the values that nodes compute from the contents of the sample."""
    known = {v for v in graph.inputs if name_of(v) == sample}
    for node in graph:
        if not is_op(node, "Shape") and any(v in known for v in node.inputs):
            known.update(node.outputs)
    return known - set(graph.inputs)


def _waiting_shortcuts(graph: ir.Graph, inside: set[ir.Value]) -> dict[ir.Node, int]:
    """Return, for each node, how many of these values are computed before it and concatenated behind it."""
    position = {node: i for i, node in enumerate(graph)}
    change = np.zeros(len(position) + 1, np.int64)
    for value in inside:
        last = max((position[user] for user in consumers(value) if is_op(user, "Concat")), default=None)
        producer = value.producer()
        if last is not None and producer is not None:
            change[position[producer] + 1] += 1
            change[last] -= 1
    return dict(zip(position, np.cumsum(change).tolist(), strict=False))


def _one_batch(context: Context) -> Context:
    return replace(context, samples=min(context.samples, context.batch))


def _shapes(program: Program, context: Context, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of values at one call; a graph with open sizes does not have them."""
    rows = program.fixed_batch or 1
    with Executor(program.model, context.folder, taps=names, threads=context.threads) as executor:
        x = np.zeros((rows, *program.shape), np.float32)
        t = program.deployment.timesteps[0]
        conditions = call_conditions(context.condition_network, x, t, context.condition_rows(0, rows))
        outputs = executor.call(program.signature, x, t, conditions)
    return {name: outputs[name].shape for name in names}


def _features(program: Program, context: Context, name: str) -> Doubles:
    """Return a value at every call of the first batch's trajectory, `[calls, batch, n]`."""
    features: list[Doubles] = []
    with Executor(program.model, context.folder, taps=[name], threads=context.threads) as executor:

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            outputs = executor.call(program.signature, x, t, conditions)
            features.append(np.asarray(outputs[name], np.float64).reshape(len(x), -1))
            return np.asarray(outputs[program.signature.output], np.float32)

        follow_trajectories(program, _one_batch(context), denoiser, "allocate_steps")
    return np.stack(features)
