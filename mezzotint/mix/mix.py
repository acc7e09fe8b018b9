"""Several bundles of one network combined into one that uses a precision for each network call.

The error of each precision is measured along the float trajectory, on noise that no pass has seen, as the error of the
noise that follows from the network's output (so that all prediction types are comparable). The cost of a call is
measured or given. compiler/mixing/choice.py decides. Precisions that no call uses are left out.

The default network, `unet/model.onnx`, is the most precise of those used: opened without Mezzotint's loop, or without
the number of the call, it is at least as precise as the mix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.bundle.staging import staged
from mezzotint.compiler.core.blas_threads import blas_threads_for_workers
from mezzotint.compiler.mixing.choice import PrecisionChoice, by_margin, picture_weights, relaxed
from mezzotint.runtime.bundle.acceptance import Acceptance, GroupFidelity
from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.bundle.precisions import spans
from mezzotint.runtime.compare import StepSQNR, json_db
from mezzotint.runtime.errors import BundleError, InputError
from mezzotint.runtime.latency import in_turns
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions, predictors, with_labels
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.sampling.steps import noise_of
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.streams import FIXED, SeedOffset

from ..bench.pairs import middle_timestep
from ..bench.reference import ReferenceModel
from ..cluster.connection import check_cluster, cluster_or_none
from ..io.networks import with_checked_networks
from .batch_errors import MixedNetworks, MixWork, summed_errors
from .write import calibration_seed, write_mix

CHOICE_RULES = ("schedule", "picture")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # nor "onnx...": `model.onnx*` must not match model.NAME.onnx


@dataclass(frozen=True)
class _Mixing:
    """The bundles by precision, and the inputs that they are measured on."""

    bundles: Mapping[str, Bundle]
    nets: Mapping[str, Denoiser]
    conditions: Conditions
    unconditional: Conditions
    threads: int | None

    @property
    def first(self) -> Bundle:
        """The first bundle: schedule, deployment and shape are the same for all."""
        return next(iter(self.bundles.values()))

    @property
    def fixed(self) -> int | None:
        """The images of a batch size that is fixed in the graphs; None for an open batch."""
        size = next(iter(self.nets.values())).fixed_batch
        return size and size // (2 if self.first.deployment.guided else 1)


def mix_bundles(
    bundles: Mapping[str, Bundle | str | Path] | Sequence[Bundle | str | Path],
    output: str | Path,
    *,
    reference: str | Path,
    budget: float | None = None,
    rule: str = "schedule",
    relax: float | None = None,
    relax_first: bool = False,
    costs: Mapping[str, float] | None = None,
    pictures: int = 8,
    batch: int = 8,
    seed: int | None = None,
    repeats: int = 7,
    conditions: Conditions | None = None,
    unconditional: Conditions | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Mix bundles of one network, compiled from one source for one deployment, into `output`, and open it.

    A precision has the name of its key, or of its recipe. `reference` is the float ONNX file (`mezzotint export`).
    `budget` is the mean cost of a call relative to the most expensive precision; without it PTQD's own rule decides.
    `rule` is schedule (the prediction's error relative to the schedule's noise, PTQD) or picture (the error's
    contribution to the image, which needs a budget); compiler/mixing/choice.py compares them. `relax` instead gives
    the last fraction of the calls (with `relax_first` the first) to the most precise. `costs` has the cost of a call
    of each precision. Without it costs are measured (`repeats` calls in a block, at the graphs' fixed batch size or
    1), and the choice may differ from run to run. Errors are measured on as many images as `pictures`, in batches of
    `batch`, from `seed`, by the workers of `cluster` if it is given (cluster/connection.py), a batch each;
    `conditions` and `unconditional` as in `Bundle.sample`.

    Raises InputError for bundles that do not match and for a budget that cannot be met, OutputError, BundleError.
    """
    if cluster is not None:
        check_cluster(cluster)
    by_name = _named(bundles)
    one = _check_same_network(by_name)
    if budget is not None and relax is not None:
        raise InputError("a budget and relaxed calls are two rules", hint="give one of them")
    if rule not in CHOICE_RULES:
        raise InputError(f"there is no rule {rule!r}", hint=f"use one of {', '.join(CHOICE_RULES)}")
    if rule == "picture" and budget is None:
        raise InputError("the rule picture has no threshold of its own", hint="give a budget")
    if relax_first and relax is None:
        raise InputError("relax_first needs the fraction of the calls", hint="add relax=0.2")
    if pictures < 1 or batch < 1 or repeats < 1:
        raise InputError(f"nothing to measure on: {pictures} images, batches of {batch}, {repeats} repeats")
    with staged(Path(output), force=force) as (folder, _):
        nets = {name: bundle.denoiser(threads) for name, bundle in by_name.items()}
        rows = with_labels(one.signature, one.deployment, conditions, unconditional, 0, one.condition_network)
        mixing = _Mixing(by_name, nets, *rows, threads)
        _check_inputs(nets)
        if seed is None:
            seed = SeedOffset.MIXING.after(max(calibration_seed(bundle) for bundle in by_name.values()))
        sqnr, raw = _measure(mixing, Path(reference), pictures, batch, seed, cluster, progress)
        prices, how = (_given_costs(costs, by_name), {"kind": "given"}) if costs else _costs(mixing, repeats, progress)
        choice, facts = _choose(mixing, sqnr, raw if rule == "picture" else None, prices, budget, relax, relax_first)
        measured = {"cost": how, "pictures": pictures, "seed": seed}
        calls = [list(by_name)[i] for i in choice.calls]
        precise = sorted(by_name, key=lambda name: -sqnr[name].pooled())
        ordered = {name: by_name[name] for name in precise if name in calls}
        progress("write", 0, 1)
        acceptance = _acceptance(mixing.first, sqnr, calls, pictures, seed)
        write_mix(ordered, folder, calls, prices, {**facts, **measured}, acceptance, threads=threads)
        progress("write", 1, 1)
    return open_bundle(output, verify=False)


