"""Sigmas of flow matching against diffusers' schedulers, with the configurations that models were published with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.sampling.deployment import Deployment, usual_sampler
from mezzotint.runtime.sampling.flow_sigmas import BY_LENGTH_AND_STEPS, EVEN_SIGMAS, IMAGE_TOKENS, SHIFT_BY
from mezzotint.runtime.sampling.schedule import Schedule

EULER: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
LENGTHS = {"base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15}
EVEN = {EVEN_SIGMAS: True}
MULTISTEP: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "solver_order": 2,
    "lower_order_final": True,
    "final_sigmas_type": "zero",
    "timestep_spacing": "linspace",
}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "FLUX.1-dev": ({**EULER, **LENGTHS, **EVEN, "shift": 3.0, "use_dynamic_shifting": True, IMAGE_TOKENS: 4096}, 28),
    "FLUX.1-dev, wide": ({**EULER, **LENGTHS, **EVEN, "use_dynamic_shifting": True, IMAGE_TOKENS: 1376}, 50),
    "FLUX.1-schnell": ({**EULER, **LENGTHS, **EVEN, "shift": 1.0, "use_dynamic_shifting": False}, 4),
    "FLUX.2": ({**EULER, **EVEN, "use_dynamic_shifting": True, IMAGE_TOKENS: 4096, SHIFT_BY: BY_LENGTH_AND_STEPS}, 28),
    "Qwen-Image": (
        {
            **EULER,
            **LENGTHS,
            **EVEN,
            "max_image_seq_len": 8192,
            "max_shift": 0.9,
            "shift_terminal": 0.02,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": True,
            IMAGE_TOKENS: 6032,
        },
        50,
    ),
    "LTX-Video": (
        {
            **EULER,
            **EVEN,
            "base_image_seq_len": 1024,
            "base_shift": 0.95,
            "max_image_seq_len": 4096,
            "max_shift": 2.05,
            "shift_terminal": 0.1,
            "use_dynamic_shifting": True,
            IMAGE_TOKENS: 7392,
        },
        50,
    ),
    "CogView4": (
        {
            **EULER,
            "base_shift": 0.25,
            "max_shift": 0.75,
            "time_shift_type": "linear",
            "use_dynamic_shifting": True,
            IMAGE_TOKENS: 4096,
        },
        50,
    ),
    "Stable Diffusion 3.5": ({**EULER, "shift": 3.0}, 40),
    "Stable Diffusion 3.5, dynamic": ({**EULER, **LENGTHS, "use_dynamic_shifting": True, IMAGE_TOKENS: 4096}, 40),
    "Lumina-Image 2": ({**EULER, **LENGTHS, **EVEN, "shift": 6.0, "use_dynamic_shifting": False}, 30),
    "Z-Image-Turbo": ({**EULER, **EVEN, "shift": 3.0, "use_dynamic_shifting": False}, 9),
    "AuraFlow": ({**EULER, "shift": 1.73}, 50),
    "HunyuanVideo": ({**EULER, **EVEN, "shift": 7.0}, 30),
    "Karras": ({**EULER, "use_karras_sigmas": True}, 12),
    "exponential": ({**EULER, "shift": 3.0, "use_exponential_sigmas": True}, 12),
    "beta": ({**EULER, **EVEN, "use_beta_sigmas": True}, 12),
    "Wan 2.1, 480p": ({**MULTISTEP, "_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}, 50),
    "Wan 2.1, 720p": ({**MULTISTEP, "_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0}, 50),
    "UniPC, dynamic": (
        {
            **MULTISTEP,
            "_class_name": "UniPCMultistepScheduler",
            "use_dynamic_shifting": True,
            "shift_terminal": 0.1,
            IMAGE_TOKENS: 900,
        },
        20,
    ),
    "Sana": ({**MULTISTEP, "_class_name": "DPMSolverMultistepScheduler", "flow_shift": 3.0}, 20),
}


def theirs(config: dict[str, Any], steps: int) -> Any:
    """Return diffusers' scheduler with the timesteps that the model's pipeline sets, by that pipeline's own formula."""
    kinds = (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, DPMSolverMultistepScheduler)
    scheduler = next(kind for kind in kinds if kind.__name__ == config["_class_name"]).from_config(config)
    options: dict[str, Any] = {"num_inference_steps": steps}
    if config.get(EVEN_SIGMAS):
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    if config.get("use_dynamic_shifting"):
        tokens, known = config[IMAGE_TOKENS], scheduler.config
        lengths = (known.get(k, u) for k, u in (("base_image_seq_len", 256), ("max_image_seq_len", 4096)))
        shifts = (known.get(k, u) for k, u in (("base_shift", 0.5), ("max_shift", 1.15)))
        by_steps = config.get(SHIFT_BY) == BY_LENGTH_AND_STEPS
        options["mu"] = compute_empirical_mu(tokens, steps) if by_steps else calculate_shift(tokens, *lengths, *shifts)
    if config["_class_name"] == "UniPCMultistepScheduler" and "mu" in options:
        # Its own line has no defaults for the lengths, which it has no parameters for.
        options["mu"] = calculate_shift(config[IMAGE_TOKENS])
    scheduler.set_timesteps(**options)
    return scheduler


