"""Which layers cost a bundle its faith, at which steps, why, and what to do about it.

The float model is walked along one trajectory. At each of its network calls every quantized layer is measured twice:

    local     the layer's output, computed by the bundle's integers from the float input, beside the float output
    cost      the error of epsilon when this layer alone is quantized, E_l = sum |eps_l - eps|^2

Layers are ranked by their part of all costs, sum_l E_l: errors of single layers add up where they are independent. What
they make together is measured, too: `together` has all of them quantized at once, `bundle` is the shipped model.

Both come from one graph (compiler/audit/side_by_side.py), in which copies of the bundle's own integer groups stand
beside the float layers; sums of squares leave it, activations do not. The passes that only rewrite the float graph are
run again on the reference, so that layers have the names that the bundle knows.

The suggestion follows from where a layer's own error comes from. Relative to its signal, the error of a layer is about
that of its input's rounding, plus that of its output's rounding, plus a rest: the weights, or
attention's second input. The largest decides:

    range     input or output: the grid is more than 2 times as wide as what it meets, or less than half of it;
              weights: the rest is above -10 dB, which no rounding makes
    table     the scale is constant, and the widest call is more than 2 times the narrowest
    split     the input is a Concat one of whose parts is more than 4 times as wide as another
    bits      the weights have fewer than 8 bits
    rounding  the weights have 8 bits, and were rounded to the nearest
    island    none of these: keep the layer in float
    -         the layer makes less than 1 % of the costs

Measured on the digits (54 to 57 quantized layers, 2 calls, one picture): the costs add up to 0.93 to 1.02 of the error
of all layers together, which is within 0.1 dB of the bundle's for w8a8, w8a8-steps, w8a8-best and 4-bit weights; each
call that is measured takes 3 to 5 s on one thread.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.audit.side_by_side import Beside, put_beside
from mezzotint.compiler.core.execute import Executor, feeds
from mezzotint.compiler.core.pipeline import Context, GraphPass, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.passes.recipes.files import recipe_from_json
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import StepSQNR, json_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Conditions, predictor
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.signature import Images, Timestep

from ..bench.pairs import unseen_seed
from .rules import FULL_BITS, Facts, Suggestion, suggest


@dataclass(frozen=True)
class LayerCost:
    """One quantized layer. `cost` is of epsilon, `local` in decibels by call; `share` of all layers' costs."""

    name: str
    kernel: str
    cost: StepSQNR
    share: float
    local: Mapping[int, float]
    suggestion: Suggestion

    def to_json(self) -> dict[str, Any]:
        return {
            "layer": self.name,
            "kernel": self.kernel,
            "share": self.share,
            "cost": self.cost.to_json(),
            "local": {str(call): json_db(db) for call, db in self.local.items()},
            "suggestion": self.suggestion.to_json(),
        }


@dataclass(frozen=True)
class Diagnosis:
    """`layers` from the dearest to the cheapest; `together` and `bundle` are of epsilon, `calls` the measured ones.

    `unknown` says why a quantized layer could not be measured; `islands` are in float on purpose. `same_weights` says
    that the reference has the very weights that the bundle was compiled from.
    """

    layers: tuple[LayerCost, ...]
    together: StepSQNR
    bundle: StepSQNR
    calls: Mapping[int, Timestep]
    unknown: Mapping[str, str]
    islands: Mapping[str, str]
    same_weights: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "same_weights": self.same_weights,
            "calls": {str(call): t for call, t in self.calls.items()},
            "bundle": self.bundle.to_json(),
            "together": self.together.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "unknown": dict(self.unknown),
            "islands": dict(self.islands),
        }


