"""The acceptance of a finished file: it is run in plain onnxruntime beside the float model, and must be right.

One batch of held-out noise follows the float model along the trajectory of the deployed sampler; the file predicts from
the same latents at the calls of every group of timesteps, and then draws the same images by itself. The float model is
the one that was imported, before any pass: what a pass did wrong is seen here, too.

    not opened, a failing call, values that are not finite     AcceptanceError, and so no bundle
    SQNR of a group below `min_sqnr`                           a warning with the worst layers; an error if `strict`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from mezzotint.runtime.bundle.acceptance import Acceptance, GroupFidelity, WorstLayer
from mezzotint.runtime.compare import PEAK, StepSQNR, json_db, psnr_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.latency import paired_latencies
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.condition_network import call_conditions
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Predict, Timestep
from mezzotint.runtime.streams import SeedOffset

from ..audit.suggestions import best_recipe, islands_option
from ..calibration.calibrate import (
    batch_conditions,
    batch_spans,
    both_halves,
    guided_output,
    network_call,
    require_same_channels,
)
from ..core.execute import Executor
from ..core.pipeline import Context, Recipe
from ..core.program import Program
from ..errors import AcceptanceError, ModelError
from .effort import Effort, choose_effort, float_call_seconds
from .worst_layers import worst_layers

FLOOR_DB = -100.0  # stands for an error where the float model predicts zeros
ACCEPTING = "accept"
TIMED_CALLS = 2  # calls in a block
FLOAT_MODEL = "the float model"


@dataclass(frozen=True)
class AcceptanceLimits:
    """The SQNR in dB that each group of timesteps should have, and whether less is an error; the budget in seconds."""

    min_sqnr: float = 15.0
    strict: bool = False
    seconds: float = 120.0


@dataclass
class _Comparison:
    """The measurements along the float trajectory. `worst` is the call with the lowest SQNR, with its latents."""

    sqnr: StepSQNR = field(default_factory=StepSQNR)
    worst: tuple[float, int, Timestep, Images] | None = None

    def add(self, index: int, timestep: Timestep, x: Images, exact: Images, got: Images) -> None:
        one = StepSQNR()
        one.add(index, exact, got)
        self.sqnr += one
        db = one.pooled()
        if self.worst is None or db < self.worst[0]:
            self.worst = db, index, timestep, x.copy()


def accept(
    imported: Program,
    program: Program,
    file: Path,
    recipe: Recipe,
    context: Context,
    limits: AcceptanceLimits,
) -> Acceptance:
    """Run `file`, the finished graph of `program`, beside the imported model. Raises AcceptanceError, ModelError."""
    started = perf_counter()
    seed = SeedOffset.ACCEPTANCE.after(context.seed)
    effort = choose_effort(program, context.samples, limits.seconds)
    fresh = replace(context, seed=seed, samples=effort.images, batch=effort.images)
    _, rows = batch_spans(program, fresh)[0]
    conditions = batch_conditions(program, context, context.samples, rows)
    computing = context.condition_network
    x = samplers.initial_noise(seed, (rows, *program.shape))
    with Executor(imported.model, context.folder, threads=context.threads) as executor:
        with _runs(file):
            network = Denoiser(file, program.signature, threads=context.threads, deployed=program.frozen)

        def compiled(x: Images, t: Timestep) -> Images:
            with _runs(file):
                return network(x, t, **call_conditions(computing, x, t, conditions))

        def floating(x: Images, t: Timestep) -> Images:
            outputs = executor.call(imported.signature, x, t, call_conditions(computing, x, t, conditions))
            return np.asarray(outputs[imported.signature.output], np.float32)

        exact, mine = _Network(floating, program, FLOAT_MODEL), _Network(compiled, program, "the compiled file")
        comparison, psnr = _compare(exact, mine, program, x, seed, effort, context)
        seconds = _times(exact, mine, x, comparison)
    groups = _groups(program, effort, comparison)
    entry = Acceptance(seed, rows, groups, psnr, limits.min_sqnr, effort.note, seconds=seconds)
    low = entry.worst()
    if low.sqnr_db is not None and low.sqnr_db < limits.min_sqnr:
        layers = _worst_layers(program, file, recipe, context, conditions, comparison, limits)
        what, helps = _inaccurate(entry, layers), _remedies(layers, recipe)
        if limits.strict:
            raise AcceptanceError(what, where=str(low), hint=f"{helps}; or compile without --strict")
        entry = replace(entry, warning=f"{what}. What helps: {helps}", layers=layers)
    times = {**seconds, "acceptance": round(perf_counter() - started, 3)}
    return replace(entry, seconds=times)


def _inaccurate(entry: Acceptance, layers: Sequence[WorstLayer]) -> str:
    """Return what is wrong: the lowest SQNR, and the worst layers there."""
    low = entry.worst()
    text = f"the compiled file is inaccurate: SQNR of the prediction {low.sqnr_db:.1f} dB at {low}, "
    text += f"below the {entry.min_sqnr_db:g} dB of --min-sqnr"
    named = ", ".join(f"{layer.layer} ({layer.share:.0%} of the error: {layer.why})" for layer in layers)
    return f"{text}; the worst layers are {named}" if named else text


def _remedies(layers: Sequence[WorstLayer], recipe: Recipe) -> str:
    """Return what helps: the remedies of the layers, and the options that keep all of them in float."""
    if not layers and not any(step.name == "insert_qdq" for step in recipe.passes):
        return "a smaller share of pruned weights or channels, or more calibration samples"
    if not layers:
        other = "" if recipe.name == best_recipe(recipe) else f"--recipe {best_recipe(recipe)}, "
        return f"{other}more calibration samples, or wider weights and activations; `mezzotint debug` may name layers"
    remedies = dict.fromkeys(layer.advice for layer in layers if ".islands=" not in layer.advice)
    return "; or ".join([*remedies, islands_option(recipe, [layer.layer for layer in layers])])


class _Network:
    """A network as the sampling loop calls it, guided if the deployment is; its outputs must be finite."""

    def __init__(self, call: Predict, program: Program, name: str) -> None:
        self._call, self._program, self._name = call, program, name

    def __call__(self, x: Images, t: Timestep) -> Images:
        output = guided_output(self._program, self._call(both_halves(self._program, x), t))
        if bad := output.size - int(np.isfinite(output).sum()):
            what, where = f"{self._name} predicts {bad} of {output.size} values that are not finite", f"timestep {t:g}"
            if self._name == FLOAT_MODEL:
                raise ModelError(what, where=where, hint="check the model at this timestep, in onnxruntime alone")
            raise AcceptanceError(what, where=where, hint="no bundle was written; compile with another recipe")
        return output


def _compare(
    exact: Predict, mine: Predict, program: Program, x: Images, seed: int, effort: Effort, context: Context
) -> tuple[_Comparison, tuple[float | None, ...]]:
    """Return the comparison of predictions, and the PSNR of each image that both draw from `x`."""
    comparison = _Comparison()
    calls, deployment = program.deployment.calls, program.deployment
    total = len(calls) * (1 + effort.draws) + len(effort.compared)
    done = 0

    def step(info: samplers.StepInfo | None = None) -> None:
        nonlocal done
        done += 1
        context.progress(ACCEPTING, done, total)

    def compared(index: int, latents: Images, output: Images) -> None:
        comparison.add(index, calls[index], latents, output, mine(latents, calls[index]))
        step()

    try:
        require_same_channels(program)
    except ModelError:  # no sampler can follow it: single calls on noise
        for index in sorted(effort.compared):
            compared(index, x, exact(x, calls[index]))
        return comparison, ()
    # The calls of one network come one after the other: threads of a session that wait for work slow the other one.
    seen: list[tuple[int, Images, Images]] = []

    def keep(info: samplers.StepInfo) -> None:
        if info.index in effort.compared:
            seen.append((info.index, info.x, info.output))
        step()

    noise = samplers.seeded_noise(seed)
    images = samplers.sample(exact, x, program.schedule, deployment, noise=noise, callback=keep)
    for index, latents, output in seen:
        compared(index, latents, output)
    if not effort.draws:
        return comparison, ()
    drawn = samplers.sample(
        mine, x, program.schedule, deployment, noise=noise, correction=program.correction, callback=step
    )
    psnr = psnr_db(np.clip(images, -1, 1), np.clip(drawn, -1, 1), peak=PEAK)
    return comparison, tuple(_rounded(value) for value in psnr.tolist())


def _groups(program: Program, effort: Effort, comparison: _Comparison) -> tuple[GroupFidelity, ...]:
    calls = program.deployment.calls
    groups = []
    for first, last in effort.groups:
        part = comparison.sqnr.over(range(first, last + 1))
        measured = len(part.per_step())
        groups.append(GroupFidelity(first, last, (calls[first], calls[last]), measured, _rounded(part.pooled())))
    return tuple(groups)


def _rounded(db: float) -> float | None:
    return json_db(round(max(db, FLOOR_DB), 2))


def _times(exact: Predict, mine: Predict, x: Images, comparison: _Comparison) -> dict[str, float]:
    """Return the seconds of one call of both, timed in blocks at the worst call."""
    t = comparison.worst[2] if comparison.worst is not None else 0
    quantized, floating = paired_latencies(exact, mine, x, t, TIMED_CALLS)
    return {
        "float_call": round(floating.median, 6),
        "call": round(quantized.median, 6),
        "batch": len(x),
    }


def _worst_layers(
    program: Program,
    file: Path,
    recipe: Recipe,
    context: Context,
    conditions: Conditions,
    comparison: _Comparison,
    limits: AcceptanceLimits,
) -> tuple[WorstLayer, ...]:
    """Return the layers that cost the most at the worst call, on its first image where the batch is open."""
    if comparison.worst is None:
        return ()
    _, index, t, x = comparison.worst
    if program.fixed_batch is None:
        halves = 2 if program.deployment.guided else 1
        conditions = {name: rows[:: len(rows) // halves] for name, rows in conditions.items()}
        x = x[:1]

    def predict(network: Callable[..., Images]) -> Images:
        seen, _, fed = network_call(program, context, x, t, conditions)
        return guided_output(program, network(seen, t, **fed))

    call = float_call_seconds(program) * len(x)
    return worst_layers(program, file, recipe, context, predict, (index, t), limits.seconds / call if call else 1e6)


@contextmanager
def _runs(file: Path) -> Iterator[None]:
    """Turn a refusal of onnxruntime into an AcceptanceError."""
    try:
        yield
    except InputError as error:
        raise AcceptanceError(
            f"the compiled file does not run: {error.what.replace(str(file), file.name)}",
            where=f"{file.parent.name}/{file.name}" if error.where == str(file) else error.where,
            hint="no bundle was written; compile with another recipe (--recipe w8a8, or float), and report this",
        ) from error
