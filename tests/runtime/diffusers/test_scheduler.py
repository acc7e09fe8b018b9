"""diffusers' schedulers with the correction of a bundle: held against our own sampling loop, and inside pipelines."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image

from mezzotint import compile_model
from mezzotint.diffusers import attach, correct, stand_in
from mezzotint.runtime.bundle.bundle import CORRECTION, SCHEDULER, Bundle
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.errors import InputError, InterpolatedCorrection, ScheduleError, TimestepNotDeployed
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import SAMPLERS, Deployment
from mezzotint.runtime.sampling.guidance import predictor
from mezzotint.runtime.sampling.samplers import StepInfo, initial_noise, sample
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Images, Signature, Timestep
from tests.helpers import pipelines
from tests.helpers.manifests import manifest_data
from tests.helpers.pipelines import SIDE, quiet

SHAPE = (2, 3, 8, 8)
TOLERANCE = 1e-4
"""Relative to the largest value of the state; float32 on both sides, the order of operations differs."""
FRACTIONS = (0.3, 0.0, 2.5)
"""Of the variance of the sampler's noise, what the planted error makes up for: some of it, nothing, more than all."""
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
V = {**STABLE, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SDE = {"algorithm_type": "sde-dpmsolver++"}


@dataclass(frozen=True)
class Case:
    """One way of sampling, by a scheduler of diffusers and by ours."""

    sampler: str
    kind: Any
    config: dict[str, Any]
    steps: int
    eta: float = 0.0

    @property
    def scheduler(self) -> Any:
        return self.kind.from_config(self.config)

    @property
    def timestep_options(self) -> dict[str, Any]:
        """What a pipeline hands to `set_timesteps`."""
        config = {**self.scheduler.config, "_class_name": self.kind.__name__}
        return Schedule.from_config(config).timestep_options(self.steps)

    @property
    def options(self) -> dict[str, Any]:
        """What a pipeline hands to `step` beside the generator."""
        return {"eta": self.eta} if self.sampler == "ddim" else {}


DYNAMIC = {"use_dynamic_shifting": True, "_image_tokens": 900, "_even_sigmas": True}
UNIPC: dict[str, Any] = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
CASES = {
    "ddim": Case("ddim", DDIMScheduler, {**STABLE, "set_alpha_to_one": False, "steps_offset": 1}, 6),
    "ddim-noise": Case("ddim", DDIMScheduler, LINEAR, 7, 1.0),
    "ddim-v": Case("ddim", DDIMScheduler, V, 5, 0.5),
    "ddpm": Case("ddpm", DDPMScheduler, LINEAR, 7),
    "ddpm-log": Case("ddpm", DDPMScheduler, {**LINEAR, "variance_type": "fixed_small_log"}, 7),
    "ddpm-large": Case("ddpm", DDPMScheduler, {**V, "variance_type": "fixed_large"}, 5),
    "euler": Case("euler", EulerDiscreteScheduler, STABLE, 7),
    "euler-leading": Case("euler", EulerDiscreteScheduler, {**V, "timestep_spacing": "leading"}, 7),
    "euler-ancestral": Case("euler-ancestral", EulerAncestralDiscreteScheduler, STABLE, 7),
    "euler-ancestral-v": Case("euler-ancestral", EulerAncestralDiscreteScheduler, V, 5),
    "heun": Case("heun", HeunDiscreteScheduler, STABLE, 5),
    "dpmpp-2m": Case("dpmpp-2m", DPMSolverMultistepScheduler, {**STABLE, "use_karras_sigmas": True}, 7),
    "dpmpp-2m-sde": Case("dpmpp-2m-sde", DPMSolverMultistepScheduler, {**STABLE, **SDE}, 7),
    "pndm": Case("pndm", PNDMScheduler, LINEAR, 6),
    "pndm-plms": Case("pndm", PNDMScheduler, {**STABLE, "skip_prk_steps": True, "steps_offset": 1}, 6),
    "lcm": Case("lcm", LCMScheduler, STABLE, 4),
    "flow-euler": Case("flow-euler", FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, 6),
    "flow-even": Case("flow-euler", FlowMatchEulerDiscreteScheduler, DYNAMIC, 6),
    "unipc": Case("unipc", UniPCMultistepScheduler, {**STABLE, "solver_order": 3}, 7),
    "unipc-flow": Case("unipc", UniPCMultistepScheduler, UNIPC, 7),
    "flow-noise": Case("flow-euler", FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, 6),
}
NOISY = ["ddim-noise", "ddim-v", "ddpm", "ddpm-log", "ddpm-large", "dpmpp-2m-sde", "euler-ancestral"]
NOISY += ["euler-ancestral-v", "flow-noise", "lcm"]


def table(
    deployment: Deployment, schedule: Schedule, *, channels: int = SHAPE[1], form: str = "regression"
) -> Correction:
    """Tables that differ for each call and channel; the noise by FRACTIONS in turn."""
    steps = deployment.solver(schedule).steps
    rng = np.random.default_rng(6)
    excess = [FRACTIONS[i % 3] * step.sigma**2 / step.gain**2 if step.gain else 0.0 for i, step in enumerate(steps)]
    return Correction(
        deployment,
        schedule.prediction,
        form,
        stages=np.array([step.stage for step in steps]),
        scale=rng.uniform(0.85, 1.1, len(steps)),
        shift=rng.normal(scale=0.05, size=(len(steps), channels)),
        excess=np.array(excess),
        spread=np.sqrt(excess),
    )


def planted(
    folder: Path, case: Case, *, guidance: float = 1.0, form: str = "regression", frozen: bool = False
) -> Bundle:
    """A bundle of that deployment with planted tables. It has files, but no network: that is handed in by the test."""
    folder.mkdir(exist_ok=True)
    case.scheduler.save_config((folder / SCHEDULER).parent)
    schedule = Schedule.load(folder)
    deployment = Deployment.of(schedule, case.sampler, case.steps, case.eta, guidance)
    table(deployment, schedule, form=form).save(folder / CORRECTION)
    signature = Signature("x", "t", "y", prediction=schedule.prediction)
    data = manifest_data(
        signature=signature.to_json(),
        deployment=deployment.to_json(),
        sample_shape=list(SHAPE[1:]),
        deployed_timesteps=list(deployment.timesteps) if frozen else None,
        files={CORRECTION: {"sha256": "", "bytes": 0}},
    )
    return Bundle(folder, Manifest.from_json(data, "planted"))


def network(x: Images, t: Timestep) -> Images:
    """Something smooth that depends on both, with outputs of the size of noise."""
    return np.asarray(0.8 * np.sin(1.3 * x + t / 300) + 0.1 * x, dtype=np.float32)


Options = Callable[[int], dict[str, Any]]


def driven(case: Case, scheduler: Any, each: Options, *, return_dict: bool = False) -> list[Images]:
    """The state behind each call, as a pipeline drives a scheduler, in the scale that the network sees."""
    scheduler.set_timesteps(**case.timestep_options)
    x = torch.from_numpy(initial_noise(1, SHAPE)) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    states = []
    for index, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(network(seen.numpy(), float(t)))
        found = scheduler.step(output, t, x, return_dict=return_dict, **case.options, **each(index))
        x = found.prev_sample if return_dict else found[0]
        assert x.dtype == torch.float32
        # These keep x / alpha.
        ratio = float(scheduler.sigmas[scheduler.step_index]) if case.sampler.startswith(("euler", "heun")) else 0.0
        states.append(x.numpy() / np.float32(np.hypot(1, ratio)))
    return states


def generated(generator: Any) -> Options:
    return lambda index: {"generator": generator}


def nothing(index: int) -> dict[str, Any]:
    return {}


def ours(case: Case, bundle: Bundle, draws: list[torch.Tensor], **changes: Any) -> list[Images]:
    """The same by our own loop, where call i has the noise draws[i]."""
    assert bundle.correction
    states: list[Images] = []

    def keep(info: StepInfo) -> None:
        states.append(info.x_next)

    sample(
        network,
        initial_noise(1, SHAPE),
        bundle.schedule,
        bundle.deployment,
        noise=lambda index, shape: draws[index].numpy(),
        correction=replace(bundle.correction, **changes),
        callback=keep,
    )
    return states


def draws_of(generator: torch.Generator | None, calls: int) -> list[torch.Tensor]:
    return [torch.randn(SHAPE, generator=generator) for _ in range(calls)]


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def apart(found: list[Images], wanted: list[Images]) -> float:
    """The largest difference of the states behind all calls, relative to the largest value of each."""
    assert len(found) == len(wanted)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted, strict=True))


