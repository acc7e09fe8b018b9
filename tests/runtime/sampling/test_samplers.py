"""The loop: noise, callbacks, corrections, steps taken from outside. test_solvers.py has it against diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from mezzotint.runtime.errors import InputError, TimestepNotDeployed
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import SAMPLERS, Deployment
from mezzotint.runtime.sampling.samplers import StepInfo, Stepper, initial_noise, run_solver, sample, seeded_noise
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.solvers import ddim, ddpm
from mezzotint.runtime.sampling.steps import Solver
from mezzotint.runtime.signature import Images, Timestep

SHAPE = (3, 2, 8, 8)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
CLIPPED = {"beta_schedule": "linear", "clip_sample": True}


def denoise(x: Images, t: Timestep) -> Images:
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


# What test_solvers.py does not ask: sizes of the noise that are options, a range to clip to, all timesteps.
NOISY: list[tuple[str, dict[str, Any], float, int]] = [
    ("ddim", {**CLIPPED, "clip_sample_range": 1.5, "timestep_spacing": "trailing"}, 0.6, 7),
    ("ddim", {"beta_schedule": "linear", "steps_offset": 1, "set_alpha_to_one": False}, 0.6, 7),
    ("ddim", {**CLIPPED, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, 1.0, 7),
    ("ddpm", {**CLIPPED, "variance_type": "fixed_small_log"}, 0.0, 9),
    ("ddpm", {**CLIPPED, "variance_type": "fixed_large"}, 0.0, 9),
    ("ddpm", {**CLIPPED, "variance_type": "fixed_large", "prediction_type": "sample"}, 0.0, 9),
    # In float32 diffusers loses digits in 1 - abar[t] / abar[t-1], 5e-5 in all; in float64 it agrees with us.
    ("ddpm", {"beta_schedule": "linear", "num_train_timesteps": 200}, 0.0, 200),
]


@pytest.mark.parametrize(("sampler", "config", "eta", "steps"), NOISY, ids=str)
def test_options_are_those_of_diffusers(sampler: str, config: dict[str, Any], eta: float, steps: int) -> None:
    kind: Any = DDIMScheduler if sampler == "ddim" else DDPMScheduler
    options = {"eta": eta} if sampler == "ddim" else {}
    theirs = reference(kind, config, steps, seed=5, exact=steps == 200, **options)
    schedule = Schedule.from_config(config)
    deployment = Deployment.of(schedule, sampler, steps, eta)
    ours = sample(denoise, initial_noise(1, SHAPE), schedule, deployment, noise=torch_noise(5))
    check_images(ours, theirs)
    with pytest.raises(AssertionError):
        check_images(ours * np.float32(1.01), theirs)


def planted(
    schedule: Schedule, sampler: str, eta: float = 0.0, spread: float = 0.05, *, steps: int = 10
) -> tuple[Deployment, Correction]:
    """Tables that undo outputs which are 1.1 (w + 0.05 + noise of this spread)."""
    deployment = Deployment.of(schedule, sampler, steps, eta)
    calls = deployment.solver(schedule).steps
    n = len(calls)
    correction = Correction(
        deployment,
        schedule.prediction,
        "ptqd",
        stages=np.array([call.stage for call in calls]),
        scale=np.full(n, 1 / 1.1),
        shift=np.full((n, 2), 0.05),
        excess=np.full(n, spread**2),
        spread=np.full(n, spread),
    )
    return deployment, correction


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("ddpm", 0.0), ("euler-ancestral", 0.0)])
def test_correction_keeps_mean_and_variance_of_the_schedule(sampler: str, eta: float) -> None:
    """The float step's state has variance sigma^2 around its mean; the corrected noisy one must have the same."""
    schedule = Schedule.from_config({"beta_schedule": "linear", "clip_sample": False})
    deployment, correction = planted(schedule, sampler, eta, spread=0.4, steps=20)
    solver, index, shape = deployment.solver(schedule), 8, (256, 2, 32, 32)
    assert solver.steps[index].sigma > 0
    x = np.zeros(shape, dtype=np.float32)
    error = initial_noise(77, shape) * np.float32(0.4)
    signal = np.float32(0.3)
    outputs = {True: np.full_like(x, signal), False: np.float32(1.1) * (signal + np.float32(0.05) + error)}

    def after(exact: bool, table: Correction | None) -> Images:
        return Stepper(solver, table).advance(index, {"x": x}, outputs[exact], seeded_noise(5))["x"]

    wanted, got, plain = after(True, None), after(False, correction), after(False, None)
    assert not correction.clamped(solver.steps)[index]
    assert got.std() == pytest.approx(wanted.std(), rel=4e-3)
    assert got.mean() == pytest.approx(wanted.mean(), abs=2e-3)
    assert plain.std() != pytest.approx(wanted.std(), rel=4e-3)
    assert got.std() * 1.01 != pytest.approx(wanted.std(), rel=4e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_correction_undoes_what_was_planted(sampler: str) -> None:
    schedule = Schedule.from_config(FLOW if sampler == "flow-euler" else CLIPPED)
    deployment, correction = planted(schedule, sampler, spread=0.0)
    x, noise = initial_noise(1, SHAPE), seeded_noise(3)

    def worse(x: Images, t: Timestep, slope: float = 0.1) -> Images:
        return np.asarray((denoise(x, t) + 0.05) * (1 + slope), dtype=np.float32)

    wanted = sample(denoise, x, schedule, deployment, noise=noise)
    check_images(sample(worse, x, schedule, deployment, noise=noise, correction=correction), wanted)

    def worse_still(x: Images, t: Timestep) -> Images:
        return worse(x, t, slope=0.111)

    for denoiser, table in ((worse, None), (worse_still, correction)):
        with pytest.raises(AssertionError):
            check_images(sample(denoiser, x, schedule, deployment, noise=noise, correction=table), wanted)


def test_callback_sees_every_step_and_may_keep_it() -> None:
    schedule = Schedule.named("ddpm-linear")
    infos: list[StepInfo] = []
    copies: list[Images] = []

    def keep(info: StepInfo) -> None:
        infos.append(info)
        copies.append(info.x_next.copy())

    x = initial_noise(1, SHAPE)
    before = x.copy()
    final = run_solver(denoise, x, ddpm(schedule, schedule.timesteps(5)), noise=seeded_noise(1), callback=keep)
    assert [info.index for info in infos] == [0, 1, 2, 3, 4]
    assert [info.timestep for info in infos] == schedule.timesteps(5).tolist()
    assert infos[0].x is x
    assert all(info.state["x"] is info.x for info in infos)
    assert infos[-1].x_next is final
    np.testing.assert_array_equal(x, before)
    for info, copy, following in zip(infos, copies, [*infos[1:], None], strict=True):
        np.testing.assert_array_equal(info.x_next, copy)
        np.testing.assert_array_equal(info.output, denoise(info.x, info.timestep))
        assert following is None or following.x is info.x_next


@pytest.mark.parametrize("sampler", ["heun", "dpmpp-2m-sde", "pndm"])
def test_the_state_before_a_call_makes_the_one_behind_it(sampler: str) -> None:
    """What fit_noise relies on: the step can be made again from what the callback was given."""
    schedule = Schedule.from_config(CLIPPED)
    deployment = Deployment.of(schedule, sampler, 6)
    stepper, noise = Stepper(deployment.solver(schedule)), seeded_noise(4)
    differ: list[bool] = []

    def again(info: StepInfo) -> None:
        found = stepper.advance(info.index, info.state, info.output, noise)["x"]
        np.testing.assert_array_equal(found, info.x_next)
        other = stepper.advance(info.index, info.state, info.output * np.float32(1.01), noise)["x"]
        differ.append(not np.array_equal(other, info.x_next))

    sample(denoise, initial_noise(1, SHAPE), schedule, deployment, noise=noise, callback=again)
    assert sum(differ) > len(differ) / 2  # not where all is clipped


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
    for solver in (ddim(schedule, steps, eta=0.5), ddim(schedule, steps, eta=1.0), ddpm(schedule, steps)):
        with pytest.raises(InputError, match="adds noise at each step") as caught:
            run_solver(denoise, x, solver)
        assert caught.value.hint == "pass noise=seeded_noise(seed)"
    with pytest.raises(InputError, match="eta is 2"):
        ddim(schedule, steps, eta=2.0)
    for broken in ([], [10, 20], [20, 20], [1000, 3], [5, -1]):
        with pytest.raises(InputError, match="not a falling list"):
            ddim(schedule, broken)
    quiet = ddim(schedule, steps)
    wrongs: list[Any] = [x.astype(np.float64), x[0, 0, 0]]
    for wrong in wrongs:
        with pytest.raises(InputError, match="sampling begins with float32"):
            run_solver(denoise, wrong, quiet)
    with pytest.raises(InputError, match="the denoiser returned float32"):
        run_solver(lambda x, t: x[:, :1], x, quiet)
    with pytest.raises(InputError, match="the denoiser returned float64"):
        run_solver(lambda x, t: x.astype(np.float64), x, quiet)
    with pytest.raises(InputError, match="must not be negative"):
        initial_noise(-1, SHAPE)
    _, correction = planted(schedule, "ddim", 0.0, spread=0.1)
    with pytest.raises(TimestepNotDeployed, match="rows for other network calls than these 7"):
        run_solver(denoise, x, ddim(schedule, schedule.timesteps(7)), correction=correction)


class Counted(np.ndarray[Any, np.dtype[np.float32]]):
    """An array that counts the operations which read or write it."""

    operations = 0

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **more: Any) -> Any:
        Counted.operations += 1
        plain = [a.view(np.ndarray) if isinstance(a, Counted) else a for a in inputs]
        target = None if out is None else tuple(a.view(np.ndarray) for a in out)
        result = getattr(ufunc, method)(*plain, out=target, **more)
        return result.view(Counted) if isinstance(result, np.ndarray) else result


