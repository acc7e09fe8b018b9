"""A diffusers scheduler that undoes quantization noise: of the same class, with two of its methods wrapped.

The scheduler's own arithmetic stays. Before a step the model's output is corrected. After a step whose noise has to
change, the difference is added: the noise that diffusers drew is drawn again from the generator's earlier state. The
row of the tables for a step follows from the timesteps that were set, and is checked against the timestep of each step.

A pipeline may begin in the middle (img2img). A multistep solver remembers nothing there, and its first step is of first
order: the noise is reduced as at that call of a whole run, though the gain of the step differs.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from ..bundle.bundle import Bundle
from ..errors import InputError, TimestepNotDeployed
from ..sampling.correction import Correction
from ..sampling.deployment import Deployment
from ..sampling.flow_sigmas import PASSED
from ..sampling.schedule import Schedule
from ..sampling.steps import Solver

_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-ancestral",
    "HeunDiscreteScheduler": "heun",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "UniPCMultistepScheduler": "unipc",
}
_MULTISTEP = {"dpmsolver++": "dpmpp-2m", "sde-dpmsolver++": "dpmpp-2m-sde"}
_NEAR = 1e-3  # timesteps of two libraries, float32, differ by less
_UNFITTED = ("s_churn", "use_clipped_model_output", "per_token_timesteps")  # options of `step` that change it
Guidance = float | Callable[[], float]
StepFunction = Callable[..., Any]


def sampler_of(scheduler: Any) -> str:
    """Return Mezzotint's name of a diffusers scheduler's sampler. Raises InputError for one that is not implemented."""
    name = type(scheduler).__name__
    if name == "DPMSolverMultistepScheduler":
        kind = scheduler.config.algorithm_type
        if kind in _MULTISTEP:
            return _MULTISTEP[kind]
        name = f"{name} with algorithm_type {kind}"
    if name not in _SAMPLERS:
        raise InputError(
            f"{name} has no counterpart here, so that no bundle can be fitted for it",
            hint=f"use one of {', '.join([*_SAMPLERS, 'DPMSolverMultistepScheduler'])}",
        )
    return _SAMPLERS[name]


def corrected_scheduler(scheduler: Any, bundle: Bundle, *, guidance_scale: Guidance = 1.0) -> Any:
    """Return a new scheduler of the same class and configuration that applies the noise correction of its `bundle`.

    `guidance_scale` is what the pipeline will be called with, or a function that returns it at each step: guidance
    multiplies the network's error, and the tables hold for one scale. Raises InputError for a bundle without tables, a
    scheduler that it was not fitted for, another guidance scale, and another configuration of the schedule.
    """
    table = bundle.correction
    if table is None:
        raise InputError(
            "this bundle has no noise correction",
            where=str(bundle.path),
            hint="compile it with a recipe that has fit_noise, such as d2-dpm-gated",
        )
    sampler = sampler_of(scheduler)
    if sampler != table.deployment.sampler:
        raise InputError(
            f"the correction was fitted for {table.fitted_for}, not for {sampler} ({type(scheduler).__name__})",
            where=str(bundle.path),
            hint="compile the bundle for this sampler, or use the scheduler that it was fitted for",
        )
    if table.form == "ptqd-released" and sampler == "ddim":
        raise InputError(
            "the released form of PTQD changes the direction of DDIM, which no scheduler of diffusers does",
            where=str(bundle.path),
            hint="compile with fit_noise.form=ptqd, the paper's form, or sample from the bundle itself",
        )
    _check_schedule(scheduler, bundle, table)
    if not callable(guidance_scale):
        _check_guidance(table, guidance_scale)
    corrected = type(scheduler).from_config(scheduler.config)
    _Wrapped(corrected, bundle, table, guidance_scale)
    corrected.bundle = bundle
    # A plain copy would carry the wrapped methods along, which step the scheduler that they were made for.
    corrected.__deepcopy__ = lambda memo: corrected_scheduler(corrected, bundle, guidance_scale=guidance_scale)
    return corrected


class _Wrapped:
    """The state of one corrected scheduler; the wrapped methods hold it."""

    def __init__(self, scheduler: Any, bundle: Bundle, table: Correction, guidance: Guidance) -> None:
        self._scheduler, self._bundle, self._table, self._guidance = scheduler, bundle, table, guidance
        self._rows: Correction | None = None
        self._solver = Solver(())
        self._noise: tuple[float, ...] = ()
        self._at: list[int] | None = None  # where the next step may be; several where a timestep has several calls
        set_timesteps, step = scheduler.set_timesteps, scheduler.step
        self._names = list(inspect.signature(step).parameters)[3:]  # behind model_output, timestep, sample

        @functools.wraps(set_timesteps)
        def wrapped_set_timesteps(*args: Any, **options: Any) -> None:
            self._rows = None
            set_timesteps(*args, **options)
            self._set()

        @functools.wraps(step)
        def wrapped_step(model_output: Any, timestep: Any, sample: Any, *args: Any, **options: Any) -> Any:
            return self._step(step, model_output, timestep, sample, args, options)

        scheduler.set_timesteps, scheduler.step = wrapped_set_timesteps, wrapped_step

    def _set(self) -> None:
        """Choose the rows for the timesteps that were set."""
        mine = self._table.deployment
        times = [float(t) for t in self._scheduler.timesteps]
        # A list of timesteps of one's own leaves some schedulers without a number of steps.
        steps = int(self._scheduler.num_inference_steps or len(times))
        plan = self._bundle.plan(mine.sampler, steps, mine.eta, mine.guidance)
        if len(times) != len(plan.calls) or not np.allclose(times, plan.calls, rtol=0, atol=_NEAR):
            raise InputError(
                f"the pipeline set timesteps of its own ({', '.join(f'{t:g}' for t in times[:3])}, ...), "
                f"the correction holds for {', '.join(f'{t:g}' for t in plan.calls[:3])}, ...",
                hint="set num_inference_steps, no list of timesteps or sigmas",
            )
        self._solver = plan.solver(self._bundle.schedule)
        rows = self._table.for_deployment(plan, self._solver.steps)
        self._noise = rows.noise(self._solver.steps)
        self._rows, self._at = rows, None

    def _step(
        self, step: StepFunction, output: Any, timestep: Any, sample: Any, args: Any, options: dict[str, Any]
    ) -> Any:
        if self._rows is None:
            raise InputError("the scheduler has no timesteps yet", hint="call set_timesteps first")
        if callable(self._guidance):
            _check_guidance(self._table, self._guidance())
        given = {**dict(zip(self._names, args, strict=False)), **options}
        self._check_options(given)
        if output.dtype not in (torch.float32, torch.float16, torch.bfloat16) or output.device.type != "cpu":
            raise InputError(
                f"the model's output is {output.dtype} on {output.device}; bundles compute in float32 on the CPU",
                hint="load the pipeline with torch_dtype=torch.float32",
            )
        index = self._index(float(timestep))
        fixed = torch.from_numpy(self._rows.apply(output.detach().float().numpy(), index)).to(output.dtype)
        sigma, noise = self._solver.steps[index].sigma, self._noise[index]
        if sigma == noise:
            return step(fixed, timestep, sample, *args, **options)
        own: torch.Tensor | None = given.get("variance_noise")
        again = _replay(given.get("generator")) if own is None else own.to
        found = step(fixed, timestep, sample, *args, **options)
        # Euler's schedulers keep x / alpha; their noise is larger by that.
        sigmas = self._scheduler.sigmas if self._table.deployment.sampler == "euler-ancestral" else None
        scale = 1.0 if sigmas is None else math.hypot(1.0, float(sigmas[self._scheduler.step_index]))
        return _moved(found, again(fixed) * ((noise - sigma) * scale))

    def _index(self, timestep: float) -> int:
        """Return the network call of a step: the one after the last call, or at first that where the pipeline begins.

        A pipeline that begins at a timestep with two calls, without an index, begins at the second one, as diffusers
        does; for PNDM the next step shows which it was.
        """
        calls = self._solver.calls
        near = [i for i, t in enumerate(calls) if abs(t - timestep) < _NEAR]
        begin = getattr(self._scheduler, "begin_index", None)
        expected = self._at if self._at is not None else [begin] if begin in near else near
        found = [i for i in expected if i in near]
        if not found:
            due = ", ".join(f"{calls[i]:g}" for i in expected if i < len(calls))
            raise TimestepNotDeployed(
                f"a step at timestep {timestep:g}, where the correction expects {due or 'no further one'}",
                hint="call set_timesteps before each run, and every step in its order",
            )
        self._at = [i + 1 for i in found]
        return found[-1]

    def _check_options(self, given: dict[str, Any]) -> None:
        mine = self._table.deployment
        if mine.sampler == "ddim" and float(given.get("eta", 0.0)) != mine.eta:
            raise InputError(
                f"the correction was fitted for eta {mine.eta:g}, the pipeline runs eta {given.get('eta', 0.0):g}",
                hint=f"call the pipeline with eta={mine.eta:g}, or compile the bundle for this one",
            )
        for name in _UNFITTED:
            value = given.get(name)
            if isinstance(value, torch.Tensor) or value:
                raise InputError(f"{name} changes the step that the correction was fitted for", hint="leave it out")


def _check_schedule(scheduler: Any, bundle: Bundle, table: Correction) -> None:
    """Raise InputError for a scheduler with other steps than the schedule that the bundle was compiled with."""
    name = type(scheduler).__name__
    # The configuration may name the class that it was saved by. What the pipeline passes is not in its configuration.
    passed = {key: value for key, value in bundle.schedule.config.items() if key in PASSED}
    theirs = Schedule.from_config({**scheduler.config, **passed, "_class_name": name}, where=f"the pipeline's {name}")
    if theirs.prediction != bundle.signature.prediction:
        raise InputError(
            f"the scheduler expects {theirs.prediction}, the bundle's network predicts {bundle.signature.prediction}",
            where=str(bundle.path),
            hint="give the pipeline the scheduler configuration of the model",
        )
    mine = table.deployment
    other = Deployment.of(theirs, mine.sampler, mine.steps, mine.eta, mine.guidance)
    if other.calls != mine.calls or other.solver(theirs) != mine.solver(bundle.schedule):
        raise InputError(
            "the scheduler's configuration is another than that of the bundle",
            where=str(bundle.path / "scheduler"),
            hint=f"use {name}.from_pretrained(BUNDLE, subfolder='scheduler')",
        )


def _check_guidance(table: Correction, scale: float) -> None:
    if scale != table.deployment.guidance:
        raise InputError(
            f"guidance_scale is {scale:g}; the correction was fitted at {table.deployment.guidance:g}",
            hint="guidance multiplies the network's error: use that scale, or compile the bundle for this one",
        )


def _replay(generator: torch.Generator | Sequence[torch.Generator] | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Draws the random numbers that diffusers will draw next."""
    if generator is None:
        before = torch.get_rng_state()

        def from_global(like: torch.Tensor) -> torch.Tensor:
            torch.set_rng_state(before)  # as many numbers as before: it ends in the same state
            drawn: torch.Tensor = randn_tensor(like.shape, device=like.device, dtype=like.dtype)
            return drawn

        return from_global
    given = list(generator) if isinstance(generator, Sequence) else [generator]
    # A list may name one generator several times, which then draws for one picture after the other.
    clones = {id(one): torch.Generator(device=one.device).set_state(one.get_state()) for one in given}
    copies = [clones[id(one)] for one in given]
    return lambda like: randn_tensor(
        like.shape,
        generator=copies if isinstance(generator, Sequence) else copies[0],
        device=like.device,
        dtype=like.dtype,
    )


def _moved(found: Any, by: torch.Tensor) -> Any:
    """Return the result of a step, a tuple or an output object, with another previous sample."""
    if isinstance(found, tuple):
        return (found[0] + by, *found[1:])
    found.prev_sample = found.prev_sample + by
    return found
