"""The scalars of a step, against their meaning; test_solvers.py has them against diffusers."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.solvers import ddim, ddpm
from mezzotint.runtime.sampling.steps import Solver, Step, image_of, noise_of
from mezzotint.runtime.signature import Images, whole

SHAPE = (3, 2, 8, 8)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}


def states(*names: str) -> dict[str, Images]:
    return {name: initial_noise(i, SHAPE) for i, name in enumerate(names)}


@pytest.mark.parametrize("clip", [None, 0.7])
def test_a_step_is_its_formula(clip: float | None) -> None:
    step = Step(
        7,
        image_x=1.3,
        image_out=-0.4,
        next={"image": 0.5, "x": 0.2, "out": 0.1, "older": -0.3},
        keep={"older": {"out": 1.0}, "mixed": {"image": 0.25, "older": 2.0}, "same": {"base": 1.0}},
        clip=clip,
    )
    state, out = states("x", "older", "base"), initial_noise(9, SHAPE)
    before = {name: array.copy() for name, array in state.items()}
    found = step.advance(state, out, np.empty(SHAPE, np.float32))
    image = 1.3 * state["x"] - 0.4 * out
    image = image if clip is None else np.clip(image, -clip, clip)
    wanted = {
        "x": 0.5 * image + 0.2 * state["x"] + 0.1 * out - 0.3 * state["older"],
        "older": out,
        "mixed": 0.25 * image + 2.0 * state["older"],
        "same": state["base"],
    }
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(found[name] * np.float32(1.01), array, rtol=0, atol=1e-5)
    for name, array in before.items():
        np.testing.assert_array_equal(state[name], array)
    assert found["same"] is state["base"]  # nobody writes to a state again
    assert not np.shares_memory(found["older"], out), "the output is the denoiser's to reuse"


def test_x_is_a_new_array_even_where_nothing_changes() -> None:
    step = Step(7, 1.0, 0.0, {"x": 1.0})
    state = states("x")
    found = step.advance(state, state["x"], np.empty(SHAPE, np.float32))["x"]
    np.testing.assert_array_equal(found, state["x"])
    assert not np.shares_memory(found, state["x"])
    assert step.advance(state, state["x"], found)["x"] is not found
    nothing = Step(7, 1.0, 0.0, {"x": 0.0}).advance(state, state["x"], np.empty(SHAPE, np.float32))["x"]
    assert not nothing.any()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_gains_are_those_of_the_papers(prediction: str) -> None:
    """PTQD's coefficient of epsilon, and what it becomes where x = sqrt(a) x0 + sqrt(1 - a) epsilon."""
    schedule = Schedule.from_config({"beta_schedule": "linear", "prediction_type": prediction})
    bar, bar_next = schedule.alphas_cumprod[[600, 500]]
    step = ddim(schedule, [600, 500], eta=0.7).steps[0]
    epsilon = np.sqrt(1 - bar_next - step.sigma**2) - np.sqrt(bar_next * (1 - bar) / bar)
    per_output = {"epsilon": 1.0, "v_prediction": np.sqrt(bar), "sample": -np.sqrt(bar / (1 - bar))}[prediction]
    assert step.gain == pytest.approx(epsilon * per_output, rel=1e-9)
    assert step.gain != pytest.approx(epsilon * per_output * 1.01, rel=1e-9)
    alpha = bar / bar_next
    ancestral = -(1 - alpha) / np.sqrt(alpha * (1 - bar))
    assert ddpm(schedule, [600, 500]).steps[0].gain == pytest.approx(ancestral * per_output, rel=1e-9)


def outputs(prediction: str, image: Images, noise: Images, alpha: float, sigma: float) -> Images:
    """What a perfect network of each kind says."""
    return {
        "epsilon": noise,
        "v_prediction": np.float32(alpha) * noise - np.float32(sigma) * image,
        "sample": image,
        "flow_prediction": noise - image,
    }[prediction]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_a_perfect_network_tells_image_and_noise(prediction: str) -> None:
    if prediction == "flow_prediction":
        schedule, alpha, sigma = Schedule.from_config(FLOW), 0.25, 0.75
    else:
        schedule = Schedule.from_config({"beta_schedule": "linear", "prediction_type": prediction})
        alpha, sigma = 0.6, 0.8
    image, noise = initial_noise(1, SHAPE), initial_noise(2, SHAPE)
    x = np.float32(alpha) * image + np.float32(sigma) * noise
    out = outputs(prediction, image, noise, alpha, sigma)
    for of, wanted in ((image_of, image), (noise_of, noise)):
        by_x, by_out = of(schedule, alpha, sigma)
        np.testing.assert_allclose(by_x * x + by_out * out, wanted, rtol=0, atol=1e-5)
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(by_x * x + by_out * out * 1.01, wanted, rtol=0, atol=1e-5)


def test_no_signal_says_nothing_about_the_image() -> None:
    with pytest.raises(InputError, match="no signal left"):
        image_of(Schedule.named("sd"), 0.0, 1.0)


def test_whole_timesteps_are_integers() -> None:
    found = whole(np.array([999.0, 499.5, 0.0]))
    assert found == [999, 499.5, 0]
    assert [type(t) for t in found] == [int, float, int]
    assert Solver((Step(5, 1.0, 0.0, {}), Step(2.5, 1.0, 0.0, {}))).calls == (5, 2.5)
