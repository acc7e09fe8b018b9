"""The training schedule as data, and which network calls a sampler makes of it.

A `Schedule` is what a diffusers `scheduler_config.json` says, reduced to numbers: one `alphas_cumprod` (abar below) for
each training timestep, what the network predicts, whether the predicted image is clipped, and how timesteps are spaced.
A `Deployment` is a choice on top of it: this sampler, this many steps, this eta, hence exactly these calls. Neither
holds state; `samplers.py` turns both into images.

Rounding follows diffusers (betas, alphas and abar as float32, the running product in float64): a trained network has
seen those values, and the numbers here and there are then the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from .errors import ScheduleError
from .signature import PREDICTIONS, Prediction

Sampler = Literal["ddim", "ddpm"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)
SPACINGS = ("leading", "trailing", "linspace")
# "learned" variances need a network with twice the channels, which the samplers here do not read.
VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
NAMED: dict[str, dict[str, Any]] = {
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
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """`alphas_cumprod` is float64 `[train timesteps]`, falling; `config` is the JSON it came from, kept unchanged."""

    alphas_cumprod: npt.NDArray[np.float64]
    prediction: Prediction
    clip_sample: bool
    clip_sample_range: float
    timestep_spacing: str
    steps_offset: int
    final_alpha_cumprod: float  # abar behind the last DDIM step: 1, or abar[0] where set_alpha_to_one is false
    variance_type: str  # of the DDPM sampler
    config: dict[str, Any]

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @classmethod
    def named(cls, name: str) -> Schedule:
        """One of the built-in schedules, all with 1000 timesteps and epsilon prediction."""
        if name not in NAMED:
            raise ScheduleError(f"no built-in schedule is called {name!r}", hint=f"use one of {', '.join(NAMED)}")
        config = {"num_train_timesteps": 1000, "prediction_type": "epsilon", **NAMED[name]}
        return cls.from_config(config, where=f"the built-in schedule {name!r}")

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
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ScheduleError(f"the configuration is not readable JSON: {error}", where=str(file)) from error
        if not isinstance(config, dict):
            raise ScheduleError("the configuration is not a JSON object", where=str(file))
        return cls.from_config(config, where=str(file))

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "the scheduler configuration") -> Schedule:
        """Read a diffusers configuration; missing keys take the default of DDIMScheduler.

        Raises ScheduleError for whatever the samplers here would compute wrongly.
        """
        read = _Reader(config, where)
        if str(config.get("_class_name", "")).startswith("FlowMatch") or not {"beta_schedule", "trained_betas"} & set(
            config
        ):
            raise read.refuse(
                "this is not a schedule of betas (neither beta_schedule nor trained_betas)",
                "flow matching and other schedules without betas cannot be sampled by ddim or ddpm",
            )
        prediction = read.choice("prediction_type", "epsilon", PREDICTIONS)
        if read.flag("thresholding", False):
            raise read.refuse("dynamic thresholding is not supported", "set thresholding to false")
        alphas_cumprod = _alphas_cumprod(read)
        if alphas_cumprod[-1] == 0.0 and prediction == "epsilon":
            raise read.refuse(
                "the last timestep has no signal, from which a network that predicts epsilon cannot recover the image",
                "use v_prediction or sample, or rescale_betas_zero_snr false",
            )
        alphas_cumprod.flags.writeable = False
        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction=cast(Prediction, prediction),
            clip_sample=read.flag("clip_sample", True),
            clip_sample_range=read.number("clip_sample_range", 1.0),
            timestep_spacing=read.choice("timestep_spacing", "leading", SPACINGS),
            steps_offset=read.integer("steps_offset", 0, smallest=0),
            final_alpha_cumprod=1.0 if read.flag("set_alpha_to_one", True) else float(alphas_cumprod[0]),
            variance_type=read.choice("variance_type", "fixed_small", VARIANCES),
            config=dict(config),
        )

    def timesteps(self, steps: int) -> npt.NDArray[np.int64]:
        """The timesteps of `steps` network calls in their order (falling), int64 `[steps]`, as diffusers chooses them.

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

    def digest(self) -> str:
        """SHA-256 over everything that the samplers read: configurations that mean the same have the same digest."""
        facts = [
            self.prediction,
            self.clip_sample,
            self.clip_sample_range if self.clip_sample else None,
            self.timestep_spacing,
            self.steps_offset,
            self.final_alpha_cumprod,
            self.variance_type,
        ]
        numbers = self.alphas_cumprod.astype("<f8").tobytes()
        return hashlib.sha256(json.dumps(facts).encode() + numbers).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.digest() == other.digest()

    def __hash__(self) -> int:
        return hash(self.digest())


