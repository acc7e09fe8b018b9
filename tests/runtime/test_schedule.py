"""Schedules against diffusers', number by number, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.runtime.deployment import Deployment
from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.schedule import NAMED, Schedule

BETAS = [0.01, 0.02, 0.05, 0.2]
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    "trained": {"trained_betas": BETAS, "num_train_timesteps": 4},
    "zero_snr": {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "not_to_one": {"beta_schedule": "linear", "set_alpha_to_one": False},
}


def check_alphas(ours: np.ndarray[Any, np.dtype[np.float64]], config: dict[str, Any]) -> None:
    theirs = DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("name", CONFIGS)
def test_alphas_are_those_of_diffusers(name: str) -> None:
    schedule = Schedule.from_config(CONFIGS[name])
    check_alphas(schedule.alphas_cumprod, CONFIGS[name])
    final = float(DDIMScheduler.from_config(CONFIGS[name]).final_alpha_cumprod)
    assert schedule.final_alpha_cumprod == pytest.approx(final, rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_alphas_with_one_percent_error_are_noticed(name: str) -> None:
    with pytest.raises(AssertionError):
        check_alphas(Schedule.from_config(CONFIGS[name]).alphas_cumprod * 1.01, CONFIGS[name])


def test_sigmoid_is_that_of_ddpm() -> None:
    config = {"beta_schedule": "sigmoid"}
    theirs = DDPMScheduler.from_config(config).alphas_cumprod.numpy()
    np.testing.assert_allclose(Schedule.from_config(config).alphas_cumprod, theirs, rtol=2e-5, atol=1e-7)


@given(
    steps=st.integers(1, 1000),
    spacing=st.sampled_from(["leading", "trailing", "linspace"]),
    kind=st.sampled_from([DDIMScheduler, DDPMScheduler]),
)
def test_timesteps_are_those_of_diffusers(steps: int, spacing: str, kind: Any) -> None:
    config = {"beta_schedule": "linear", "timestep_spacing": spacing}
    theirs = kind.from_config(config)
    theirs.set_timesteps(steps)
    # Where float rounding gives diffusers one timestep too many, that is -1, which no network has seen.
    wanted = theirs.timesteps.numpy()
    np.testing.assert_array_equal(Schedule.from_config(config).timesteps(steps), wanted[wanted >= 0])


def test_timesteps_with_an_offset() -> None:
    schedule = Schedule.named("sd")
    theirs = DDIMScheduler.from_config(schedule.config)
    theirs.set_timesteps(50)
    np.testing.assert_array_equal(schedule.timesteps(50), theirs.timesteps.numpy())
    assert schedule.timesteps(50)[-1] == 1
    with pytest.raises(ScheduleError, match="begin at timestep 1000"):
        schedule.timesteps(1000)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps(steps: int) -> None:
    with pytest.raises(ScheduleError, match="not possible"):
        Schedule.named("ddpm-linear").timesteps(steps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_schedule": "exotic"}, "unknown beta_schedule 'exotic'"),
        ({"prediction_type": "flow_prediction"}, "unknown prediction_type"),
        ({"timestep_spacing": "random"}, "unknown timestep_spacing"),
        ({"variance_type": "learned_range"}, "unknown variance_type"),
        ({"thresholding": True}, "dynamic thresholding"),
        ({"rescale_betas_zero_snr": True}, "no signal"),
        ({"trained_betas": BETAS}, r"shape \[4\], num_train_timesteps is 1000"),
        ({"trained_betas": ["a"], "num_train_timesteps": 1}, "not numbers"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "between 0 and 1"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, "between 0 and 1"),
        ({"trained_betas": [1e-12, 1e-12], "num_train_timesteps": 2}, "does not fall"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps is 'many'"),
        ({"num_train_timesteps": 1, "rescale_betas_zero_snr": True}, "one timestep"),
        ({"clip_sample": "false"}, "not true or false"),
        ({"clip_sample_range": -1}, "not a number above 0"),
        ({"steps_offset": -1}, "steps_offset is -1"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "not a schedule of betas"),
    ],
)
def test_refused_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        Schedule.from_config({"beta_schedule": "linear", **change}, where="somewhere.json")
    assert caught.value.where == "somewhere.json"


def test_without_betas() -> None:
    with pytest.raises(ScheduleError, match="not a schedule of betas"):
        Schedule.from_config({"shift": 3.0})


@pytest.mark.parametrize("name", NAMED)
def test_named_schedules_survive_their_configuration(name: str, tmp_path: Path) -> None:
    schedule = Schedule.named(name)
    folder = tmp_path / "scheduler"
    folder.mkdir()
    (folder / "scheduler_config.json").write_text(json.dumps(schedule.config), encoding="utf-8")
    for place in (tmp_path, folder, folder / "scheduler_config.json"):
        loaded = Schedule.load(place)
        assert loaded == schedule
        assert hash(loaded) == hash(schedule)
        assert loaded.config == schedule.config


def test_digest_is_about_meaning() -> None:
    plain = Schedule.from_config({"beta_schedule": "linear"})
    spelled = Schedule.from_config({"beta_schedule": "linear", "beta_end": 0.02, "_diffusers_version": "1"})
    other = Schedule.from_config({"beta_schedule": "linear", "beta_end": 0.0202})
    assert plain.digest() == spelled.digest() != other.digest()
    assert plain != Schedule.from_config({"beta_schedule": "linear", "clip_sample": False})


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="no scheduler configuration"):
        Schedule.load(tmp_path)
    file = tmp_path / "scheduler_config.json"
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ScheduleError, match="not readable JSON"):
        Schedule.load(tmp_path)
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(ScheduleError, match="not a JSON object"):
        Schedule.load(file)
    with pytest.raises(ScheduleError, match="no built-in schedule"):
        Schedule.named("none")


def test_deployment_survives_json() -> None:
    deployment = Deployment.of(Schedule.named("cosine"), "ddim", 20, 0.5)
    assert deployment.timesteps[0] == 950
    assert deployment.timesteps[-1] == 0
    assert Deployment.from_json(json.loads(json.dumps(deployment.to_json()))) == deployment


@pytest.mark.parametrize(
    ("sampler", "steps", "eta", "message"),
    [
        ("euler", 10, 0.0, "unknown sampler"),
        ("ddim", 10, 1.5, "eta is 1.5"),
        ("ddim", 10, float("nan"), "eta is nan"),
        ("ddpm", 10, 0.5, "ddpm has no eta"),
        ("ddim", 0, 0.0, "not possible"),
    ],
)
def test_refused_deployments(sampler: str, steps: int, eta: float, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Deployment.of(Schedule.named("ddpm-linear"), sampler, steps, eta)


def test_malformed_deployments() -> None:
    good = Deployment.of(Schedule.named("ddpm-linear"), "ddim", 4).to_json()
    for broken in ({**good, "steps": 5}, {**good, "timesteps": ["x"]}, {"sampler": "ddim"}):
        with pytest.raises(ScheduleError):
            Deployment.from_json(broken)