class TestStates:
    """A corrected scheduler beside `samplers.sample` with the same tables and the same noise."""

    @pytest.mark.parametrize("name", CASES)
    def test_they_are_those_of_our_own_loop(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        bundle = planted(tmp_path, case)
        scheduler = case.scheduler
        takes = "generator" in inspect.signature(scheduler.step).parameters
        draws = draws_of(seeded(), len(bundle.deployment.calls))
        corrected = correct(scheduler, bundle)

        found = driven(case, corrected, generated(seeded()) if takes else nothing)
        again = driven(case, corrected, generated(seeded()) if takes else nothing, return_dict=True)

        assert bundle.correction
        assert apart(found, ours(case, bundle, draws)) < TOLERANCE
        for one, two in zip(found, again, strict=True):
            np.testing.assert_array_equal(one, two)
        # What it is for: without the correction, and with one that is 1 % other, the states are others.
        plain = driven(case, scheduler, generated(seeded()) if takes else nothing)
        assert apart(plain, found) > 100 * TOLERANCE
        for part in ("scale", "shift", *(["excess"] if name in NOISY else [])):
            other = ours(case, bundle, draws, **{part: getattr(bundle.correction, part) * 1.01})
            assert apart(found, other) > TOLERANCE, part

    def test_all_samplers_are_here(self) -> None:
        assert {case.sampler for case in CASES.values()} == set(SAMPLERS)

    @pytest.mark.parametrize("name", NOISY)
    def test_noise_was_lessened_and_clamped(self, tmp_path: Path, name: str) -> None:
        """The cases above are worth something."""
        bundle = planted(tmp_path, CASES[name])
        steps = bundle.deployment.solver(bundle.schedule).steps
        assert bundle.correction
        left = np.array(bundle.correction.noise(steps)) / [max(step.sigma, 1e-9) for step in steps]

        assert any(bundle.correction.clamped(steps))
        assert np.any((left > 0.8) & (left < 0.9))
        assert np.any(np.isclose(left, 1.0, rtol=1e-12))

    def test_timesteps_may_lie_between_training_timesteps(self, tmp_path: Path) -> None:
        assert not planted(tmp_path, CASES["euler"]).deployment.whole
        assert planted(tmp_path, CASES["euler-leading"]).deployment.whole


class TestGenerators:
    """Where the noise comes from."""

    @pytest.mark.parametrize("name", ["ddim-noise", "ddpm", "euler-ancestral", "dpmpp-2m-sde", "lcm", "flow-noise"])
    def test_the_global_one(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        bundle = planted(tmp_path, case)
        corrected = correct(case.scheduler, bundle)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            draws = draws_of(None, len(bundle.deployment.calls))
            torch.manual_seed(5)
            driven(case, case.scheduler, nothing)
            after = torch.get_rng_state()
            torch.manual_seed(5)
            found = driven(case, corrected, nothing)

            assert torch.equal(torch.get_rng_state(), after), "as many numbers are drawn as by the scheduler alone"
        assert apart(found, ours(case, bundle, draws)) < TOLERANCE
        assert apart(found, ours(case, bundle, draws_of(seeded(6), len(draws)))) > TOLERANCE

    @pytest.mark.parametrize("name", NOISY)
    @pytest.mark.parametrize("seeds", [(5, 6), (5, 5)])
    def test_one_for_each_picture(self, tmp_path: Path, name: str, seeds: tuple[int, int]) -> None:
        """One generator may stand in the list twice, and then draws for one picture after the other."""
        case = CASES[name]
        bundle = planted(tmp_path, case)

        def generators() -> list[torch.Generator]:
            made = {seed: seeded(seed) for seed in seeds}
            return [made[seed] for seed in seeds]

        mine, theirs, plain = generators(), generators(), generators()
        draws = [
            torch.cat([torch.randn((1, *SHAPE[1:]), generator=one) for one in mine]) for _ in bundle.deployment.calls
        ]

        found = driven(case, correct(case.scheduler, bundle), generated(theirs))
        driven(case, case.scheduler, generated(plain))

        assert apart(found, ours(case, bundle, draws)) < TOLERANCE
        assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(theirs, plain, strict=True))
        assert apart(found, ours(case, bundle, [one.flip(0) for one in draws])) > TOLERANCE

    @pytest.mark.parametrize("name", ["ddim-noise", "dpmpp-2m-sde"])
    def test_noise_that_is_handed_in(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        bundle = planted(tmp_path, case)
        draws = draws_of(seeded(), len(bundle.deployment.calls))
        before = torch.get_rng_state()

        found = driven(case, correct(case.scheduler, bundle), lambda index: {"variance_noise": draws[index]})

        assert apart(found, ours(case, bundle, draws)) < TOLERANCE
        assert apart(found, ours(case, bundle, draws[::-1])) > TOLERANCE
        assert torch.equal(torch.get_rng_state(), before)

    def test_arguments_by_position(self, tmp_path: Path) -> None:
        """eta, use_clipped_model_output, generator, variance_noise, return_dict of DDIM."""
        case = CASES["ddim-noise"]
        bundle = planted(tmp_path, case)
        corrected = correct(case.scheduler, bundle)
        found = driven(case, corrected, generated(seeded()))
        corrected.set_timesteps(case.steps)
        t, generator = corrected.timesteps[0], seeded()
        x = torch.from_numpy(initial_noise(1, SHAPE))
        output = torch.from_numpy(network(x.numpy(), float(t)))

        state = corrected.step(output, t, x, 1.0, None, generator, None, False)[0]

        np.testing.assert_array_equal(state.numpy(), found[0])


@pytest.fixture
def noisy(tmp_path: Path) -> Bundle:
    """Tables for DDIM with eta 1 and 7 steps; a step is possible at every timestep."""
    return planted(tmp_path / "noisy", CASES["ddim-noise"])


def step_of(scheduler: Any, t: Any, **options: Any) -> Any:
    """One step with an output of zeros."""
    x = torch.from_numpy(initial_noise(1, SHAPE))
    return scheduler.step(torch.zeros(SHAPE), t, x, return_dict=False, **options)[0]


class TestCorrect:
    """What `correct` makes, and what it and its scheduler refuse."""

    @pytest.mark.parametrize("name", CASES)
    def test_it_is_a_scheduler_of_the_same_class(self, tmp_path: Path, name: str) -> None:
        case = CASES[name]
        scheduler = case.scheduler
        before = dict(vars(scheduler))

        corrected = correct(scheduler, planted(tmp_path, case))

        assert type(corrected) is type(scheduler)
        assert isinstance(corrected, diffusers.SchedulerMixin)
        assert corrected.config == scheduler.config
        assert corrected.order == scheduler.order
        for method in ("step", "set_timesteps"):
            assert inspect.signature(getattr(corrected, method)) == inspect.signature(getattr(scheduler, method))
        corrected.set_timesteps(**case.timestep_options)
        assert vars(scheduler).keys() == before.keys()
        assert all(vars(scheduler)[key] is value for key, value in before.items()), "the other one is as it was"

    def test_correcting_twice_corrects_once(self, noisy: Bundle) -> None:
        case = CASES["ddim-noise"]
        once = correct(case.scheduler, noisy)

        twice = correct(once, noisy)

        states = [driven(case, one, generated(seeded())) for one in (once, twice)]
        assert apart(*states) == 0

    def test_a_deep_copy_is_a_scheduler_of_its_own(self, noisy: Bundle) -> None:
        case = CASES["ddim-noise"]
        corrected = correct(case.scheduler, noisy)
        corrected.set_timesteps(7)
        other = copy.deepcopy(corrected)

        with pytest.raises(InputError, match="no timesteps yet"):
            step_of(other, 999, eta=1.0)
        states = [driven(case, one, generated(seeded())) for one in (other, corrected)]
        assert apart(*states) == 0
        assert other.timesteps is not corrected.timesteps

    def test_it_can_be_saved(self, noisy: Bundle, tmp_path: Path) -> None:
        correct(CASES["ddim-noise"].scheduler, noisy).save_pretrained(tmp_path / "saved")

        loaded = DDIMScheduler.from_pretrained(tmp_path / "saved")

        assert loaded.config.beta_schedule == "linear"

    def test_another_number_of_steps_is_interpolated(self, noisy: Bundle) -> None:
        case = replace(CASES["ddim-noise"], steps=5)
        corrected = correct(case.scheduler, noisy)
        with pytest.warns(InterpolatedCorrection, match="of 7 steps are interpolated for 5"):
            found = driven(case, corrected, generated(seeded()))
        plan = noisy.plan("ddim", 5, 1.0)
        with pytest.warns(InterpolatedCorrection):
            tables = noisy.correction_for(plan)
        draws = draws_of(seeded(), 5)
        states: list[Images] = []
        sample(
            network,
            initial_noise(1, SHAPE),
            noisy.schedule,
            plan,
            noise=lambda index, shape: draws[index].numpy(),
            correction=tables,
            callback=lambda info: states.append(info.x_next),
        )
        assert apart(found, states) < TOLERANCE

    def test_frozen_tables_have_their_own_steps_only(self, tmp_path: Path) -> None:
        case = CASES["ddim-noise"]
        corrected = correct(case.scheduler, planted(tmp_path, case, frozen=True))
        corrected.set_timesteps(7)

        with pytest.raises(TimestepNotDeployed, match="has no row") as caught:
            corrected.set_timesteps(5)
        assert "these numbers of steps work: 1, 7" in (caught.value.hint or "")
        with pytest.raises(InputError, match="no timesteps yet"):
            step_of(corrected, corrected.timesteps[0], eta=1.0)

    def test_no_tables(self, noisy: Bundle) -> None:
        plain = Bundle(noisy.path, replace(noisy.manifest, files={}))
        with pytest.raises(InputError, match="no noise correction") as caught:
            correct(DDIMScheduler(), plain)
        assert "d2-dpm" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        ("scheduler", "complaint"),
        [
            (DDPMScheduler(), r"fitted for ddim, 7 steps, eta 1, not for ddpm \(DDPMScheduler\)"),
            (DPMSolverMultistepScheduler(**SDE), "not for dpmpp-2m-sde"),
            (DEISMultistepScheduler(), "DEISMultistepScheduler has no counterpart"),
            (
                DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
                "algorithm_type dpmsolver has no counterpart",
            ),
        ],
    )
    def test_another_scheduler(self, noisy: Bundle, scheduler: Any, complaint: str) -> None:
        with pytest.raises(InputError, match=complaint) as caught:
            correct(scheduler, noisy)
        assert caught.value.hint

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"beta_schedule": "scaled_linear"}, "configuration is another"),
            ({"beta_end": 0.0202}, "configuration is another"),
            ({"clip_sample": False}, "configuration is another"),
            ({"set_alpha_to_one": False}, "configuration is another"),
            ({"timestep_spacing": "trailing"}, "configuration is another"),
            ({"num_train_timesteps": 500}, "configuration is another"),
            ({"prediction_type": "v_prediction"}, "expects v_prediction, the bundle's network predicts epsilon"),
        ],
    )
    def test_another_configuration(self, noisy: Bundle, change: dict[str, Any], complaint: str) -> None:
        with pytest.raises(InputError, match=complaint) as caught:
            correct(DDIMScheduler.from_config({**LINEAR, **change}), noisy)
        assert caught.value.hint

    def test_a_configuration_that_is_not_understood(self, noisy: Bundle) -> None:
        with pytest.raises(ScheduleError, match="thresholding True is not supported"):
            correct(DDIMScheduler(**LINEAR, thresholding=True), noisy)

    def test_the_bundles_own_configuration_is_accepted(self, tmp_path: Path) -> None:
        """As the hint says. A class's own defaults come in where a configuration does not say (Euler: linspace)."""
        model = PNDMScheduler.from_config({**STABLE, "skip_prk_steps": True})
        config = Schedule.from_config(model.config).config
        case = Case("euler", EulerDiscreteScheduler, config, 7)
        bundle = planted(tmp_path, case)

        with pytest.raises(InputError, match="configuration is another") as caught:
            correct(EulerDiscreteScheduler.from_config(model.config), bundle)
        assert "EulerDiscreteScheduler.from_pretrained(BUNDLE, subfolder='scheduler')" in (caught.value.hint or "")
        corrected = correct(EulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler"), bundle)

        assert corrected.config.timestep_spacing == "leading"
        draws = draws_of(seeded(), 7)
        assert apart(driven(case, corrected, nothing), ours(case, bundle, draws)) < TOLERANCE

    def test_the_released_form_of_ptqd(self, tmp_path: Path) -> None:
        case = CASES["ddim-noise"]
        bundle = planted(tmp_path, case, form="ptqd-released")
        with pytest.raises(InputError, match="changes the direction of DDIM") as caught:
            correct(case.scheduler, bundle)
        assert "fit_noise.form=ptqd" in (caught.value.hint or "")
        other = CASES["ddpm"]
        correct(other.scheduler, planted(tmp_path, other, form="ptqd-released"))

    def test_guidance(self, tmp_path: Path) -> None:
        case = CASES["ddim-noise"]
        bundle = planted(tmp_path, case, guidance=3.0)
        scale = 3.0
        with pytest.raises(InputError, match="guidance_scale is 1; the correction was fitted at 3") as caught:
            correct(case.scheduler, bundle)
        assert caught.value.hint
        correct(case.scheduler, bundle, guidance_scale=3)

        corrected = correct(case.scheduler, bundle, guidance_scale=lambda: scale)
        corrected.set_timesteps(7)
        step_of(corrected, corrected.timesteps[0], eta=1.0)
        scale = 3.5
        with pytest.raises(InputError, match=r"guidance_scale is 3\.5"):
            step_of(corrected, corrected.timesteps[1], eta=1.0)

    @pytest.mark.parametrize("options", [{}, {"eta": 0.0}, {"eta": 0.9}])
    def test_another_eta(self, noisy: Bundle, options: dict[str, Any]) -> None:
        corrected = correct(CASES["ddim-noise"].scheduler, noisy)
        corrected.set_timesteps(7)
        with pytest.raises(InputError, match="fitted for eta 1, the pipeline runs eta 0") as caught:
            step_of(corrected, corrected.timesteps[0], **options)
        assert "eta=1" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("ddim-noise", {"use_clipped_model_output": True, "eta": 1.0}),
            ("euler", {"s_churn": 2.0}),
            ("flow-euler", {"per_token_timesteps": torch.zeros(2, 1)}),
        ],
    )
    def test_steps_of_another_kind(self, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
        case = CASES[name]
        corrected = correct(case.scheduler, planted(tmp_path, case))
        corrected.set_timesteps(case.steps)
        with pytest.raises(InputError, match="changes the step that the correction was fitted for"):
            step_of(corrected, corrected.timesteps[0], **options)
        step_of(corrected, corrected.timesteps[0], **case.options)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("ddpm", {"timesteps": [900, 500, 100]}),
            ("ddpm", {"timesteps": [994, 852, 710, 568, 426, 284, 0]}),
            ("euler", {"timesteps": [900.0, 500.0, 100.0]}),
            ("euler", {"sigmas": [10.0, 4.0, 1.0, 0.0]}),
            ("dpmpp-2m", {"timesteps": [900, 500, 100]}),
            ("flow-euler", {"sigmas": [1.0, 0.6, 0.2]}),
            ("lcm", {"timesteps": [999, 599]}),
            ("lcm", {"num_inference_steps": 4, "strength": 0.5}),
        ],
    )
    @pytest.mark.filterwarnings("ignore::mezzotint.runtime.errors.InterpolatedCorrection")
    def test_timesteps_of_ones_own(self, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
        case = CASES[name]
        if name == "dpmpp-2m":
            case = replace(case, config=STABLE)
        corrected = correct(case.scheduler, planted(tmp_path, case))
        corrected.set_timesteps(case.steps)

        with pytest.raises(InputError, match="set timesteps of its own") as caught:
            corrected.set_timesteps(**options)
        assert "num_inference_steps" in (caught.value.hint or "")
        with pytest.raises(InputError, match="no timesteps yet"):
            step_of(corrected, corrected.timesteps[0])

    def test_a_list_that_says_the_same_is_accepted(self, tmp_path: Path) -> None:
        case = CASES["ddpm"]
        bundle = planted(tmp_path, case)
        corrected = correct(case.scheduler, bundle)

        corrected.set_timesteps(timesteps=list(bundle.deployment.calls))

        t = corrected.timesteps[0]
        listed = step_of(corrected, t, generator=seeded())
        corrected.set_timesteps(case.steps)
        assert torch.equal(listed, step_of(corrected, t, generator=seeded()))

    def test_steps_out_of_order(self, noisy: Bundle) -> None:
        corrected = correct(CASES["ddim-noise"].scheduler, noisy)
        with pytest.raises(InputError, match="no timesteps yet") as caught:
            step_of(corrected, 852, eta=1.0)
        assert "set_timesteps" in (caught.value.hint or "")
        corrected.set_timesteps(7)
        times = corrected.timesteps.tolist()
        with pytest.raises(TimestepNotDeployed, match="a step at timestep 853, where the correction expects no"):
            step_of(corrected, 853, eta=1.0)
        step_of(corrected, times[1], eta=1.0)
        for wrong in (times[1], times[3], times[0]):
            with pytest.raises(TimestepNotDeployed, match=f"timestep {wrong}, where the correction expects {times[2]}"):
                step_of(corrected, wrong, eta=1.0)
        for t in times[2:]:
            step_of(corrected, t, eta=1.0)
        with pytest.raises(TimestepNotDeployed, match="expects no further one") as caught:
            step_of(corrected, times[0], eta=1.0)
        assert "before each run" in (caught.value.hint or "")

    def test_other_precision(self, noisy: Bundle) -> None:
        corrected = correct(CASES["ddim-noise"].scheduler, noisy)
        corrected.set_timesteps(7)
        x = torch.zeros(SHAPE, dtype=torch.float64)
        with pytest.raises(InputError, match=r"output is torch\.float64 on cpu") as caught:
            corrected.step(x, corrected.timesteps[0], x, eta=1.0)
        assert "torch_dtype=torch.float32" in (caught.value.hint or "")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_half_pipeline_is_corrected_as_well(self, tmp_path: Path, dtype: torch.dtype) -> None:
        case = CASES["ddim"]
        bundle = planted(tmp_path / "b", case)
        x = torch.from_numpy(initial_noise(1, SHAPE)).to(dtype)
        out = torch.from_numpy(initial_noise(2, SHAPE)).to(dtype)
        corrected, plain = correct(case.scheduler, bundle), case.scheduler
        for scheduler in (corrected, plain):
            scheduler.set_timesteps(6)
        t, table = plain.timesteps[0], bundle.correction_for(bundle.deployment)
        assert table is not None
        fixed = torch.from_numpy(table.apply(out.float().numpy(), 0)).to(dtype)

        got = corrected.step(out, t, x, return_dict=False)[0]

        assert got.dtype is dtype
        assert torch.equal(got, plain.step(fixed, t, x, return_dict=False)[0])
        assert not torch.equal(got, plain.step(out, t, x, return_dict=False)[0])

    def test_another_device(self, noisy: Bundle) -> None:
        corrected = correct(CASES["ddim-noise"].scheduler, noisy)
        corrected.set_timesteps(7)
        x = torch.zeros(SHAPE, device="meta")
        with pytest.raises(InputError, match=r"torch\.float32 on meta"):
            corrected.step(x, corrected.timesteps[0], x, eta=1.0)

    def test_other_channels(self, noisy: Bundle) -> None:
        corrected = correct(CASES["ddim-noise"].scheduler, noisy)
        corrected.set_timesteps(7)
        x = torch.zeros(2, 4, 8, 8)
        with pytest.raises(InputError, match="the correction has 3 channels"):
            corrected.step(x, corrected.timesteps[0], x, eta=1.0)


def applied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that are used from now on."""
    rows: list[int] = []
    apply = Correction.apply

    def spied(self: Correction, output: Images, call: int) -> Images:
        rows.append(call)
        return apply(self, output, call)

    monkeypatch.setattr(Correction, "apply", spied)
    return rows


MIDDLES = [
    ("ddim-noise", 3, [3, 4, 5, 6]),
    ("ddpm", 6, [6]),
    ("euler", 2, [2, 3, 4, 5, 6]),
    ("dpmpp-2m-sde", 4, [4, 5, 6]),
    ("lcm", 1, [1, 2, 3]),
    # The timesteps of Heun's calls: a b b c c d d e e. A step begins with the second of two.
    ("heun", 2, [2, 3, 4, 5, 6, 7, 8]),
    # PNDM's: a b b c d e f. It counts its steps by itself, and its rows are known by their timesteps.
    ("pndm-plms", 0, [0, 1, 2, 3, 4, 5, 6]),
    ("pndm-plms", 1, [2, 2, 3, 4, 5, 6]),
    ("pndm-plms", 2, [2, 3, 4, 5, 6]),
    ("pndm-plms", 3, [3, 4, 5, 6]),
]


@pytest.mark.parametrize(("name", "begin", "rows"), MIDDLES)
@pytest.mark.parametrize("told", [True, False])
def test_a_run_may_begin_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, begin: int, rows: list[int], told: bool
) -> None:
    """As pipelines do that change a picture. Most of them tell the scheduler where (`set_begin_index`)."""
    case = CASES[name]
    corrected = correct(case.scheduler, planted(tmp_path, case))
    corrected.set_timesteps(case.steps)
    if told and hasattr(corrected, "set_begin_index"):
        corrected.set_begin_index(begin)
    found = applied(monkeypatch)

    for t in corrected.timesteps[begin:]:
        corrected.scale_model_input(torch.zeros(SHAPE), t)
        step_of(corrected, t, **case.options)

    assert found == rows


STEPS = 3
SMALL: dict[str, Any] = {"steps": STEPS, "calibration_samples": 2, "threads": 1}
COUNT = 2  # pictures
NEAR = 1e-5  # of pictures in [0, 1], float32 kernels on both sides


@dataclass(frozen=True)
class Pair:
    """A bundle of recipe d2-dpm, with tables that were measured, and a float one, for planted tables: there two
    libraries' rounding stays what it is."""

    bundle: Bundle
    exact: Bundle


def pair(model: Any, folder: Path, config: Any, **given: Any) -> Pair:
    """Exported once, compiled twice. All of the correction is kept, so that there is one to see."""
    exported = folder / "exported" / "model.onnx"
    settings = {"fit_noise.gate": False}
    bundle = compile_model(
        model, folder / "bundle", recipe="d2-dpm", settings=settings, export=exported, **given, **SMALL
    )
    (exported.parent / "config.json").write_text(json.dumps(config))
    given["scheduler"] = bundle.schedule
    size = bundle.sample_shape[1:]
    return Pair(bundle, compile_model(exported.parent, folder / "exact", recipe="float", size=size, **given, **SMALL))


@pytest.fixture(scope="module")
def digits(exported_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("digits")
    given: dict[str, Any] = {"size": (32, 32), "eta": 1.0, **SMALL}
    settings = {"fit_noise.gate": False}
    bundle = compile_model(exported_digits, folder / "bundle", recipe="d2-dpm", settings=settings, **given)
    return Pair(bundle, compile_model(exported_digits, folder / "exact", recipe="float", **given))


def with_tables(bundle: Bundle, deployment: Deployment, schedule: Schedule | None = None) -> Bundle:
    """The bundle as if it had been compiled for this deployment, and these planted tables fitted for it."""
    made = copy.copy(bundle)
    made.schedule, made.deployment = schedule or bundle.schedule, deployment
    made.correction = table(deployment, made.schedule, channels=bundle.sample_shape[0])
    return made


def digit_pipeline(bundle: Bundle, name: str, scheduler: str) -> Any:
    steps = getattr(diffusers, scheduler).from_config(dict(bundle.schedule.config))
    unet: Any = stand_in(bundle, threads=1)
    return quiet(getattr(diffusers, name)(unet=unet, scheduler=steps))


@pytest.mark.parametrize(
    ("name", "scheduler", "sampler", "eta"),
    [("DDIMPipeline", "DDIMScheduler", "ddim", 1.0), ("DDPMPipeline", "DDPMScheduler", "ddpm", 0.0)],
)
def test_digits_are_those_of_our_own_loop(digits: Pair, name: str, scheduler: str, sampler: str, eta: float) -> None:
    """In float: at W8A8 the last bit of a latent, which differs between two libraries, is now and then the one that
    makes a quantizer round the other way, and pictures differ by some hundredths, corrected or not."""
    plan = Deployment.of(digits.exact.schedule, sampler, STEPS, eta)
    bundle = with_tables(digits.exact, plan)
    pipe = attach(digit_pipeline(bundle, name, scheduler), bundle, threads=1, correction=True)
    given = {"eta": eta} if sampler == "ddim" else {}

    got = pipe(batch_size=COUNT, num_inference_steps=STEPS, output_type="np", generator=seeded(), **given).images

    draws = [torch.randn((COUNT, *bundle.sample_shape), generator=one) for one in [seeded()] for _ in range(STEPS + 1)]
    x, *noise = (draw.numpy() for draw in draws)
    denoise = predictor(bundle.denoiser(1), plan, {}, {})

    def mine(correction: Correction | None) -> Images:
        ours = sample(denoise, x, bundle.schedule, plan, noise=lambda index, shape: noise[index], correction=correction)
        return np.asarray(np.clip(ours / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1), np.float32)

    assert bundle.correction
    assert np.abs(got - mine(bundle.correction)).max() < NEAR
    assert np.abs(got - mine(replace(bundle.correction, scale=bundle.correction.scale * 1.01))).max() > NEAR
    assert np.abs(got - mine(None)).max() > 0.01


def test_quantized_digits_are_those_of_the_scheduler_by_hand(digits: Pair) -> None:
    """Bit for bit, with the arithmetic of the same library (see above); and twice the same."""
    bundle = digits.bundle
    pipe = attach(digit_pipeline(bundle, "DDIMPipeline", "DDIMScheduler"), bundle, threads=1)
    call = {"batch_size": COUNT, "num_inference_steps": STEPS, "output_type": "np", "eta": 1.0}

    got, again = (pipe(generator=seeded(), **call).images for _ in range(2))

    def by_hand(scheduler: Any) -> Images:
        generator = seeded()
        x = torch.randn((COUNT, *bundle.sample_shape), generator=generator)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            output = torch.from_numpy(bundle.denoiser(1)(x.numpy(), int(t)))
            x = scheduler.step(output, t, x, eta=1.0, generator=generator).prev_sample
        pictures: Images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return pictures

    plain = DDIMScheduler.from_pretrained(bundle.path, subfolder="scheduler")
    np.testing.assert_array_equal(got, by_hand(correct(plain, bundle)))
    np.testing.assert_array_equal(got, again)
    assert np.abs(got - by_hand(plain)).max() > 1e-3
    with pytest.raises(InputError, match="fitted for eta 1, the pipeline runs eta 0"):
        pipe(generator=seeded(), **{**call, "eta": 0.0})


GUIDANCE = 3.0
TEXT: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}


@dataclass(frozen=True)
class Stable(Pair):
    """The pipeline that both were made from, at guidance 3."""

    pipe: Any


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Stable:
    folder = tmp_path_factory.mktemp("stable")
    pipe = pipelines.stable_diffusion(folder)
    schedule = Schedule.from_config(pipe.scheduler.config)
    rows = {"conditions": "random", "unconditional": "random"}
    config = json.loads(pipe.unet.to_json_string())
    made = pair(pipe.unet, folder, config, scheduler=schedule, guidance=GUIDANCE, **rows)
    return Stable(made.bundle, made.exact, pipe)


def kin(made: Stable, name: str = "StableDiffusionPipeline", **parts: Any) -> Any:
    """A pipeline of the same parts, of its own class or of another."""
    return quiet(getattr(diffusers, name)(**{**made.pipe.components, **parts}, requires_safety_checker=False))


def pictures(pipe: Any, **call: Any) -> Images:
    return np.asarray(pipe(generator=seeded(), output_type="np", **call).images)


class TestStableDiffusion:
    """Text to image, guided."""

    def test_the_scheduler_is_corrected(self, stable: Stable, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe = kin(stable)
        rows = applied(monkeypatch)

        assert attach(pipe, stable.bundle, threads=1) is pipe
        assert pipe.scheduler is not stable.pipe.scheduler
        assert type(pipe.scheduler) is DDIMScheduler
        got, again = (pictures(pipe, **TEXT) for _ in range(2))

        assert rows == [0, 1, 2] * 2
        np.testing.assert_array_equal(got, again)
        plain = attach(kin(stable), stable.bundle, threads=1, correction=False)
        assert plain.scheduler is stable.pipe.scheduler
        assert not np.array_equal(got, pictures(plain, **TEXT))

    def test_latents_are_those_of_our_own_loop(self, stable: Stable) -> None:
        """In float, with planted tables. The correction concerns the combined output."""
        bundle = with_tables(stable.exact, stable.exact.deployment)
        pipe = attach(kin(stable), bundle, threads=1, correction=True)
        x = torch.randn((1, *bundle.sample_shape), generator=seeded())
        prompt, empty = pipe.encode_prompt("a cat", "cpu", 1, True)

        got = pipe(latents=x, output_type="latent", **TEXT).images.numpy()

        known, without = ({"encoder_hidden_states": part.detach().numpy()} for part in (prompt, empty))
        denoise = predictor(bundle.denoiser(1), bundle.deployment, known, without)

        def mine(correction: Correction | None) -> list[Images]:
            return [sample(denoise, x.numpy(), bundle.schedule, bundle.deployment, correction=correction)]

        assert bundle.correction
        assert apart([got], mine(bundle.correction)) < TOLERANCE
        assert apart([got], mine(replace(bundle.correction, shift=bundle.correction.shift * 1.01))) > TOLERANCE

    @pytest.mark.parametrize(
        ("change", "complaint"),
        [
            ({"guidance_scale": 5.0}, "guidance_scale is 5; the correction was fitted at 3"),
            ({"guidance_scale": 1.0}, "guidance_scale is 1; the correction was fitted at 3"),
            ({"guidance_rescale": 0.7}, "guidance_rescale changes what the correction was fitted to"),
            ({"eta": 0.5}, r"fitted for eta 0, the pipeline runs eta 0\.5"),
            ({"timesteps": [900, 500, 100]}, "does not support custom timestep"),
        ],
    )
    def test_another_way_of_sampling(self, stable: Stable, change: dict[str, Any], complaint: str) -> None:
        pipe = attach(kin(stable), stable.bundle, threads=1)
        kind = ValueError if "timesteps" in change else InputError  # diffusers says it before we do
        with pytest.raises(kind, match=complaint):
            pictures(pipe, **{**TEXT, **change})
        pictures(pipe, **TEXT)

    def test_another_number_of_steps(self, stable: Stable) -> None:
        pipe = attach(kin(stable), stable.bundle, threads=1)
        with pytest.raises(TimestepNotDeployed, match="has no row"):
            pictures(pipe, **{**TEXT, "num_inference_steps": 4})

    @pytest.mark.parametrize(
        ("kind", "sampler", "strength", "rows"),
        [
            ("DDIMScheduler", "ddim", 1.0, [0, 1, 2]),
            ("DDIMScheduler", "ddim", 0.7, [1, 2]),
            ("EulerAncestralDiscreteScheduler", "euler-ancestral", 0.7, [1, 2]),
            ("HeunDiscreteScheduler", "heun", 0.7, [2, 3, 4]),
            ("PNDMScheduler", "pndm", 0.7, [2, 2, 3]),
            ("PNDMScheduler", "pndm", 0.4, [2, 3]),
        ],
    )
    def test_img2img_has_the_rows_of_its_timesteps(
        self,
        stable: Stable,
        monkeypatch: pytest.MonkeyPatch,
        kind: str,
        sampler: str,
        strength: float,
        rows: list[int],
    ) -> None:
        config = {**stable.exact.schedule.config, "skip_prk_steps": True}
        schedule = Schedule.from_config(config)
        plan = Deployment.of(schedule, sampler, STEPS, guidance=GUIDANCE)
        bundle = with_tables(stable.exact, plan, schedule)
        scheduler = getattr(diffusers, kind).from_config(config)
        pipe = attach(kin(stable, "StableDiffusionImg2ImgPipeline", scheduler=scheduler), bundle, correction=True)
        timesteps: list[float] = []

        def seen(x: Images, t: Any, **given: Any) -> Images:
            timesteps.append(float(t))
            return bundle.denoiser()(x, t, **given)

        pipe.unet.denoiser = seen
        found = applied(monkeypatch)
        noise = np.random.default_rng(4).integers(0, 256, (2 * SIDE, 2 * SIDE, 3), np.uint8)

        pictures(pipe, image=Image.fromarray(noise), strength=strength, **TEXT)

        assert found == rows
        assert [plan.calls[row] for row in rows] == timesteps


class TestAttach:
    """What `attach` does where there is no correction, or none for the pipeline."""

    def test_no_tables(self, stable: Stable) -> None:
        pipe = kin(stable)
        assert attach(pipe, stable.exact).scheduler is stable.pipe.scheduler
        network = pipe.unet
        with pytest.raises(InputError, match="no noise correction"):
            attach(pipe, stable.exact, correction=True)
        assert pipe.unet is network, "the pipeline is as it was"

    @pytest.mark.parametrize(
        ("scheduler", "complaint"),
        [
            (EulerDiscreteScheduler, "not for euler"),
            (DEISMultistepScheduler, "no counterpart"),
            (lambda **config: DDIMScheduler(**{**config, "beta_end": 0.013}), "configuration is another"),
            (lambda **config: DDIMScheduler(**config, thresholding=True), "thresholding True is not supported"),
        ],
    )
    def test_another_scheduler(self, stable: Stable, scheduler: Any, complaint: str) -> None:
        config = {key: pipelines.STABLE[key] for key in ("beta_schedule", "beta_start", "beta_end", "steps_offset")}
        pipe = kin(stable, scheduler=scheduler(**config))
        before = pipe.scheduler
        with pytest.raises((InputError, ScheduleError), match=complaint):
            attach(pipe, stable.bundle, correction=True)
        assert type(pipe.unet).__name__ == "UNet2DConditionModel", "the pipeline is as it was"
        assert attach(pipe, stable.bundle).scheduler is before
        assert attach(pipe, stable.bundle, correction=False).scheduler is before

    def test_a_pipeline_that_does_not_tell_its_guidance_scale(self, stable: Stable) -> None:
        parts = stable.pipe.components
        pipe = diffusers.LDMTextToImagePipeline(
            vqvae=parts["vae"],
            bert=parts["text_encoder"],
            tokenizer=parts["tokenizer"],
            unet=parts["unet"],
            scheduler=parts["scheduler"],
        )
        with pytest.raises(InputError, match="LDMTextToImagePipeline has no guidance_scale") as caught:
            attach(pipe, stable.bundle, correction=True)
        assert "guidance_scale=..." in (caught.value.hint or "")
        assert attach(pipe, stable.bundle).scheduler is parts["scheduler"]

        pipe.scheduler = correct(pipe.scheduler, stable.bundle.path, guidance_scale=GUIDANCE)
        pipe.scheduler.set_timesteps(STEPS)

    def test_another_pipeline_of_the_same_parts_is_attached_anew(self, stable: Stable) -> None:
        """A corrected scheduler asks the pipeline that it was made for."""
        pipe = attach(kin(stable), stable.bundle, threads=1)
        pictures(pipe, **TEXT)
        other = kin(stable, **pipe.components)
        assert other.scheduler is pipe.scheduler

        attach(other, stable.bundle, threads=1)

        with pytest.raises(InputError, match="guidance_scale is 5"):
            pictures(other, **{**TEXT, "guidance_scale": 5.0})
        np.testing.assert_array_equal(pictures(other, **TEXT), pictures(pipe, **TEXT))

    def test_a_correction_of_another_bundle_goes(self, stable: Stable) -> None:
        pipe = attach(kin(stable), stable.bundle, threads=1)
        corrected = pipe.scheduler
        assert corrected.bundle is stable.bundle
        assert attach(pipe, stable.bundle, threads=1, correction=False).scheduler is corrected, "it is left alone"

        attach(pipe, stable.exact, threads=1)

        assert not hasattr(pipe.scheduler, "bundle")
        assert pipe.scheduler.config == corrected.config
        plain = attach(kin(stable), stable.exact, threads=1)
        np.testing.assert_array_equal(pictures(pipe, **TEXT), pictures(plain, **TEXT))