@pytest.mark.parametrize(("sampler", "most"), [("ddpm", 10), ("ddim", 8), ("pndm", 14)])
def test_the_loop_does_few_operations_for_each_call(sampler: str, most: int) -> None:
    """The work outside the network is a handful of operations over the batch, whatever the machine does besides."""
    schedule = Schedule.named("ddpm-linear")
    solver = Deployment.of(schedule, sampler, 20).solver(schedule)
    x = initial_noise(1, (2, 1, 8, 8)).view(Counted)
    Counted.operations = 0
    run_solver(lambda x, t: x, x, solver, noise=seeded_noise(1))
    assert 2 <= Counted.operations / len(solver.steps) <= most


def walk_outside(solver: Solver, correction: Correction | None, factor: float = 1.0) -> list[Images]:
    """Two batches of the images 0, 1, 2 advanced side by side, the loop on the caller's side."""
    stepper = Stepper(solver, correction)
    spans = ((0, 2), (2, 1))
    states = [stepper.begin(initial_noise(3, (n, 2, 8, 8), first=first)) for first, n in spans]
    for index, step in enumerate(solver.steps):
        for i, (first, _) in enumerate(spans):
            output = denoise(states[i]["x"], step.timestep) * np.float32(factor)
            states[i] = stepper.advance(index, states[i], output, seeded_noise(3, first=first))
    return [state["x"] for state in states]


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stepping_from_outside_is_sampling_to_the_last_bit(sampler: str, corrected: bool) -> None:
    schedule = Schedule.from_config(FLOW if sampler == "flow-euler" else CLIPPED)
    deployment, correction = planted(schedule, sampler, 0.6 if sampler == "ddim" else 0.0, spread=0.1)
    table, solver = correction if corrected else None, deployment.solver(schedule)
    start = initial_noise(3, SHAPE)
    whole = sample(denoise, start, schedule, deployment, noise=seeded_noise(3), correction=table)
    np.testing.assert_array_equal(np.concatenate(walk_outside(solver, table)), whole)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(np.concatenate(walk_outside(solver, table, factor=1.01)), whole)


