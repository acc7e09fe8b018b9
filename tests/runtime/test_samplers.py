"""The loop against diffusers' schedulers, step by step and as a whole."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from mezzotint.runtime.correction import Correction
from mezzotint.runtime.deployment import Deployment
from mezzotint.runtime.errors import InputError, TimestepNotDeployed
from mezzotint.runtime.samplers import Images, StepInfo, ddim, ddpm, initial_noise, sample, seeded_noise, stepper
from mezzotint.runtime.schedule import Schedule

SHAPE = (3, 2, 8, 8)


def denoise(x: Images, t: int) -> Images:
    """Something smooth that depends on both, with outputs of the size of noise."""
    return np.asarray(0.8 * np.sin(1.3 * x + t / 300) + 0.1 * x, dtype=np.float32)


def torch_noise(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda index, shape: torch.randn(shape, generator=generator).numpy()


def reference(kind: Any, config: dict[str, Any], steps: int, seed: int, exact: bool = False, **options: Any) -> Images:
    scheduler = kind.from_config(config)
    if exact:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(initial_noise(1, SHAPE))
    for t in scheduler.timesteps.tolist():
        output = torch.from_numpy(denoise(x.numpy(), t))
        x = scheduler.step(output, t, x, generator=generator, **options).prev_sample.float()
    found: Images = x.numpy()
    return found


def check_images(ours: Images, theirs: Images) -> None:
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * max(1.0, float(np.abs(theirs).max())))


CASES = [
    {"prediction_type": prediction, "clip_sample": clip, **rest}
    for prediction in ("epsilon", "v_prediction", "sample")
    for clip in (True, False)
    for rest in (
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "linspace"},
        {"beta_schedule": "linear", "timestep_spacing": "trailing", "clip_sample_range": 1.5},
    )
]
OFFSET = {"beta_schedule": "linear", "steps_offset": 1, "set_alpha_to_one": False}


def our_ddim(config: dict[str, Any], eta: float) -> Images:
    schedule = Schedule.from_config(config)
    return ddim(denoise, initial_noise(1, SHAPE), schedule, schedule.timesteps(7), eta=eta, noise=torch_noise(5))


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("config", [*CASES, OFFSET], ids=str)
def test_ddim_is_that_of_diffusers(config: dict[str, Any], eta: float) -> None:
    theirs = reference(DDIMScheduler, config, 7, seed=5, eta=eta)
    check_images(our_ddim(config, eta), theirs)
    with pytest.raises(AssertionError):
        check_images(our_ddim(config, eta) * np.float32(1.01), theirs)


@pytest.mark.parametrize("config", CASES, ids=str)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
def test_ddpm_is_that_of_diffusers(config: dict[str, Any], variance: str) -> None:
    config = {**config, "variance_type": variance}
    theirs = reference(DDPMScheduler, config, 9, seed=6)
    schedule = Schedule.from_config(config)
    ours = ddpm(denoise, initial_noise(1, SHAPE), schedule, schedule.timesteps(9), noise=torch_noise(6))
    check_images(ours, theirs)
    with pytest.raises(AssertionError):
        check_images(ours * np.float32(1.01), theirs)


def test_ddpm_with_every_timestep() -> None:
    config = {"beta_schedule": "linear", "num_train_timesteps": 200}
    schedule = Schedule.from_config(config)
    ours = ddpm(denoise, initial_noise(1, SHAPE), schedule, schedule.timesteps(200), noise=torch_noise(6))
    # In float32 diffusers loses digits in 1 - abar[t] / abar[t-1], 5e-5 in all; in float64 it agrees with us.
    theirs = reference(DDPMScheduler, config, 200, seed=6, exact=True)
    check_images(ours, theirs)
    with pytest.raises(AssertionError):
        check_images(ours * np.float32(1.01), theirs)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_zero_terminal_snr(prediction: str) -> None:
    config = {"beta_schedule": "scaled_linear", "prediction_type": prediction, "rescale_betas_zero_snr": True}
    config = {**config, "timestep_spacing": "trailing", "clip_sample": False}
    check_images(our_ddim(config, 0.0), reference(DDIMScheduler, config, 7, seed=5))


def test_one_percent_on_the_output_of_the_network_is_noticed() -> None:
    schedule = Schedule.named("ddpm-linear")

    def wrong(x: Images, t: int) -> Images:
        return denoise(x, t) * np.float32(1.01)

    ours = ddim(wrong, initial_noise(1, SHAPE), schedule, schedule.timesteps(7))
    with pytest.raises(AssertionError):
        check_images(ours, reference(DDIMScheduler, schedule.config, 7, seed=5))


def planted(schedule: Schedule, sampler: str, eta: float, spread: float) -> tuple[Deployment, Correction]:
    deployment = Deployment.of(schedule, sampler, 10, eta)
    correction = Correction(
        timesteps=np.array(deployment.timesteps),
        slope=np.full(10, 0.1),
        bias=np.full((10, 2), 0.05),
        spread=np.full(10, spread),
        sampler=deployment.sampler,
        steps=deployment.steps,
        eta=deployment.eta,
    )
    return deployment, correction


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("ddpm", 0.0)])
def test_correction_keeps_mean_and_variance_of_the_schedule(sampler: str, eta: float) -> None:
    """The float step's state has variance sigma^2 around its mean; the corrected noisy one must have the same."""
    schedule = Schedule.from_config({"beta_schedule": "linear", "clip_sample": False})
    deployment, correction = planted(schedule, sampler, eta, spread=0.4)
    shape = (256, 2, 32, 32)
    x = np.zeros(shape, dtype=np.float32)
    error = initial_noise(77, shape) * np.float32(0.4 * 1.1)  # before it is divided by 1 + k
    signal = np.float32(0.3)

    def noisy(x: Images, t: int) -> Images:
        return np.float32(1.1) * signal + np.float32(0.05 * 1.1) + error

    def exact(x: Images, t: int) -> Images:
        return np.full_like(x, signal)

    def first_state(denoiser: Any, table: Correction | None) -> Images:
        states: list[Images] = []
        short = deployment.timesteps[4:5] + deployment.timesteps[5:6]
        options: dict[str, Any] = {"eta": eta} if sampler == "ddim" else {}
        run: Any = ddim if sampler == "ddim" else ddpm

        def keep(info: StepInfo) -> None:
            states.append(info.x_next)

        run(denoiser, x, schedule, short, noise=seeded_noise(5), correction=table, callback=keep, **options)
        return states[0]

    wanted, got, plain = first_state(exact, None), first_state(noisy, correction), first_state(noisy, None)
    assert got.std() == pytest.approx(wanted.std(), rel=4e-3)
    assert got.mean() == pytest.approx(wanted.mean(), abs=1e-3)
    assert plain.std() != pytest.approx(wanted.std(), rel=4e-3)
    assert got.std() * 1.01 != pytest.approx(wanted.std(), rel=4e-3)


