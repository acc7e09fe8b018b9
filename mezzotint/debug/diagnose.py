"""Which layers cost a bundle the most fidelity, at which steps, for which reason, and what would help.

The float model is sampled along one trajectory. At each network call every quantized layer is measured twice:

    local     the layer's output, computed by the bundle's integers from the float input, against the float output
    cost      the error of epsilon when this layer alone is quantized, E_l = sum |eps_l - eps|^2

Layers are ranked by their share of all costs, sum_l E_l: errors of single layers add up where they are independent.
Their joint error is measured, too: `together` has all of them quantized at once, `bundle` is the shipped model.

Both come from one graph (compiler/audit/side_by_side.py) that holds copies of the bundle's own integer groups next to
the float layers. Sums of squares leave it, activations do not. The passes that only rewrite the float graph are run
again on the reference, so that its layers have the names of the bundle's layers.

The suggestion follows from the source of a layer's own error. Relative to its signal, the error of a layer is about
that of its input's rounding, plus that of its output's rounding, plus a rest: the weights, or attention's second
input. The largest of the three decides:

    outliers  a channel of the input is more than 16 times as large as the median of its channels
    range     input or output: the grid is more than 2 times as wide as its values, or less than half as wide;
              weights: the rest is above -10 dB, more than any rounding
    table     the scale is constant, and the widest call is more than 2 times the narrowest
    split     the input is a Concat, and one part is more than 4 times as wide as another
    bits      the weights have fewer than 8 bits
    rounding  the weights have 8 bits, and were rounded to the nearest
    island    none of these: keep the layer in float
    -         the layer has less than 1 % of the costs

Measured on the digits (54 to 57 quantized layers, 2 calls, one image): the costs add up to 0.93 to 1.02 of the error
of all layers together, which is within 0.1 dB of the bundle's for w8a8, w8a8-steps, w8a8-best and 4-bit weights. Each
measured call takes 3 to 5 s on one thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.audit.side_by_side import SideBySide, put_side_by_side
from mezzotint.compiler.audit.suggestions import FULL_BITS, Suggestion, islands_option, suggest
from mezzotint.compiler.audit.switched import SwitchedNetwork
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.stages import scratch
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import StepSQNR, json_db
from mezzotint.runtime.engine import EngineUsage
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Conditions, checked_rows, predictor, rows_in_turn, with_labels
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Timestep

from ..bench.pairs import paired_run, unseen_seed
from ..bench.reference import ReferenceModel
from ..cluster.connection import check_cluster, cluster_or_none
from ..cluster.spread import ClusterSpread
from .call_costs import CallCosts, CallProbe, ProbedCall, costs_of_calls
from .replay import checked_recipe, replayed


@dataclass(frozen=True)
class LayerCost:
    """One quantized layer: `cost` of epsilon, `local` in decibels by call, `share` of all layers' costs."""

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
    """All layers from the largest cost to the smallest. `together` and `bundle` are SQNRs of epsilon at `calls`.

    `unknown` has the reason for each quantized layer that could not be measured; `islands` are in float on purpose.
    `same_weights` says whether the reference has the weights that the bundle was compiled from. `engine` ran the
    bundle; its layers are measured one by one on the CPU provider.
    """

    layers: tuple[LayerCost, ...]
    together: StepSQNR
    bundle: StepSQNR
    calls: Mapping[int, Timestep]
    unknown: Mapping[str, str]
    islands: Mapping[str, str]
    same_weights: bool
    recipe: Recipe
    engine: EngineUsage

    def option(self, top: int | None = None) -> str:
        """Return the options that keep in float those of the `top` layers whose remedy that is; empty for none."""
        layers = [layer.name for layer in self.layers[:top] if layer.suggestion.kind == "island"]
        return islands_option(self.recipe, layers) if layers else ""

    def to_json(self) -> dict[str, Any]:
        return {
            "same_weights": self.same_weights,
            "engine": self.engine.to_json(),
            "calls": {str(call): t for call, t in self.calls.items()},
            "bundle": self.bundle.to_json(),
            "together": self.together.to_json(),
            "layers": [layer.to_json() for layer in self.layers],
            "unknown": dict(self.unknown),
            "islands": dict(self.islands),
            "option": self.option(),
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
    cluster: str | None = None,
    progress: Progress = silent,
) -> Diagnosis:
    """Measure every quantized layer of a bundle on `n` images, at all network calls or at `calls` of them.

    The calls are the worst of the bundle, and others that are evenly spaced.
    `reference` is the float .onnx that the bundle was compiled from. Each measured call takes (quantized layers + 3)
    network calls of twice the work. Without a seed the noise is one that no pass has seen. Raises InputError for a
    bundle whose layers cannot be separated: several precisions, or no quantized layer that can be taken out of it.

    With `cluster` (cluster/connection.py) its workers measure a call each; what they find is the same.

    A float graph that was rewritten from statistics (smooth_scales) is calibrated again, with `conditions` as its rows.
    """
    if n < 1 or (calls is not None and calls < 1):
        raise InputError(f"{n} images, {calls} calls", hint="ask for at least one of each")
    if cluster is not None:
        check_cluster(cluster)
    recipe = checked_recipe(bundle)
    count = len(bundle.deployment.calls)
    computing = bundle.condition_network
    if cluster is not None and computing is not None:
        raise InputError(
            "a network that computes conditions cannot travel to the workers of a cluster",
            where="--cluster",
            hint="debug the bundle on one machine: leave --cluster out",
        )
    known = with_labels(bundle.signature, bundle.deployment, conditions, unconditional, computing=computing)
    rows, unconditional_rows = (rows_in_turn(checked_rows(one), 0, n) for one in known)
    float_model = ReferenceModel(bundle, reference, threads=threads)
    seed = unseen_seed(bundle) if seed is None else seed
    with scratch() as work:
        seen = bundle.manifest.calibration.seed
        context = Context(work, seed=seen, threads=threads, conditions=rows, condition_network=computing)
        given = (conditions, unconditional) if computing is None else known
        program = replayed(bundle, float_model.program(context.folder), recipe, context, *given)
        compared = put_side_by_side(program, bundle.model_path)
        if not compared.layers:
            raise InputError(
                "no layer of the bundle is quantized and has a float layer of the same name in the reference",
                where=str(bundle.path),
                hint="`mezzotint inspect` lists the layers and why each is in float; check the reference, too",
            )
        with SwitchedNetwork.of(compared, program.signature, context) as network:
            chosen: Sequence[int] = range(count)
            if calls is not None and calls < count:
                nets, options = (float_model.network, bundle.denoiser(threads)), (rows, unconditional_rows)
                chosen = _chosen(_worst_call(nets, bundle, n, seed, options), calls, count)
            probe = CallProbe(compared.layers, program.signature, bundle.deployment, rows, unconditional_rows)
            shipped, followed = _followed(network, bundle, (rows, unconditional_rows), chosen, n, seed, threads)
            found = CallCosts.of_layers(list(compared.layers))
            with cluster_or_none(cluster, threads) as workers:
                spread = None if workers is None else ClusterSpread(workers, progress)
                there = replace(context, spread=spread)
                for costs in costs_of_calls(probe, compared, network, followed, there, progress):
                    found.add(costs)
    timesteps = {call.index: call.timestep for call in followed}
    same_weights = float_model.has_weights_of(program)
    measured = _Measured(found, shipped, timesteps)
    return measured.diagnosis(bundle, compared, recipe, same_weights, bundle.usage(threads))


