"""The training schedule as numbers, from a diffusers `scheduler_config.json`.

A schedule of betas has one `alphas_cumprod` (abar below) for each training timestep: x_t = sqrt(abar) x0 +
sqrt(1 - abar) noise. A schedule of flow matching (`shift`) has x_t = (1 - sigma) x0 + sigma noise, and its timestep is
num_train_timesteps * sigma. `deployment.py` adds sampler, steps and eta, which determine the network calls.

Options of single samplers stay in `config`, where `solvers*.py` read them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import ScheduleError
from ..json_text import read_json
from ..signature import PREDICTIONS, Prediction
from .betas import alphas_cumprod_of, train_timesteps
from .config_keys import check_keys
from .flow_sigmas import flow_facts, timestep_options
from .scheduler_config import ConfigReader

SPACINGS = ("leading", "trailing", "linspace")
# A network with learned variances predicts them in a second half of its channels, which the import cuts off: every
# sampler but ddpm does without them.
LEARNED = ("learned", "learned_range")
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", *LEARNED)
FLOW_PREDICTIONS = ("flow_prediction", "reversed_flow_prediction", "sample")
# Options of single samplers that are not fields of a Schedule, with the defaults of diffusers.
SAMPLER_OPTIONS: dict[str, Any] = {
    "use_karras_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "final_sigmas_type": "zero",
    "solver_order": 2,
    "lower_order_final": True,
    "euler_at_final": False,
    "lambda_min_clipped": -math.inf,
    "skip_prk_steps": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "stochastic_sampling": False,
}
NAMED_SCHEDULES: dict[str, dict[str, Any]] = {
    "ddpm-linear": {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "sd": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "cosine": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"},
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "flow_prediction"},
}


FLOW_CLASSES = {"UniPCMultistepScheduler": "unipc", "DPMSolverMultistepScheduler": "dpmpp-2m"}
"""Schedulers of betas that are ones of flow matching with `use_flow_sigmas`, and the samplers that are theirs then."""
OTHER_BETAS = ("IPNDMScheduler",)
"""Schedulers of diffusers whose betas are not those of a diffusion process: alpha = sqrt(1 - beta^2)."""


def is_named(name: str) -> bool:
    """Return whether this names a built-in schedule, perhaps with a number of timesteps, as in `cosine:60`."""
    base, colon, count = name.partition(":")
    digits = count.isascii() and count.isdecimal() and len(count) <= 9
    return base in NAMED_SCHEDULES and (digits if colon else True)


@dataclass(frozen=True, eq=False)
class Schedule:
    """`alphas_cumprod` is float64 `[train timesteps]`, falling, and empty for flow matching, which has a `shift`:
    sigma -> shift sigma / (1 + (shift - 1) sigma). `config` is the JSON it came from, kept unchanged."""

    num_train_timesteps: int
    alphas_cumprod: npt.NDArray[np.float64]
    prediction: Prediction
    clip_sample: bool
    clip_sample_range: float
    timestep_spacing: str
    steps_offset: int
    final_alpha_cumprod: float  # abar behind the last DDIM step: 1, or abar[0] where set_alpha_to_one is false
    variance_type: str  # of the DDPM sampler
    shift: float | None
    config: dict[str, Any]

    @property
    def flow(self) -> bool:
        """Whether this is flow matching."""
        return self.shift is not None

    @property
    def _unipc(self) -> bool:
        """Whether the configuration is one of UniPC, which has options that no other scheduler has."""
        return FLOW_CLASSES.get(str(self.config.get("_class_name"))) == "unipc"

    @property
    def last_timestep(self) -> int:
        """The noisiest timestep. Flow matching begins at pure noise, timestep num_train_timesteps."""
        return self.num_train_timesteps - (0 if self.flow else 1)

    @property
    def alphas_above_zero(self) -> npt.NDArray[np.float64]:
        """`alphas_cumprod` with 2^-24 in place of a signal of zero at the end, as diffusers has it."""
        return np.where(self.alphas_cumprod == 0, 2.0**-24, self.alphas_cumprod)

    @property
    def reader(self) -> ConfigReader:
        """The reader of the configuration, for options of a single sampler."""
        return ConfigReader(self.config, "the scheduler configuration")

    def option(self, key: str) -> Any:
        """Return one of SAMPLER_OPTIONS."""
        return self.reader.get(key, SAMPLER_OPTIONS[key])

    def levels(self, timestep: float) -> tuple[float, float]:
        """Return (share of the image, share of the noise) in x at a timestep. Between two training timesteps the ratio
        of the two is interpolated, as in diffusers."""
        if self.flow:
            sigma = timestep / self.num_train_timesteps
            return 1 - sigma, sigma
        bars = self.alphas_above_zero
        ratios = np.sqrt((1 - bars) / bars)
        ratio = float(np.interp(timestep, np.arange(len(ratios)), ratios))
        return 1 / float(np.hypot(1, ratio)), ratio / float(np.hypot(1, ratio))

    @classmethod
    def named(cls, name: str) -> Schedule:
        """Return a built-in schedule with 1000 timesteps and its usual prediction; `cosine:60` has 60 timesteps."""
        base, colon, count = name.partition(":")
        if not is_named(name):
            raise ScheduleError(
                f"no built-in schedule is called {name!r}",
                hint=f"use one of {', '.join(NAMED_SCHEDULES)}, perhaps with its timesteps, as in cosine:60",
            )
        train = int(count) if colon else 1000
        config = {"num_train_timesteps": train, "prediction_type": "epsilon", **NAMED_SCHEDULES[base]}
        return cls.from_config(config, where=f"the built-in schedule {name!r}")

    def predicting(self, prediction: str | None) -> Schedule:
        """Return this schedule for a network that predicts something else; None changes nothing.

        Raises ScheduleError for a prediction that the schedule does not have.
        """
        if prediction is None or prediction == self.prediction:
            return self
        if prediction not in PREDICTIONS:
            raise ScheduleError(f"unknown prediction type {prediction!r}", hint=f"use one of {', '.join(PREDICTIONS)}")
        return self.with_keys({"prediction_type": prediction})

    def with_keys(self, keys: Mapping[str, Any]) -> Schedule:
        """Return this schedule with other values of some keys of its configuration. Raises ScheduleError."""
        said = ", ".join(f"{key} {value!r}" for key, value in keys.items())
        return type(self).from_config({**self.config, **keys}, where=f"the scheduler configuration, with {said}")

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Read a `scheduler_config.json`, the folder that holds it, or a diffusers model folder with `scheduler/`."""
        path = Path(path)
        candidates = (path, path / "scheduler_config.json", path / "scheduler" / "scheduler_config.json")
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise ScheduleError(
                "there is no scheduler configuration",
                where=str(path),
                hint="give a scheduler_config.json, its folder, or the name of a built-in schedule",
            )
        config = read_json(file, "the configuration", ScheduleError, infinite=True)
        if not isinstance(config, dict):
            raise ScheduleError("the configuration is not a JSON object", where=str(file))
        return cls.from_config(config, where=str(file))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "the scheduler configuration") -> Schedule:
        """Read a diffusers configuration; missing keys take the default of DDIMScheduler.

        Raises ScheduleError for whatever the samplers here would compute wrongly.
        """
        # Schedulers in memory note which values they were not given, and a scheduler of another class that is made from
        # such a configuration has defaults of its own in place of these. Here they are values like all others.
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
        read = ConfigReader(config, where)
        name = str(config.get("_class_name", ""))
        if name.startswith("FlowMatch") or (name in FLOW_CLASSES and read.flag("use_flow_sigmas", False)):
            check_keys(read, flow=True)
            return cls._of_flow(read, "shift" if name.startswith("FlowMatch") else "flow_shift")
        said = (config.get(key) for key in ("beta_schedule", "trained_betas", "alphas_cumprod"))
        if all(value is None for value in said) or config.get("_class_name") in OTHER_BETAS:
            raise read.refuse(
                "this is neither a schedule of betas (beta_schedule, trained_betas or alphas_cumprod) nor one of flow "
                "matching",
                "give the scheduler_config.json of a diffusers scheduler",
            )
        check_keys(read, flow=False)
        prediction = read.choice("prediction_type", "epsilon", PREDICTIONS)
        if prediction in ("flow_prediction", "reversed_flow_prediction"):
            raise read.refuse(f"{prediction} needs a schedule of flow matching", "use flow matching's scheduler")
        alphas_cumprod = alphas_cumprod_of(read)
        if alphas_cumprod[-1] == 0.0 and prediction == "epsilon":
            raise read.refuse(
                "the last timestep has no signal, from which a network that predicts epsilon cannot recover the image",
                "use v_prediction or sample, or rescale_betas_zero_snr false",
            )
        alphas_cumprod.flags.writeable = False
        return cls(
            num_train_timesteps=len(alphas_cumprod),
            alphas_cumprod=alphas_cumprod,
            prediction=cast(Prediction, prediction),
            clip_sample=read.flag("clip_sample", True),
            clip_sample_range=read.number("clip_sample_range", 1.0),
            timestep_spacing=read.choice("timestep_spacing", "leading", SPACINGS),
            steps_offset=read.integer("steps_offset", 0, smallest=0),
            final_alpha_cumprod=1.0 if read.flag("set_alpha_to_one", True) else float(alphas_cumprod[0]),
            variance_type=read.choice("variance_type", "fixed_small", VARIANCES),
            shift=None,
            config=dict(config),
        )

    @classmethod
    def _of_flow(cls, read: ConfigReader, shift: str) -> Schedule:
        usual = "flow_prediction" if shift == "shift" else "epsilon"  # which is refused, as it is no velocity
        return cls(
            num_train_timesteps=train_timesteps(read),
            alphas_cumprod=np.zeros(0),
            prediction=cast(Prediction, read.choice("prediction_type", usual, FLOW_PREDICTIONS)),
            clip_sample=False,
            clip_sample_range=1.0,
            timestep_spacing="linspace",
            steps_offset=0,
            final_alpha_cumprod=1.0,
            variance_type="fixed_small",
            shift=read.number(shift, 1.0),
            config=dict(read.config),
        )

    def timesteps(self, steps: int) -> npt.NDArray[np.int64]:
        """Return the timesteps of `steps` network calls in order (falling), int64 `[steps]`, as diffusers chooses them.

        The spacings are those of table 2 of "Common Diffusion Noise Schedules and Sample Steps are Flawed"
        (arXiv 2305.08891).
        """
        train = self.num_train_timesteps
        if not 1 <= steps <= train:
            raise ScheduleError(f"{steps} steps are not possible", hint=f"ask for 1 to {train} steps")
        if self.timestep_spacing == "linspace":
            found = np.linspace(0, train - 1, steps).round()[::-1].astype(np.int64)
        elif self.timestep_spacing == "leading":
            found = (np.arange(steps) * (train // steps))[::-1].astype(np.int64) + self.steps_offset
        else:
            # For some counts (61 of 1000) rounding gives arange one value too many: timestep -1, which diffusers keeps.
            found = np.round(np.arange(train, 0, -train / steps))[:steps].astype(np.int64) - 1
        if found[0] >= train:
            raise ScheduleError(
                f"{steps} steps with steps_offset {self.steps_offset} begin at timestep {found[0]}",
                hint=f"the last training timestep is {train - 1}: ask for fewer steps",
            )
        return np.ascontiguousarray(found)

    def timestep_options(self, steps: int) -> dict[str, Any]:
        """Return the arguments of a diffusers scheduler's `set_timesteps` by which it takes the steps of this one."""
        return timestep_options(self.reader, steps) if self.flow else {"num_inference_steps": steps}

    def digest(self) -> str:
        """Return the SHA-256 of everything that the samplers read: equivalent configurations have the same digest."""
        facts = [
            self.prediction,
            self.clip_sample,
            self.clip_sample_range if self.clip_sample else None,
            self.timestep_spacing,
            self.steps_offset,
            self.final_alpha_cumprod,
            self.variance_type,
            *((self.num_train_timesteps, self.shift, *flow_facts(self.reader)) if self.flow else ()),
            *((self.config.get("solver_type"), repr(self.config.get("disable_corrector"))) if self._unipc else ()),
            *((key, repr(self.option(key))) for key, usual in SAMPLER_OPTIONS.items() if self.option(key) != usual),
        ]
        numbers = self.alphas_cumprod.astype("<f8").tobytes()
        return hashlib.sha256(json.dumps(facts).encode() + numbers).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())