def test_the_first_state_is_scaled_as_the_solver_says() -> None:
    schedule = Schedule.named("sd")
    x = initial_noise(1, SHAPE)
    euler = Deployment.of(schedule, "euler", 5).solver(schedule)
    lower = Deployment.of(Schedule.from_config({**schedule.config, "timestep_spacing": "linspace"}), "euler", 5)
    assert Stepper(Deployment.of(schedule, "ddim", 5).solver(schedule)).begin(x)["x"] is x
    for start in (1.0, 0.9):
        np.testing.assert_array_equal(Stepper(Solver(euler.steps, start)).begin(x)["x"], x * np.float32(start))
    assert lower.solver(Schedule.from_config({**schedule.config, "timestep_spacing": "linspace"})).start < 1.0


def test_a_step_refuses_what_the_loop_refuses() -> None:
    schedule = Schedule.named("ddpm-linear")
    stepper = Stepper(Deployment.of(schedule, "ddpm", 5).solver(schedule))
    x = initial_noise(1, SHAPE)
    state = stepper.begin(x)
    with pytest.raises(InputError, match="adds noise at each step") as caught:
        stepper.advance(0, state, x)
    assert caught.value.where == "timestep 800"
    with pytest.raises(InputError, match="the denoiser returned"):
        stepper.advance(0, state, x[:1], seeded_noise(1))
    scratch = np.empty_like(x)
    with_scratch = stepper.advance(0, state, x, seeded_noise(1), scratch=scratch)["x"]
    np.testing.assert_array_equal(with_scratch, stepper.advance(0, state, x, seeded_noise(1))["x"])
    assert not np.shares_memory(with_scratch, scratch)