def _worst_call(
    nets: tuple[Denoiser, Denoiser], bundle: Bundle, n: int, seed: int, rows: tuple[Conditions, Conditions]
) -> int:
    """Return the call of the float trajectory at which the bundle has the lowest SQNR."""
    exact, mine = nets
    _, sqnr = paired_run(exact, mine, bundle, n, seed=seed, batch=n, conditions=rows[0], unconditional=rows[1])
    return sqnr.worst()[0]


def _chosen(worst: int, calls: int, count: int) -> list[int]:
    """Return `calls` calls of `count` in order: the worst, and others evenly spaced."""
    even = [round(i) for i in np.linspace(0, count - 1, calls)] if calls > 1 else []
    nearest = min(even, key=lambda call: abs(call - worst), default=worst)
    return sorted({worst, *even} - ({nearest} if nearest != worst else set()))


def _followed(
    network: SwitchedNetwork,
    bundle: Bundle,
    rows: tuple[Conditions, Conditions],
    chosen: Sequence[int],
    n: int,
    seed: int,
    threads: int | None,
) -> tuple[StepSQNR, list[ProbedCall]]:
    """Sample `n` images with the float network; return the bundle's error at the chosen calls, and those calls."""
    deployment, computing = bundle.deployment, bundle.condition_network
    predict = predictor(network, deployment, *rows, computing)
    whole = predictor(bundle.denoiser(threads), deployment, *rows, computing)
    shipped, followed = StepSQNR(), []

    def note_call(info: StepInfo) -> None:
        if info.index in chosen:
            followed.append(ProbedCall(info.index, info.timestep, info.x))
            shipped.add(info.index, info.output, whole(info.x, info.timestep))

    x, noise = samplers.initial_noise(seed, (n, *bundle.sample_shape)), samplers.seeded_noise(seed)
    samplers.sample(predict, x, bundle.schedule, deployment, noise=noise, callback=note_call)
    return shipped, followed


@dataclass(frozen=True)
class _Measured:
    """The measurements at the chosen calls of the float trajectory; only sums are kept."""

    found: CallCosts
    shipped: StepSQNR
    calls: Mapping[int, Timestep]

    def diagnosis(
        self, bundle: Bundle, compared: SideBySide, recipe: Recipe, same_weights: bool, engine: EngineUsage
    ) -> Diagnosis:
        """Return the measurements with a suggestion for each layer."""
        manifest = bundle.manifest
        noise = {name: sum(cost.noise().values()) for name, cost in self.found.costs.items()}
        everything = sum(noise.values())
        bits = {quantizer.site: quantizer.bits for quantizer in manifest.quantizers}
        kernels = {name: layer.kernel for name, layer in manifest.kernels.layers.items()}
        layers = []
        for name in sorted(noise, key=lambda name: -noise[name]):
            facts, share = self.found.facts[name], noise[name] / everything if everything else 0.0
            weight = compared.layers[name].weight
            width = bits.get(weight, FULL_BITS) if weight else None
            suggestion = suggest(name, facts, share, recipe, width)
            kernel = kernels.get(name, "unknown")
            layers.append(LayerCost(name, kernel, self.found.costs[name], share, facts.local(), suggestion))
        islands = dict(manifest.islands)
        return Diagnosis(
            tuple(layers),
            self.found.together,
            self.shipped,
            self.calls,
            compared.unknown,
            islands,
            same_weights,
            recipe,
            engine,
        )