def _named(bundles: Mapping[str, Bundle | str | Path] | Sequence[Bundle | str | Path]) -> dict[str, Bundle]:
    pairs = list(bundles.items()) if isinstance(bundles, Mapping) else [(None, bundle) for bundle in bundles]
    by_name: dict[str, Bundle] = {}
    for key, value in pairs:
        bundle = value if isinstance(value, Bundle) else with_checked_networks(open_bundle(value))
        name = str(bundle.manifest.recipe.name) if key is None else key
        if name in by_name:
            raise InputError(
                f"two bundles are called {name!r}", where=str(bundle.path), hint="name them: NAME=BUNDLE on the line"
            )
        if not _NAME.fullmatch(name) or name.startswith("onnx"):
            raise InputError(
                f"{name!r} cannot be part of a file name", hint="use letters, digits, points, dashes: NAME=BUNDLE"
            )
        if bundle.precisions is not None:
            raise InputError(
                "this bundle is a mix itself", where=str(bundle.path), hint="mix the bundles that it was made of"
            )
        by_name[name] = bundle
    if len(by_name) < 2:
        raise InputError(f"{len(by_name)} bundles cannot be mixed", hint="give two or more")
    return by_name


def _check_same_network(bundles: Mapping[str, Bundle]) -> Bundle:
    """Return the first. Raise InputError where source, signature, schedule, target, deployment or shape differ."""
    (name, first), *others = bundles.items()
    for other, bundle in others:
        pairs: dict[str, list[Any]] = {
            "source": [b.manifest.source.weights_sha256 for b in (first, bundle)],
            "signature": [b.signature for b in (first, bundle)],
            "schedule": [b.schedule for b in (first, bundle)],
            "target": [b.manifest.target for b in (first, bundle)],
            "deployment": [b.deployment for b in (first, bundle)],
            "sample shape": [b.sample_shape for b in (first, bundle)],
        }
        for what, (mine, its) in pairs.items():
            if mine != its:
                values = f" ({mine} and {its})" if what in ("target", "deployment", "sample shape") else ""
                raise InputError(
                    f"{name} and {other} differ in their {what}{values}",
                    where=str(bundle.path),
                    hint="compile one model twice, with two recipes and the same other options",
                )
        if pairs["source"][0] is None:
            raise BundleError("the manifest does not name the weights that it was compiled from", where=str(first.path))
    return first


def _check_inputs(nets: Mapping[str, Denoiser]) -> None:
    (name, first), *others = nets.items()
    for other, net in others:
        if net.inputs != first.inputs:
            raise InputError(f"the inputs of {name} and {other} differ: {dict(first.inputs)} and {dict(net.inputs)}")