def diagnose(
    bundle: Bundle,
    reference: str | Path,
    n: int = 1,
    *,
    calls: int | None = None,
    seed: int | None = None,
    conditions: Conditions | None = None,
    unconditional: Conditions | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Diagnosis:
    """Measure every quantized layer of a bundle on `n` pictures, at all network calls or at `calls` of them, evenly.

    `reference` is the float .onnx that the bundle was compiled from. It takes (quantized layers + 2) network calls of
    twice the work for each call that is measured. The noise is one that no pass has seen, unless a seed is given.
    Raises InputError for a bundle that cannot be taken apart: several precisions, scales around constant ones
    (w8a8-premul), weights that were moved by what was measured, or no quantized layer at all.
    """
    if n < 1 or (calls is not None and calls < 1):
        raise InputError(f"{n} pictures, {calls} calls", hint="ask for at least one of each")
    recipe = checked_recipe(bundle)
    count = len(bundle.deployment.calls)
    chosen = sorted({round(i) for i in np.linspace(0, count - 1, min(calls or count, count))})
    rows, other = _rows(conditions, n), _rows(unconditional, n)
    with tempfile.TemporaryDirectory() as work:
        context = Context(Path(work), seed=bundle.manifest["calibration"]["seed"], threads=threads, conditions=rows)
        program = replayed(bundle, Path(reference), recipe, context)
        found = put_beside(program, bundle.model_path)
        if not found.groups:
            raise InputError(
                "no layer of the bundle is quantized and has a float one of its name in the reference",
                where=str(bundle.path),
                hint="`mezzotint inspect` lists the layers and why each is in float; is this the right reference?",
            )
        with _Bench(found, program, context) as bench:
            probe = _Probe(bench, bundle, rows, other, chosen, progress)
            probe.follow(n, unseen_seed(bundle) if seed is None else seed, threads)
    same = program.source.get("weights_sha256") == bundle.manifest["source"].get("weights_sha256")
    return probe.diagnosis(found, recipe, same)


def checked_recipe(bundle: Bundle) -> Recipe:
    """The recipe of a bundle whose layers can be told from the float graph's. Raises InputError for others."""
    if bundle.precisions is not None:
        raise InputError(
            "the bundle mixes several precisions",
            where=str(bundle.path),
            hint="debug the bundles that it was mixed from, one by one",
        )
    try:
        recipe = recipe_from_json(bundle.manifest["recipe"], where=str(bundle.path))
    except RecipeError as error:
        raise InputError(
            f"the passes on the float graph have to be run again, and one is not known here: {error.what}",
            where=str(bundle.path),
            hint="debug it where it was compiled, with the version and the passes that made it",
        ) from error
    for step in recipe.passes:
        if step.options().get("lowering") == "premul":
            raise InputError(
                "scales around constant ones (lowering premul) cannot be told from the layers that they are for",
                where=str(bundle.path),
                hint="compile with insert_qdq.lowering=integer: the plan is the same, and debug that",
            )
        if isinstance(step, GraphPass) and "stats" in step.needs:
            raise InputError(
                f"{step.name} rewrote the float graph by what was measured: its layers have no like in the reference",
                where=str(bundle.path),
                hint=f"compile without {step.name}, and debug that",
            )
    return recipe


def replayed(bundle: Bundle, reference: Path, recipe: Recipe, context: Context) -> Program:
    """The float graph as it was when the quantizers came in."""
    signature = bundle.signature
    program = import_onnx(
        reference,
        context.folder,
        schedule=bundle.schedule,
        deployment=bundle.deployment,
        inputs={"sample": signature.sample, "timestep": signature.timestep},
        output=signature.output,
        prediction=signature.prediction,
        size=bundle.sample_shape[1:],
    )
    for step in recipe.passes:
        if isinstance(step, GraphPass):
            program = step.run(replace(program, model=program.model.clone()), context)
    return program


def _rows(given: Conditions | None, n: int) -> dict[str, npt.NDArray[Any]]:
    return {name: np.repeat(a, n, axis=0) if len(a) == 1 else np.asarray(a[:n]) for name, a in (given or {}).items()}


class _Bench:
    """The session. `switched` are the layers that are quantized in the next call; a context manager."""

    def __init__(self, found: Beside, program: Program, context: Context) -> None:
        self.groups, self._signature = found.groups, program.signature
        self.taps = {name: group.taps for name, group in found.groups.items()}
        taps = list(dict.fromkeys(tap for names in self.taps.values() for tap in names))
        # Fused, a tapped quantized graph might meet kernels that the bundle does not.
        self._executor = Executor(found.model, context.folder, taps=taps, threads=context.threads, level="basic")
        self.switched: Sequence[str] = ()
        self.told: dict[str, npt.NDArray[Any]] = {}

    def __call__(self, x: Images, t: Timestep, **conditions: npt.NDArray[Any]) -> Images:
        given = feeds(self._executor.inputs, self._signature, x, t, conditions)
        given |= {self.groups[name].switch: np.array(True) for name in self.switched}
        self.told = self._executor.run(given)
        return np.asarray(self.told[self._signature.output], np.float32)

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.close()


@dataclass
class _Probe:
    """Follows the float trajectory and measures at the chosen calls; only sums are kept."""

    bench: _Bench
    bundle: Bundle
    conditions: Conditions
    unconditional: Conditions
    chosen: Sequence[int]
    progress: Progress
    costs: dict[str, StepSQNR] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    together: StepSQNR = field(default_factory=StepSQNR)
    shipped: StepSQNR = field(default_factory=StepSQNR)
    calls: dict[int, Timestep] = field(default_factory=dict)

    def follow(self, n: int, seed: int, threads: int | None) -> None:
        names = list(self.bench.taps)
        self.costs = {name: StepSQNR() for name in names}
        self.facts = {name: Facts() for name in names}
        deployment = self.bundle.deployment
        predict = predictor(self.bench, deployment, self.conditions, self.unconditional)
        whole = predictor(self.bundle.denoiser(threads), deployment, self.conditions, self.unconditional)
        total, done = len(self.chosen) * (len(names) + 2), 0

        def ticked(measure: StepSQNR, info: StepInfo, output: Images) -> None:
            nonlocal done
            measure.add(info.index, info.output, output)
            done += 1
            self.progress("layers, one by one", done, total)

        def look(info: StepInfo) -> None:
            if info.index not in self.chosen:
                return
            self.calls[info.index] = info.timestep
            self._note(info.index)
            for name in names:
                ticked(self.costs[name], info, self._quantized(predict, info, [name]))
            ticked(self.together, info, self._quantized(predict, info, names))
            ticked(self.shipped, info, whole(info.x, info.timestep))

        x = samplers.initial_noise(seed, (n, *self.bundle.sample_shape))
        noise = samplers.seeded_noise(seed)
        samplers.sample(predict, x, self.bundle.schedule, deployment, noise=noise, callback=look)

    def _note(self, call: int) -> None:
        """What the float call that was just made told of every layer."""
        told = self.bench.told
        for name, group in self.bench.groups.items():
            facts = {fact: float(np.max(told[tap])) for fact, tap in group.facts.items()}
            parts = [float(told[high] - told[low]) for low, high in group.parts]
            self.facts[name].add(call, facts, parts)

    def _quantized(self, predict: Callable[[Images, Timestep], Images], info: StepInfo, names: Sequence[str]) -> Images:
        self.bench.switched = names
        try:
            return predict(info.x, info.timestep)
        finally:
            self.bench.switched = ()

    def diagnosis(self, found: Beside, recipe: Recipe, same_weights: bool) -> Diagnosis:
        manifest = self.bundle.manifest
        noise = {name: sum(cost.noise().values()) for name, cost in self.costs.items()}
        everything = sum(noise.values())
        bits = {q["site"]: int(q["format"].lstrip("uint")) for q in manifest["quantizers"]}
        kernels = manifest["kernels"]["layers"]
        layers = []
        for name in sorted(noise, key=lambda name: -noise[name]):
            facts, share = self.facts[name], noise[name] / everything if everything else 0.0
            weight = found.groups[name].weight
            width = bits.get(weight, FULL_BITS) if weight else None
            suggestion = suggest(name, facts, share, recipe, width)
            kernel = kernels.get(name, {}).get("kernel", "unknown")
            layers.append(LayerCost(name, kernel, self.costs[name], share, facts.local(), suggestion))
        islands = dict(manifest["islands"])
        return Diagnosis(tuple(layers), self.together, self.shipped, self.calls, found.unknown, islands, same_weights)
