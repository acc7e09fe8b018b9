"""Every sampler against diffusers' own scheduler: the calls, and the state behind each of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from mezzotint.runtime.errors import InputError, ScheduleError
from mezzotint.runtime.sampling.config_keys import FOLLOWED, HARMLESS, ONLY, SAMPLER_ONLY
from mezzotint.runtime.sampling.deployment import SAMPLERS, Deployment
from mezzotint.runtime.sampling.samplers import StepInfo, initial_noise, run_solver, sample
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.solvers import ddim
from mezzotint.runtime.signature import Images, Timestep

SHAPE = (2, 3, 8, 8)
TOLERANCE = 1e-4
"""Relative to the largest value of the state; float32 on both sides, the order of operations differs."""
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler-ancestral": (EulerAncestralDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "dpmpp-2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "pndm": (PNDMScheduler, {}),
    "lcm": (LCMScheduler, {}),
    "flow-euler": (FlowMatchEulerDiscreteScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "beta_schedule": "linear"}
WAN = {**FLOW, "flow_shift": 3.0}
SANA = {**FLOW, "flow_shift": 3.0, "solver_order": 2}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def denoise(x: Images, t: Timestep) -> Images:
    """Something smooth that depends on both, with outputs of the size of noise."""
    return np.asarray(0.8 * np.sin(1.3 * x + t / 300) + 0.1 * x, dtype=np.float32)


def cases() -> Iterator[Any]:
    """(sampler, configuration, steps)."""
    for sampler in SAMPLERS:
        if sampler == "flow-euler":
            continue
        for prediction in ("epsilon", "v_prediction", "sample"):
            if prediction == "sample" and sampler in ("pndm", "euler-ancestral"):
                continue  # diffusers has none
            for spacing in ("leading", "trailing", "linspace"):
                for betas, steps in ((SD, 12), (LINEAR, 20)):
                    config = {**betas, "prediction_type": prediction, "timestep_spacing": spacing, "steps_offset": 1}
                    if spacing != "leading":
                        config["steps_offset"] = 0
                    yield pytest.param(sampler, config, steps, id=f"{sampler}-{prediction}-{spacing}-{steps}")
    more: list[tuple[str, dict[str, Any], int]] = [
        ("euler", {**SD, "use_karras_sigmas": True}, 10),
        ("heun", {**SD, "use_karras_sigmas": True}, 10),
        ("heun", {**LINEAR, "clip_sample": True, "timestep_spacing": "leading"}, 10),
        ("lcm", {**LINEAR, "clip_sample": True}, 4),
        ("lcm", {**SD, "original_inference_steps": 25, "timestep_scaling": 5.0}, 3),
        ("dpmpp-2m", {**SD, "use_karras_sigmas": True}, 20),
        ("dpmpp-2m", {**SD, "final_sigmas_type": "sigma_min"}, 20),
        ("dpmpp-2m", {**SD, "final_sigmas_type": "sigma_min", "lower_order_final": False}, 9),
        ("dpmpp-2m", {**SD, "euler_at_final": True, "solver_order": 1}, 9),
        ("dpmpp-2m", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}, 9),
        ("dpmpp-2m-sde", {**SD, "use_karras_sigmas": True}, 20),
        ("euler", {**SD, "final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}, 9),
        ("euler", {**SD, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, 9),
        ("pndm", {**SD, "skip_prk_steps": True, "steps_offset": 1}, 50),
        ("pndm", {**SD, "skip_prk_steps": True, "prediction_type": "v_prediction"}, 7),
        ("pndm", {**SD, "skip_prk_steps": True, "set_alpha_to_one": True}, 3),
        ("pndm", {**SD, "skip_prk_steps": True}, 1),
        ("pndm", LINEAR, 4),
        ("ddim", {**SD, "set_alpha_to_one": False}, 1),
        ("euler", SD, 1),
        ("heun", SD, 1),
        ("dpmpp-2m", SD, 1),
        ("lcm", SD, 1),
        ("flow-euler", {}, 12),
        ("flow-euler", {"shift": 3.0}, 28),
        ("flow-euler", {"shift": 3.0, "stochastic_sampling": True}, 8),
        ("flow-euler", {}, 1),
        ("flow-euler", {"shift": 3.0, "use_beta_sigmas": True}, 9),
        ("unipc", SD, 1),
        ("unipc", {**SD, "solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}, 20),
        ("unipc", {**SD, "use_karras_sigmas": True, "disable_corrector": [0, 3]}, 9),
        ("unipc", WAN, 12),
        ("unipc", {**WAN, "solver_order": 3}, 20),
        ("dpmpp-2m", SANA, 20),
        ("dpmpp-2m", SANA, 1),
        ("dpmpp-2m-sde", SANA, 9),
    ]
    for sampler, config, steps in more:
        yield pytest.param(sampler, config, steps, id=f"{sampler}-{config}-{steps}")


def theirs(sampler: str, config: dict[str, Any], steps: int, eta: float) -> tuple[list[float], list[Images]]:
    """Timesteps and the state behind each call, scaled as the network sees it."""
    kind, options = SCHEDULERS[sampler]
    scheduler = kind.from_config({**config, **options})
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    x = torch.from_numpy(initial_noise(1, SHAPE)) * start
    extra: dict[str, Any] = {"eta": eta} if sampler == "ddim" else {}
    if "generator" in scheduler.step.__code__.co_varnames:
        extra["generator"] = generator
    states = []
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(denoise(seen.numpy().astype(np.float32), float(t)))
        x = scheduler.step(output, t, x, return_dict=False, **extra)[0].float()
        sigma = 0.0
        if sampler in ("euler", "euler-ancestral", "heun"):  # these keep x / alpha
            sigma = float(scheduler.sigmas[scheduler.step_index])
        states.append(x.numpy() / np.float32(np.hypot(1, sigma)))
    return scheduler.timesteps.tolist(), states


def ours(sampler: str, config: dict[str, Any], steps: int, eta: float) -> tuple[list[float], list[Images]]:
    schedule = Schedule.from_config({"_class_name": SCHEDULERS[sampler][0].__name__, **config})
    deployment = Deployment.of(schedule, sampler, steps, eta)
    states = []

    def keep(info: StepInfo) -> None:
        states.append(info.x_next)

    generator = torch.Generator().manual_seed(5)

    def noise(index: int, shape: tuple[int, ...]) -> Images:
        drawn: Images = torch.randn(shape, generator=generator).numpy()
        return drawn

    last = sample(denoise, initial_noise(1, SHAPE), schedule, deployment, noise=noise, callback=keep)
    assert last is states[-1]
    return [float(t) for t in deployment.calls], states


def check(mine: list[Images], other: list[Images]) -> None:
    assert len(mine) == len(other)
    for one, two in zip(mine, other, strict=True):
        assert np.abs(two).max() > 0.01
        np.testing.assert_allclose(one, two, rtol=0, atol=TOLERANCE * float(np.abs(two).max()))


@pytest.mark.parametrize(("sampler", "config", "steps"), cases())
def test_every_state_is_that_of_diffusers(sampler: str, config: dict[str, Any], steps: int) -> None:
    for eta in (0.0, 1.0) if sampler == "ddim" else (0.0,):
        times, expected = theirs(sampler, config, steps, eta)
        calls, found = ours(sampler, config, steps, eta)
        np.testing.assert_allclose(calls, times, rtol=1e-6)
        check(found, expected)
        with pytest.raises(AssertionError):
            check([state * np.float32(1.01) for state in found], expected)


def test_all_samplers_are_held_against_diffusers() -> None:
    assert set(SCHEDULERS) == set(SAMPLERS)


def test_calls_and_steps() -> None:
    schedule = Schedule.named("sd")
    config = {**SD, "skip_prk_steps": True}
    assert len(Deployment.of(Schedule.from_config(config), "pndm", 50).calls) == 51
    heun = Deployment.of(schedule, "heun", 11)
    assert (len(heun.calls), len(heun.timesteps)) == (21, 11)
    assert [step.stage for step in heun.solver(schedule).steps[:4]] == [0, 1, 0, 1]
    assert not heun.whole  # the usual spacing of Heun lies between training timesteps
    assert Deployment.of(schedule, "dpmpp-2m", 10).whole


def test_gain_and_carry_are_derivatives() -> None:
    """One call of each sampler, moved by a constant in the output and in the state."""
    for sampler, (kind, _) in SCHEDULERS.items():
        schedule = Schedule.from_config({"_class_name": kind.__name__, **SD, "timestep_spacing": "leading"})
        step = Deployment.of(schedule, sampler, 8).solver(schedule).steps[3]
        names = {name for row in (step.next, *step.keep.values()) for name in row} - {"x", "out", "image"}
        base = {name: np.full(SHAPE, 0.3, np.float32) for name in ("x", *names)}
        zero, scratch = np.zeros(SHAPE, np.float32), np.empty(SHAPE, np.float32)
        at = step.advance(base, zero, scratch)["x"]
        by_output = step.advance(base, zero + 1, scratch)["x"] - at
        by_state = step.advance({**base, "x": base["x"] + 1}, zero, scratch)["x"] - at
        np.testing.assert_allclose(by_output, step.gain, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(by_state, step.carry, rtol=1e-3, atol=1e-5)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(by_state, step.carry + 0.01, rtol=1e-3, atol=1e-5)


def test_any_list_of_timesteps_ends_each_step_where_the_next_begins() -> None:
    schedule = Schedule.named("ddpm-linear")
    bars = [*schedule.alphas_cumprod[[300, 40]], 1.0]
    found = ddim(schedule, [700, 300, 40]).steps
    assert [step.next["image"] ** 2 for step in found] == pytest.approx(bars, rel=1e-12)


def test_one_percent_on_the_output_of_the_network_is_noticed() -> None:
    config = {**LINEAR, "clip_sample": True}
    schedule = Schedule.from_config(config)
    _, expected = theirs("ddim", config, 7, 0.0)
    found = run_solver(
        lambda x, t: denoise(x, t) * np.float32(1.01), initial_noise(1, SHAPE), ddim(schedule, schedule.timesteps(7))
    )
    with pytest.raises(AssertionError):
        check([found], expected[-1:])


REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("ddim", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, 5, "needs a schedule of betas"),
    ("heun", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, 5, "needs a schedule of betas"),
    ("pndm", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, 5, "cannot sample flow_prediction"),
    ("flow-euler", SD, 5, "needs a schedule of flow matching"),
    ("flow-euler", {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, 5, "dynamic"),
    ("pndm", {**SD, "prediction_type": "sample"}, 5, "cannot sample sample"),
    ("pndm", SD, 3, "3 steps of pndm are not possible"),
    ("euler-ancestral", {**SD, "prediction_type": "sample"}, 5, "no euler-ancestral"),
    ("euler", {**SD, "use_beta_sigmas": True}, 5, "use_beta_sigmas True is not supported"),
    ("euler", {**SD, "timestep_type": "continuous"}, 5, "timestep_type 'continuous'"),
    ("dpmpp-2m", {**SD, "solver_order": 3}, 5, "solver_order 3"),
    ("dpmpp-2m", {**SD, "solver_type": "heun"}, 5, "solver_type 'heun'"),
    ("lcm", SD, 60, "60 steps of lcm"),
    ("euler", SD, 0, "0 steps are not possible"),
    ("leapfrog", SD, 5, "unknown sampler 'leapfrog'"),
]


@pytest.mark.parametrize(("sampler", "config", "steps", "why"), REFUSED, ids=[case[3] for case in REFUSED])
def test_what_is_not_implemented_is_refused(sampler: str, config: dict[str, Any], steps: int, why: str) -> None:
    with pytest.raises(ScheduleError, match=why) as caught:
        Deployment.of(Schedule.from_config(config), sampler, steps)
    assert caught.value.hint


def test_epsilon_without_any_signal_is_refused() -> None:
    with pytest.raises(ScheduleError, match="no signal"):
        Schedule.from_config({**SD, "rescale_betas_zero_snr": True})


def test_timesteps_of_a_solver_must_fall() -> None:
    schedule = Schedule.named("ddpm-linear")
    with pytest.raises(InputError, match="not a falling list"):
        ddim(schedule, [10, 20])
    with pytest.raises(InputError, match=r"eta is -0\.1"):
        ddim(schedule, [20, 10], eta=-0.1)


def test_a_deployment_on_another_schedule_is_refused() -> None:
    deployment = Deployment.of(Schedule.named("ddpm-linear"), "euler", 5)
    other = Schedule.from_config({**SD, "timestep_spacing": "leading"})
    with pytest.raises(ScheduleError, match="other network calls on this schedule"):
        deployment.solver(other)


OTHER_VALUES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (400,),
    "beta_start": (0.001,),
    "beta_end": (0.015,),
    "beta_schedule": ("squaredcos_cap_v2", "linear", "sigmoid"),
    "trained_betas": (np.linspace(1e-4, 0.03, 1000).tolist(),),
    "clip_sample": (True,),
    "clip_sample_range": (0.5,),
    "set_alpha_to_one": (False, True),
    "steps_offset": (1,),
    "prediction_type": ("v_prediction", "sample", "flow_prediction"),
    "thresholding": (True,),
    "dynamic_thresholding_ratio": (0.9,),
    "sample_max_value": (0.5,),
    "timestep_spacing": ("trailing", "leading", "linspace"),
    "rescale_betas_zero_snr": (True,),
    "variance_type": ("fixed_large", "fixed_large_log", "fixed_small_log", "learned_range"),
    "interpolation_type": ("log_linear",),
    "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,),
    "use_beta_sigmas": (True,),
    "use_lu_lambdas": (True,),
    "use_flow_sigmas": (True,),
    "flow_shift": (3.0,),
    "sigma_min": (0.05,),
    "sigma_max": (9.0,),
    "timestep_type": ("continuous",),
    "final_sigmas_type": ("sigma_min",),
    "solver_order": (1, 3),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver"),
    "solver_type": ("heun", "bh1"),
    "lower_order_final": (False,),
    "euler_at_final": (True,),
    "lambda_min_clipped": (-5.1,),
    "use_dynamic_shifting": (True,),
    "time_shift_type": ("linear",),
    "skip_prk_steps": (True,),
    "original_inference_steps": (25,),
    "timestep_scaling": (4.0,),
    "shift": (3.0,),
    "base_shift": (0.7,),
    "max_shift": (2.0,),
    "base_image_seq_len": (64,),
    "max_image_seq_len": (512,),
    "invert_sigmas": (True,),
    "predict_x0": (False,),
    "disable_corrector": ([0, 2],),
    "solver_p": (DDIMScheduler(),),
    "shift_terminal": (0.1,),
    "stochastic_sampling": (True,),
}
"""Every key of the schedulers that are followed, with values that are not the usual ones."""
CONTEXTS: tuple[dict[str, Any], ...] = ({}, {"use_karras_sigmas": True}, {"prediction_type": "v_prediction"})
"""Some keys are read only beside others."""


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_key_of_a_scheduler_is_followed_or_refused(sampler: str) -> None:
    """No key is ignored: the images are those of diffusers with the same configuration, or there is an error."""
    kind, options = SCHEDULERS[sampler]
    keys = [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
    assert not set(keys) - OTHER_VALUES.keys(), "a key that diffusers added: is it followed?"
    followed, ignored = set(), []
    for context in CONTEXTS:
        for key in keys:
            for value in OTHER_VALUES[key]:
                config = {**({} if sampler == "flow-euler" else SD), **options, **context, key: value}
                if not set(context) <= set(keys):
                    continue
                try:
                    calls, found = ours(sampler, config, 9, 0.0)
                except ScheduleError as error:
                    assert error.what
                    continue
                try:
                    times, expected = theirs(sampler, config, 9, 0.0)
                except (NotImplementedError, ValueError, IndexError, AssertionError):
                    continue  # diffusers cannot draw with this combination: there is nothing to compare with
                if not np.isfinite(expected[-1]).all():
                    continue  # UniPC's bh1 of diffusers multiplies infinity by zero at sigma 0
                # The cosine schedule begins at sigma 20000, where diffusers loses digits of v in float32.
                near = 100 * TOLERANCE if value == "squaredcos_cap_v2" else TOLERANCE
                pairs = zip(found, expected, strict=True)
                near_all = all(np.abs(a - b).max() < near * np.abs(b).max() for a, b in pairs)
                if not near_all or not np.allclose(calls, times, rtol=1e-6, atol=1e-4):
                    ignored.append((context, key, value))
                followed.add(key)
    assert not ignored
    assert len(followed) > 0.6 * len(keys) if sampler != "flow-euler" else followed >= {"shift", "stochastic_sampling"}


@pytest.mark.parametrize("name", [name for name in dir(diffusers) if name.endswith("Scheduler")])
def test_keys_of_all_schedulers_of_diffusers_are_sorted(name: str) -> None:
    """A configuration that any scheduler with betas or flow matching wrote has no key that is unknown here. That of any
    other scheduler is refused: no sampler here has its arithmetic."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    if not name.startswith("FlowMatch") and "beta_schedule" not in parameters:
        config = {key: 1000 if p.default is p.empty else p.default for key, p in parameters.items() if key != "self"}
        for given in ({}, {"trained_betas": [0.1, 0.2]} if "trained_betas" in config else {}):
            with pytest.raises(ScheduleError, match="neither a schedule of betas"):
                Schedule.from_config({**config, **given, "_class_name": name})
        return
    unknown = set(parameters) - FOLLOWED - HARMLESS - ONLY.keys() - SAMPLER_ONLY.keys() - {"self", "args", "kwargs"}
    assert not unknown