def _measure(
    mixing: _Mixing, reference: Path, pictures: int, batch: int, seed: int, cluster: str | None, progress: Progress
) -> tuple[dict[str, StepSQNR], dict[str, npt.NDArray[np.float64]]]:
    """Return the SQNR of the implied noise at each call, and the mean square error of the output, `[calls]`; both for
    each precision."""
    bundle = mixing.first
    float_model = ReferenceModel(bundle, reference, threads=mixing.threads)
    float_model.check()
    size = mixing.fixed or batch
    count = -(-pictures // size) * size if mixing.fixed else pictures
    spans = [(first, min(size, count - first)) for first in range(0, count, size)]
    networks = MixedNetworks(bundle, mixing.nets, float_model, seed, mixing.conditions, mixing.unconditional)
    with cluster_or_none(cluster, mixing.threads) as workers:
        blas = None if workers is None else blas_threads_for_workers("mix")
        spread = None
        if workers is not None and blas is not None:
            spread = workers, MixWork.of(workers, mixing.bundles, networks, blas)
        measured = summed_errors(networks, spans, spread, progress)
    for name, sqnr in measured.items():
        if bad := [call for call, db in sqnr.per_step().items() if math.isnan(db)]:
            raise InputError(f"{name} predicts NaN at call {bad[0]}", hint="leave it out of the mix")
    shares = [noise_of(bundle.schedule, *bundle.schedule.levels(t))[1] for t in bundle.deployment.calls]
    # Where x alone determines the noise, the output does not enter it: its error counts as 0 at such a call.
    scale = np.array([1 / share**2 if share else 0.0 for share in shares]) / (count * math.prod(bundle.sample_shape))
    return measured, {name: scale * list(sqnr.noise().values()) for name, sqnr in measured.items()}


def _acceptance(
    bundle: Bundle, sqnr: Mapping[str, StepSQNR], calls: Sequence[str], pictures: int, seed: int
) -> Acceptance:
    """Return the SQNR of each run of calls with one precision, from the measurements of the choice."""
    groups = []
    for first, last, name in spans(calls):
        part = sqnr[name].over(range(first, last + 1))
        ends = bundle.deployment.calls[first], bundle.deployment.calls[last]
        groups.append(GroupFidelity(first, last, ends, len(part.per_step()), json_db(part.pooled())))
    least = bundle.manifest.acceptance.min_sqnr_db if bundle.manifest.acceptance else 0.0
    note = "no image was drawn: these are the errors, as noise, that the choice of precisions was made by"
    return Acceptance(seed, pictures, tuple(groups), (), least, note)


def _costs(mixing: _Mixing, repeats: int, progress: Progress) -> tuple[dict[str, float], dict[str, Any]]:
    """Return the seconds of a call of each precision, and how they were measured."""
    bundle, rows = mixing.first, mixing.fixed or 1
    both = mixing.conditions, mixing.unconditional
    given = [{name: np.repeat(array[:1], rows, axis=0) for name, array in arrays.items()} for arrays in both]
    progress("cost of a call", 0, 1)
    calls = predictors([*mixing.nets.values()], bundle.deployment, given[0], given[1], bundle.condition_network)
    x = initial_noise(FIXED, (rows, *bundle.sample_shape))
    latencies = in_turns(calls, x, middle_timestep(bundle), repeats=repeats)
    progress("cost of a call", 1, 1)
    seconds = dict(zip(mixing.nets, (latency.median for latency in latencies), strict=True))
    milliseconds = {name: 1e3 * value for name, value in seconds.items()}
    how = {"kind": "measured", "threads": mixing.threads, "batch": rows, "repeats": repeats, "call_ms": milliseconds}
    return seconds, how


def _given_costs(costs: Mapping[str, float], bundles: Mapping[str, Bundle]) -> dict[str, float]:
    if set(costs) != set(bundles):
        raise InputError(
            f"costs are given for {sorted(costs)}, the precisions are {sorted(bundles)}",
            hint="give one for each precision, or none to measure them",
        )
    return {name: float(costs[name]) for name in bundles}


def _choose(
    mixing: _Mixing,
    sqnr: Mapping[str, StepSQNR],
    raw: Mapping[str, npt.NDArray[np.float64]] | None,
    costs: Mapping[str, float],
    budget: float | None,
    relax: float | None,
    relax_first: bool,
) -> tuple[PrecisionChoice, dict[str, Any]]:
    """Return the choice, and its facts for the manifest."""
    bundle, names, prices = mixing.first, list(mixing.bundles), list(costs.values())
    levels = [bundle.schedule.levels(t) for t in bundle.deployment.calls]
    schedule_db = np.array([_amplitudes_db(alpha, sigma) for alpha, sigma in levels])
    table = np.array([list(sqnr[name].per_step().values()) for name in names])
    facts: dict[str, Any] = {
        "schedule_snr_db": [json_db(v) for v in schedule_db.tolist()],
        "snr_db": {name: [json_db(v) for v in row] for name, row in zip(names, table.tolist(), strict=True)},
    }
    if relax is not None:
        precise = int(np.argmax([sqnr[name].pooled() for name in names]))
        choice = relaxed(len(levels), prices, precise, relax, first=relax_first)
        rule: dict[str, Any] = {"rule": "relaxed first" if relax_first else "relaxed last", "fraction": relax}
    else:
        # A precision without any error always suffices: its margin is infinite.
        with np.errstate(invalid="ignore", divide="ignore"):
            if raw is None:
                margins = 10 ** (np.where(np.isposinf(table), np.inf, table - schedule_db) / 10)
            else:
                weights = picture_weights(bundle.deployment.solver(bundle.schedule).steps, bundle.schedule)
                margins = 1 / (weights * np.array([raw[name] for name in names]))
        choice = by_margin(margins, prices, budget)
        name = "schedule" if raw is None else "picture"
        rule = {"rule": name, "budget": budget, "threshold_db": _threshold_db(choice.threshold)}
    used = {names[i] for i in choice.calls}
    return choice, {
        **rule,
        "mean_cost": choice.mean_cost,
        "unused": [name for name in names if name not in used],
        **facts,
    }


def _threshold_db(threshold: float | None) -> float | None:
    """Return the margin of a choice in decibels, as JSON; None for a choice without a threshold."""
    if threshold is None:
        return None
    return json_db(10 * math.log10(threshold) if threshold > 0 else -math.inf)


def _amplitudes_db(signal: float, noise: float) -> float:
    """Return signal over noise of the schedule in decibels: infinite without noise, minus infinite without signal."""
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal > 0 else -math.inf