@dataclass(frozen=True)
class Deployment:
    """What runs in production: the sampler, its steps and eta, and the timestep of each network call, in order."""

    sampler: Sampler
    steps: int
    eta: float
    timesteps: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ScheduleError(f"unknown sampler {self.sampler!r}", hint=f"use one of {', '.join(SAMPLERS)}")
        if not 0.0 <= self.eta <= 1.0:
            raise ScheduleError(f"eta is {self.eta}", hint="choose between 0, deterministic, and 1, as noisy as DDPM")
        if self.sampler == "ddpm" and self.eta != 0.0:
            raise ScheduleError("ddpm has no eta", hint="leave eta at 0, or use ddim")
        if not self.timesteps or self.steps != len(self.timesteps):
            raise ScheduleError(f"{self.steps} steps do not match {len(self.timesteps)} timesteps")

    @classmethod
    def of(cls, schedule: Schedule, sampler: str, steps: int, eta: float = 0.0) -> Deployment:
        timesteps = tuple(int(t) for t in schedule.timesteps(steps))
        return cls(cast(Sampler, sampler), int(steps), float(eta), timesteps)

    def to_json(self) -> dict[str, Any]:
        return {"sampler": self.sampler, "steps": self.steps, "eta": self.eta, "timesteps": list(self.timesteps)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Deployment:
        try:
            timesteps = tuple(int(t) for t in data["timesteps"])
            return cls(data["sampler"], int(data["steps"]), float(data["eta"]), timesteps)
        except (KeyError, TypeError, ValueError) as error:
            raise ScheduleError(f"malformed deployment: {type(error).__name__} {error}") from error


class _Reader:
    """Reads typed values from a configuration and refuses the rest, naming key and place."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def refuse(self, what: str, hint: str | None = None) -> ScheduleError:
        return ScheduleError(what, where=self.where, hint=hint)

    def choice(self, key: str, default: str, allowed: Sequence[str]) -> str:
        value = self.config.get(key, default)
        if value not in allowed:
            raise self.refuse(f"unknown {key} {value!r}", f"supported: {', '.join(allowed)}")
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r}, not true or false")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
            raise self.refuse(f"{key} is {value!r}, not a number above 0")
        return float(value)

    def integer(self, key: str, default: int, smallest: int) -> int:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise self.refuse(f"{key} is {value!r}, not an integer of at least {smallest}")
        return value


def _betas(read: _Reader) -> npt.NDArray[np.float32]:
    """float32 `[train timesteps]`, by the formulas of diffusers."""
    train = read.integer("num_train_timesteps", 1000, smallest=1)
    if read.config.get("trained_betas") is not None:
        try:
            betas = np.asarray(read.config["trained_betas"], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise read.refuse(f"trained_betas are not numbers: {error}") from error
        if betas.shape != (train,):
            raise read.refuse(f"trained_betas have shape {list(betas.shape)}, num_train_timesteps is {train}")
        return betas
    kind = read.choice("beta_schedule", "linear", ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))
    if kind == "squaredcos_cap_v2":
        bars = [math.cos((i / train + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(train + 1)]
        return np.array([min(1 - b / a, 0.999) for a, b in pairwise(bars)], dtype=np.float32)
    start, end = read.number("beta_start", 1e-4), read.number("beta_end", 0.02)
    if kind == "linear":
        return np.linspace(start, end, train, dtype=np.float32)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, train, dtype=np.float32) ** 2
    return (1 / (1 + np.exp(-np.linspace(-6, 6, train))) * (end - start) + start).astype(np.float32)


def _alphas_cumprod(read: _Reader) -> npt.NDArray[np.float64]:
    betas = _betas(read)
    if not np.all((betas > 0) & (betas < 1)):  # also false for NaN
        raise read.refuse("betas must lie between 0 and 1")
    alphas = np.float32(1) - betas
    bars = np.cumprod(alphas.astype(np.float64)).astype(np.float32).astype(np.float64)
    if read.flag("rescale_betas_zero_snr", False):
        if len(bars) < 2:
            raise read.refuse("one timestep cannot be rescaled to zero signal at the end")
        # Algorithm 1 of arXiv 2305.08891: shift sqrt(abar) so that it ends at 0, scale so that it begins where it did.
        roots = np.sqrt(bars)
        bars = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
    if not np.all(bars < 1) or not np.all(np.diff(bars) < 0):
        raise read.refuse("the signal does not fall from timestep to timestep (betas too close to 0 or to 1)")
    return bars