def test_correction_undoes_what_was_planted() -> None:
    schedule = Schedule.named("ddpm-linear")
    deployment, correction = planted(schedule, "ddim", 0.0, spread=0.0)
    x = initial_noise(1, SHAPE)

    def worse(x: Images, t: int, slope: float = 0.1) -> Images:
        return np.asarray((denoise(x, t) + 0.05) * (1 + slope), dtype=np.float32)

    wanted = sample(denoise, x, schedule, deployment)
    check_images(sample(worse, x, schedule, deployment, correction=correction), wanted)

    def worse_still(x: Images, t: int) -> Images:
        return worse(x, t, slope=0.111)

    for denoiser, table in ((worse, None), (worse_still, correction)):
        with pytest.raises(AssertionError):
            check_images(sample(denoiser, x, schedule, deployment, correction=table), wanted)


def test_callback_sees_every_step_and_may_keep_it() -> None:
    schedule = Schedule.named("ddpm-linear")
    infos: list[StepInfo] = []
    copies: list[Images] = []

    def keep(info: StepInfo) -> None:
        infos.append(info)
        copies.append(info.x_next.copy())

    x = initial_noise(1, SHAPE)
    before = x.copy()
    final = ddpm(denoise, x, schedule, schedule.timesteps(5), noise=seeded_noise(1), callback=keep)
    assert [info.index for info in infos] == [0, 1, 2, 3, 4]
    assert [info.timestep for info in infos] == schedule.timesteps(5).tolist()
    assert infos[0].x is x
    assert infos[-1].x_next is final
    np.testing.assert_array_equal(x, before)
    for info, copy, following in zip(infos, copies, [*infos[1:], None], strict=True):
        np.testing.assert_array_equal(info.x_next, copy)
        np.testing.assert_array_equal(info.output, denoise(info.x, info.timestep))
        assert following is None or following.x is info.x_next


def test_noise_belongs_to_an_image_and_a_step() -> None:
    whole = seeded_noise(9)(3, (5, 1, 4, 4))
    part = seeded_noise(9, first=2)(3, (3, 1, 4, 4))
    np.testing.assert_array_equal(whole[2:], part)
    np.testing.assert_array_equal(initial_noise(9, (5, 1, 4, 4))[4:], initial_noise(9, (1, 1, 4, 4), first=4))
    others = (seeded_noise(9)(2, (5, 1, 4, 4)), seeded_noise(8)(3, (5, 1, 4, 4)), initial_noise(9, (5, 1, 4, 4)))
    assert not any(np.array_equal(whole, other) for other in others)
    assert len(np.unique(whole)) == whole.size
    large = seeded_noise(2**40)(0, (64, 1, 32, 32))
    assert abs(float(large.mean())) < 0.02
    assert abs(float(large.std()) - 1) < 0.02


