"""The scalars of a step, against their meaning; test_samplers.py has them against diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mezzotint.runtime.correction import Correction
from mezzotint.runtime.errors import InputError, TimestepNotDeployed
from mezzotint.runtime.samplers import Images, StepInfo, ddim, ddpm, initial_noise, seeded_noise
from mezzotint.runtime.schedule import Schedule
from mezzotint.runtime.steps import ddim_coefficients, ddpm_coefficients

SHAPE = (3, 2, 8, 8)


def spread_of(schedule: Schedule, sampler: str, eta: float, spread: float) -> Correction:
    return Correction(
        timesteps=schedule.timesteps(10),
        slope=np.zeros(10),
        bias=np.zeros((10, 2)),
        spread=np.full(10, spread),
        sampler=sampler,
        steps=10,
        eta=eta,
    )


def test_any_list_of_timesteps_ends_each_step_where_the_next_begins() -> None:
    schedule = Schedule.named("ddpm-linear")
    bars = [*schedule.alphas_cumprod[[300, 40]], 1.0]
    found = ddim_coefficients(schedule, [700, 300, 40])
    assert [step.from_image**2 for step in found] == pytest.approx(bars, rel=1e-12)


def test_the_gain_is_the_derivative() -> None:
    schedule = Schedule.from_config({"beta_schedule": "linear", "clip_sample": False})
    shift = 0.5

    def state(run: Any, value: float) -> Images:
        states: list[Images] = []

        def constant(x: Images, t: int) -> Images:
            return np.full_like(x, value)

        def keep(info: StepInfo) -> None:
            states.append(info.x_next)

        run(constant, initial_noise(3, SHAPE), schedule, [600, 500], noise=seeded_noise(1), callback=keep)
        return states[0]

    for find, run in ((ddim_coefficients, ddim), (ddpm_coefficients, ddpm)):
        gain = find(schedule, [600, 500])[0].gain
        moved = float((state(run, 0.1 + shift) - state(run, 0.1)).mean())
        assert moved == pytest.approx(gain * shift, rel=1e-4)
        assert moved != pytest.approx(gain * shift * 1.01, rel=1e-4)


def test_too_much_error_makes_a_step_deterministic() -> None:
    schedule = Schedule.named("ddpm-linear")
    correction = spread_of(schedule, "ddpm", 0.0, spread=100.0)
    for step in ddpm_coefficients(schedule, schedule.timesteps(10), correction=correction)[:-1]:
        assert step.noise == 0.0
        assert step.sigma > 0.0


def test_direction_keeps_the_sigma_of_the_schedule() -> None:
    schedule = Schedule.named("ddpm-linear")
    correction = spread_of(schedule, "ddim", 1.0, spread=0.05)
    plain = ddim_coefficients(schedule, schedule.timesteps(10), eta=1.0)
    shrunk = ddim_coefficients(schedule, schedule.timesteps(10), eta=1.0, correction=correction)
    for one, other in zip(plain[:-2], shrunk[:-2], strict=True):  # the last two have too little noise to give
        assert (one.from_out, one.sigma) == (other.from_out, other.sigma)
        assert other.noise**2 == pytest.approx(one.sigma**2 - (one.gain * 0.05) ** 2, rel=1e-9)
        assert other.noise**2 != pytest.approx(one.sigma**2 - (one.gain * 0.05 * 1.01) ** 2, rel=1e-9)
        assert 0 < other.noise < one.noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_gains_are_those_of_the_papers(prediction: str) -> None:
    """PTQD's coefficient of epsilon, and what it becomes where x = sqrt(a) x0 + sqrt(1 - a) epsilon."""
    schedule = Schedule.from_config({"beta_schedule": "linear", "prediction_type": prediction})
    bar, bar_next = schedule.alphas_cumprod[[600, 500]]
    step = ddim_coefficients(schedule, [600, 500], eta=0.7)[0]
    epsilon = np.sqrt(1 - bar_next - step.sigma**2) - np.sqrt(bar_next * (1 - bar) / bar)
    per_output = {"epsilon": 1.0, "v_prediction": np.sqrt(bar), "sample": -np.sqrt(bar / (1 - bar))}[prediction]
    assert step.gain == pytest.approx(epsilon * per_output, rel=1e-9)
    assert step.gain != pytest.approx(epsilon * per_output * 1.01, rel=1e-9)
    alpha = bar / bar_next
    ancestral = -(1 - alpha) / np.sqrt(alpha * (1 - bar))
    assert ddpm_coefficients(schedule, [600, 500])[0].gain == pytest.approx(ancestral * per_output, rel=1e-9)


def test_refusals() -> None:
    schedule = Schedule.named("ddpm-linear")
    with pytest.raises(InputError, match="not a falling list"):
        ddpm_coefficients(schedule, [10, 20])
    with pytest.raises(InputError, match=r"eta is -0\.1"):
        ddim_coefficients(schedule, [20, 10], eta=-0.1)
    with pytest.raises(TimestepNotDeployed, match="2 of 2 steps are missing"):
        ddim_coefficients(schedule, [20, 10], correction=spread_of(schedule, "ddim", 0.0, 0.1))
