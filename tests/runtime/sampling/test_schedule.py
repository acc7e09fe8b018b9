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

from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.sampling.deployment import Deployment, usual_sampler
from mezzotint.runtime.sampling.samplers import initial_noise, sample
from mezzotint.runtime.sampling.schedule import NAMED_SCHEDULES, SAMPLER_OPTIONS, Schedule
from mezzotint.runtime.signature import Images, Predict, Timestep

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
        ({"prediction_type": "noise"}, "unknown prediction_type"),
        ({"prediction_type": "flow_prediction"}, "needs a schedule of flow matching"),
        ({"timestep_spacing": "random"}, "unknown timestep_spacing"),
        ({"variance_type": "learned_by_heart"}, "unknown variance_type"),
        ({"thresholding": True}, "thresholding True is not supported"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas True"),
        ({"snr_shift_scale": 3.0}, "snr_shift_scale 3.0"),
        ({"sigma_data": 0.5}, "the key 'sigma_data' is not known"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is 1000000000"),
        ({"alphas_cumprod": [0.9, 0.5]}, "alphas_cumprod and beta_schedule both"),
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
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift is 0"),
        ({"beta_schedule": "linear", "use_dynamic_shifting": True}, "use_dynamic_shifting True"),
        ({"beta_schedule": "linear", "shift_terminal": 0.1}, "shift_terminal 0.1"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "epsilon"}, "epsilon"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas True"),
    ],
)
def test_refused_configurations(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        Schedule.from_config({"beta_schedule": "linear", **change}, where="somewhere.json")
    assert caught.value.where == "somewhere.json"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5, 0.9], "does not fall"),
        ([0.9, -0.1], "does not fall"),
        ([0.9, float("nan")], "does not fall"),
        ([[0.9]], r"shape \[1, 1\]"),
        ([], r"shape \[0\]"),
        ("all", "not numbers"),
    ],
)
def test_refused_alphas(values: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.from_config({"alphas_cumprod": values})


def test_alphas_alone_are_a_schedule(tmp_path: Path) -> None:
    """The samplers do the same with the products of the betas as with the betas."""
    known = Schedule.named("cosine:60")
    assert (known.num_train_timesteps, len(known.alphas_cumprod)) == (60, 60)
    config = {key: value for key, value in known.config.items() if key != "beta_schedule"}
    given = Schedule.from_config(
        {**config, "num_train_timesteps": None, "alphas_cumprod": known.alphas_cumprod.tolist()}
    )
    assert given == known
    assert usual_sampler(given) == "ddim" and Schedule.named("flow:500").last_timestep == 500
    for name in ("cosine:0", "cosine:-1", "cosine:", "cosine:x", "cosine:6_0", "cosine:9999999999", "sine:60"):
        with pytest.raises(ScheduleError):
            Schedule.named(name)


@pytest.mark.parametrize("name", ["sd", "flow"])
def test_the_prediction_of_a_network_changes_the_samplers(name: str) -> None:
    """A network that predicts the image gives the same picture as one that predicts the same by noise or velocity."""
    schedule = Schedule.named(name)
    noise = initial_noise(1, (1, 2, 4, 4))

    def image(x: Images, t: Timestep) -> Images:
        moved: Images = np.tanh(x + np.float32(t / 500)).astype(np.float32)
        return moved

    def own(x: Images, t: Timestep) -> Images:
        share, sigma = schedule.levels(t)
        pure = (x - share * image(x, t)) / sigma
        return np.asarray(pure if name == "sd" else pure - image(x, t), np.float32)

    def drawn(kind: str | None, network: Predict) -> Images:
        other = schedule.predicting(kind)
        return sample(network, noise, other, Deployment.of(other, usual_sampler(other), 9))

    want = drawn(None, own)
    np.testing.assert_allclose(drawn("sample", image), want, atol=1e-4)
    if name == "flow":
        np.testing.assert_allclose(drawn("reversed_flow_prediction", lambda x, t: -own(x, t)), want, atol=1e-4)
    with pytest.raises(ScheduleError, match="prediction"):
        schedule.predicting("flow_prediction" if name == "sd" else "epsilon")
    assert not np.allclose(drawn("sample", own), want, atol=1e-2)


def test_without_betas() -> None:
    with pytest.raises(ScheduleError, match=r"neither a schedule of betas .* nor one of flow matching"):
        Schedule.from_config({"shift": 3.0})


@pytest.mark.parametrize("name", NAMED_SCHEDULES)
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


def test_levels_are_the_shares_of_image_and_noise() -> None:
    schedule = Schedule.named("sd")
    for t in (0, 37, 999):
        assert schedule.levels(t)[0] == pytest.approx(np.sqrt(schedule.alphas_cumprod[t]), rel=1e-9)
        assert np.hypot(*schedule.levels(t)) == pytest.approx(1.0, rel=1e-12)
    between = schedule.levels(37.5)
    ratios = [noise / image for image, noise in (schedule.levels(37), between, schedule.levels(38))]
    assert ratios[1] == pytest.approx((ratios[0] + ratios[2]) / 2, rel=1e-9)
    assert ratios[1] != pytest.approx(ratios[0], rel=1e-4)
    flow = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert flow.levels(1000) == (0.0, 1.0)
    assert flow.levels(250) == (0.75, 0.25)


def test_flow_matching_is_read() -> None:
    flow = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    assert (flow.flow, flow.shift, flow.prediction, flow.last_timestep) == (True, 3.0, "flow_prediction", 1000)
    assert usual_sampler(flow) == "flow-euler"
    assert flow != Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    betas = Schedule.named("sd")
    assert (betas.flow, betas.last_timestep, usual_sampler(betas)) == (False, 999, "ddim")


@pytest.mark.parametrize(
    "option", [{"use_karras_sigmas": True}, {"solver_order": 1}, {"lambda_min_clipped": -5.1}, {"skip_prk_steps": True}]
)
def test_the_digest_knows_what_only_some_samplers_read(option: dict[str, Any]) -> None:
    plain = Schedule.from_config({"beta_schedule": "linear"})
    assert plain.digest() != Schedule.from_config({"beta_schedule": "linear", **option}).digest()
    (name,) = option
    usual = {"beta_schedule": "linear", name: SAMPLER_OPTIONS[name]}
    assert plain.digest() == Schedule.from_config(usual).digest()


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", 1.0), ("heun", 7.5), ("dpmpp-2m-sde", 1.0)])
def test_deployments_survive_json(sampler: str, guidance: float) -> None:
    schedule = Schedule.named("sd")
    deployment = Deployment.of(schedule, sampler, 20, 0.5 if sampler == "ddim" else 0.0, guidance)
    again = Deployment.from_json(json.loads(json.dumps(deployment.to_json())))
    assert again == deployment
    assert [type(t) for t in again.calls] == [type(t) for t in deployment.calls]
    assert again.solver(schedule) == deployment.solver(schedule)
    assert again.guided == (guidance != 1.0)


def test_what_a_deployment_says() -> None:
    schedule = Schedule.named("cosine")
    ddim = Deployment.of(schedule, "ddim", 20, 0.5)
    assert (ddim.calls[0], ddim.calls[-1]) == (950, 0)
    assert ddim.timesteps == ddim.calls
    assert (str(ddim), ddim.whole, ddim.guided) == ("ddim, 20 steps, eta 0.5", True, False)
    pndm = Deployment.of(Schedule.from_config({"beta_schedule": "linear", "skip_prk_steps": True}), "pndm", 10)
    assert (len(pndm.calls), len(pndm.timesteps)) == (11, 10)
    assert pndm.calls[1] == pndm.calls[2]
    assert str(Deployment.of(schedule, "heun", 3, guidance=4.0)) == "heun, 3 steps, guidance 4"


@pytest.mark.parametrize(
    ("sampler", "steps", "eta", "guidance", "message"),
    [
        ("leapfrog", 10, 0.0, 1.0, "unknown sampler 'leapfrog'"),
        ("ddim", 10, 1.5, 1.0, "eta is 1.5"),
        ("ddim", 10, float("nan"), 1.0, "eta is nan"),
        ("ddpm", 10, 0.5, 1.0, "ddpm has no eta"),
        ("heun", 10, 0.5, 1.0, "heun has no eta"),
        ("ddim", 0, 0.0, 1.0, "not possible"),
        ("ddim", 10, 0.0, -1.0, "guidance is -1"),
        ("ddim", 10, 0.0, float("nan"), "guidance is nan"),
        ("ddim", 10, 0.0, float("inf"), "guidance is inf"),
    ],
)
def test_refused_deployments(sampler: str, steps: int, eta: float, guidance: float, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        Deployment.of(Schedule.named("ddpm-linear"), sampler, steps, eta, guidance)
    assert caught.value.hint


def test_malformed_deployments() -> None:
    good = Deployment.of(Schedule.named("ddpm-linear"), "ddim", 4).to_json()
    assert Deployment.from_json(good).steps == 4
    wrongs: list[dict[str, Any]] = [{"steps": 5}, {"calls": ["x"]}, {"calls": None}, {"sampler": "leapfrog"}]
    for wrong in [{**good, **change} for change in [*wrongs, {"guidance": None}]] + [{"sampler": "ddim"}]:
        with pytest.raises(ScheduleError):
            Deployment.from_json(wrong)
    for key in good:
        with pytest.raises(ScheduleError, match="malformed deployment"):
            Deployment.from_json({name: value for name, value in good.items() if name != key})