def test_refusals() -> None:
    schedule = Schedule.named("ddpm-linear")
    x = initial_noise(1, SHAPE)
    steps = schedule.timesteps(5)
    for eta in (0.5, 1.0):
        with pytest.raises(InputError, match="need noise"):
            ddim(denoise, x, schedule, steps, eta=eta)
    with pytest.raises(InputError, match="need noise"):
        ddpm(denoise, x, schedule, steps, noise=None)
    with pytest.raises(InputError, match="eta is 2"):
        ddim(denoise, x, schedule, steps, eta=2.0, noise=seeded_noise(1))
    for broken in ([], [10, 20], [20, 20], [1000, 3], [5, -1]):
        with pytest.raises(InputError, match="not a falling list"):
            ddim(denoise, x, schedule, broken)
    wrongs: list[Any] = [x.astype(np.float64), x[0]]
    for wrong in wrongs:
        with pytest.raises(InputError, match="sampling begins with float32"):
            ddim(denoise, wrong, schedule, steps)
    with pytest.raises(InputError, match="the denoiser returned float32"):
        ddim(lambda x, t: x[:, :1], x, schedule, steps)
    with pytest.raises(InputError, match="the denoiser returned float64"):
        ddim(lambda x, t: x.astype(np.float64), x, schedule, steps)
    with pytest.raises(InputError, match="must not be negative"):
        initial_noise(-1, SHAPE)
    _, correction = planted(schedule, "ddim", 0.0, spread=0.1)
    with pytest.raises(TimestepNotDeployed, match="no row for timestep"):
        ddim(denoise, x, schedule, schedule.timesteps(7), correction=correction)


def test_the_loop_costs_little_beside_the_network() -> None:
    """At 16 x 1 x 32 x 32 a call of the network takes about 60 ms; 3 % of that are 1.8 ms for everything else."""
    schedule = Schedule.named("ddpm-linear")
    x = initial_noise(1, (16, 1, 32, 32))
    best = np.inf
    for _ in range(5):
        begin = time.perf_counter()
        ddpm(lambda x, t: x, x, schedule, schedule.timesteps(20), noise=seeded_noise(1))
        best = min(best, (time.perf_counter() - begin) / 20)
    assert best < 1.8e-3


def walk_outside(deployment: Deployment, correction: Correction | None, factor: float = 1.0) -> list[Images]:
    """Two batches of the images 0, 1, 2 advanced side by side, the loop on the caller's side."""
    schedule = Schedule.named("ddpm-linear")
    steps = stepper(schedule, deployment, correction=correction)
    spans = ((0, 2), (2, 1))
    states = [initial_noise(3, (n, 2, 8, 8), first=first) for first, n in spans]
    for index, step in enumerate(steps.steps):
        for i, (first, _) in enumerate(spans):
            output = denoise(states[i], step.timestep) * np.float32(factor)
            states[i] = steps.advance(index, states[i], output, seeded_noise(3, first=first))
    return states


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.6), ("ddpm", 0.0)])
def test_stepping_from_outside_is_sampling_to_the_last_bit(sampler: str, eta: float, corrected: bool) -> None:
    schedule = Schedule.named("ddpm-linear")
    deployment, correction = planted(schedule, sampler, eta, spread=0.1)
    table = correction if corrected else None
    start = initial_noise(3, SHAPE)
    whole = sample(denoise, start, schedule, deployment, noise=seeded_noise(3), correction=table)
    np.testing.assert_array_equal(np.concatenate(walk_outside(deployment, table)), whole)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(np.concatenate(walk_outside(deployment, table, factor=1.01)), whole)


def test_a_step_refuses_what_the_loop_refuses() -> None:
    schedule = Schedule.named("ddpm-linear")
    steps = stepper(schedule, Deployment.of(schedule, "ddpm", 5))
    x = initial_noise(1, SHAPE)
    with pytest.raises(InputError, match="need noise"):
        steps.advance(0, x, x)
    with pytest.raises(InputError, match="the denoiser returned"):
        steps.advance(0, x, x[:1], seeded_noise(1))
    scratch = np.empty_like(x)
    with_scratch = steps.advance(0, x, x, seeded_noise(1), scratch=scratch)
    np.testing.assert_array_equal(with_scratch, steps.advance(0, x, x, seeded_noise(1)))
    assert not np.shares_memory(with_scratch, scratch)
