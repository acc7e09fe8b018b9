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


def _betas(read: ConfigReader) -> npt.NDArray[np.float32]:
    """Return the betas, float32 `[train timesteps]`, by the formulas of diffusers."""
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


def alphas_cumprod_of(read: ConfigReader) -> npt.NDArray[np.float64]:
    """Return abar of each training timestep, float64 `[train]`, falling."""
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