def noise_shares(schedule: Schedule, deployment: Deployment) -> list[float]:
    """Return the sigma of each call, read from the weights by which its solver finds the image: x - sigma v."""
    return [-step.image_out for step in deployment.solver(schedule).steps]


@pytest.mark.parametrize("name", PUBLISHED)
def test_sigmas_and_timesteps_are_those_of_diffusers(name: str) -> None:
    config, steps = PUBLISHED[name]
    schedule, scheduler = Schedule.from_config(config), theirs(config, steps)
    deployment = Deployment.of(schedule, usual_sampler(schedule), steps)
    np.testing.assert_allclose(noise_shares(schedule, deployment), scheduler.sigmas[:-1].numpy(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(deployment.calls, scheduler.timesteps.numpy(), rtol=1e-6)
    again = type(scheduler).from_config(config)
    again.set_timesteps(**schedule.timestep_options(steps))
    np.testing.assert_allclose(again.sigmas.numpy(), scheduler.sigmas.numpy(), rtol=0, atol=1e-6)


def test_another_length_is_another_schedule() -> None:
    config, steps = PUBLISHED["FLUX.1-dev"]
    schedule, scheduler = Schedule.from_config({**config, IMAGE_TOKENS: 4000}), theirs(config, steps)
    deployment = Deployment.of(schedule, "flow-euler", steps)
    assert np.abs(np.subtract(noise_shares(schedule, deployment), scheduler.sigmas[:-1].numpy())).max() > 1e-3
    assert schedule != Schedule.from_config(config)
    with pytest.raises(ScheduleError, match="other network calls"):
        deployment.solver(Schedule.from_config(config))


@pytest.mark.parametrize(
    ("config", "sampler", "steps", "why"),
    [
        ({**EULER, "use_dynamic_shifting": True}, "flow-euler", 4, "number of image tokens"),
        ({**EULER, **EVEN, "shift_terminal": 0.1}, "flow-euler", 1, "1 steps cannot end at shift_terminal"),
        ({**EULER, "use_beta_sigmas": True, "use_karras_sigmas": True}, "flow-euler", 4, "are both true"),
        (
            {**EULER, "use_dynamic_shifting": True, "base_image_seq_len": 4096, IMAGE_TOKENS: 9},
            "flow-euler",
            4,
            "are both 4096",
        ),
        (PUBLISHED["Wan 2.1, 480p"][0], "flow-euler", 4, "does not read the flow_shift"),
        (PUBLISHED["Wan 2.1, 480p"][0], "ddim", 4, "needs a schedule of betas"),
        ({**PUBLISHED["Wan 2.1, 480p"][0], "lower_order_final": False}, "unipc", 4, "cannot end at sigma 0"),
        ({**PUBLISHED["Sana"][0], "use_dynamic_shifting": True, IMAGE_TOKENS: 9}, "dpmpp-2m", 4, "not supported"),
        ({**PUBLISHED["Sana"][0], "use_karras_sigmas": True}, "dpmpp-2m", 4, "use_karras_sigmas with use_flow"),
        ({**PUBLISHED["Sana"][0], "final_sigmas_type": "sigma_min"}, "dpmpp-2m", 4, "final_sigmas_type"),
        ({**PUBLISHED["Sana"][0], **EVEN}, "dpmpp-2m", 4, "sigmas of its own"),
        (EULER, "unipc", 4, "needs a schedule of betas"),
    ],
)
def test_what_cannot_be_followed_is_refused(config: dict[str, Any], sampler: str, steps: int, why: str) -> None:
    with pytest.raises(ScheduleError, match=why) as caught:
        Deployment.of(Schedule.from_config(config), sampler, steps)
    assert caught.value.what
