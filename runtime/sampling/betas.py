"""abar of each training timestep, from the betas of a diffusers configuration.

Rounding follows diffusers (betas, alphas and abar as float32, the running product in float64): a trained network has
seen those values, and the numbers here and there are then the same.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from .scheduler_config import ConfigReader

MOST_TIMESTEPS = 100_000
CLASS_BETAS = {
    "HeunDiscreteScheduler": (0.00085, 0.012),
    "LCMScheduler": (0.00085, 0.012),
    "KDPM2DiscreteScheduler": (0.00085, 0.012),
    "KDPM2AncestralDiscreteScheduler": (0.00085, 0.012),
    "DPMSolverSDEScheduler": (0.00085, 0.012),
    "TCDScheduler": (0.00085, 0.012),
}
"""beta_start and beta_end of a configuration without these keys, where a class of diffusers has defaults of its own."""


def train_timesteps(read: ConfigReader, default: int = 1000) -> int:
    """Return num_train_timesteps. Raises ScheduleError for a number that no network has seen."""
    count = read.integer("num_train_timesteps", default, smallest=1)
    if count > MOST_TIMESTEPS:
        raise read.refuse(f"num_train_timesteps is {count}", f"at most {MOST_TIMESTEPS} are possible")
    return count


def _betas(read: ConfigReader) -> npt.NDArray[np.float32]:
    """Return the betas, float32 `[train timesteps]`, by the formulas of diffusers."""
    train = train_timesteps(read)
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
    usual = CLASS_BETAS.get(str(read.config.get("_class_name")), (1e-4, 0.02))
    start, end = read.number("beta_start", usual[0]), read.number("beta_end", usual[1])
    if kind == "linear":
        return np.linspace(start, end, train, dtype=np.float32)
    if kind == "scaled_linear":
        return np.linspace(start**0.5, end**0.5, train, dtype=np.float32) ** 2
    return (1 / (1 + np.exp(-np.linspace(-6, 6, train))) * (end - start) + start).astype(np.float32)


def alphas_cumprod_of(read: ConfigReader) -> npt.NDArray[np.float64]:
    """Return abar of each training timestep, float64 `[train]`, falling: `alphas_cumprod` itself, or by the betas."""
    if read.config.get("alphas_cumprod") is not None:
        bars = _known_bars(read)
    else:
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
    if not np.all(bars < 1) or not np.all(bars >= 0) or not np.all(np.diff(bars) < 0):
        raise read.refuse("the signal does not fall from timestep to timestep (betas too close to 0 or to 1)")
    return bars


def _known_bars(read: ConfigReader) -> npt.NDArray[np.float64]:
    """Return the list `alphas_cumprod` of a configuration, which has no betas then."""
    if betas := [key for key in ("beta_schedule", "trained_betas") if read.config.get(key) is not None]:
        raise read.refuse(f"alphas_cumprod and {betas[0]} both say the schedule", "keep the one that is right")
    try:
        bars = np.asarray(read.config["alphas_cumprod"], dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise read.refuse(f"alphas_cumprod are not numbers: {error}") from error
    if bars.ndim != 1 or not bars.size:
        raise read.refuse(f"alphas_cumprod has the shape {list(bars.shape)}", "give one number for each timestep")
    if (train := train_timesteps(read, default=bars.size)) != bars.size:
        raise read.refuse(f"alphas_cumprod has {bars.size} numbers, num_train_timesteps is {train}")
    return bars
