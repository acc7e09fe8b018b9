"""The timestep of a network's call in diffusers as a training timestep, which a bundle takes.

Networks count steps, or fractions of them (`Signature.timestep_unit`). A fraction in float32, and a timestep that a
pipeline in half precision has rounded, lie beside the timestep that they stand for: the nearest one that the bundle's
tables have a row for is meant, if it is within that rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..signature import Signature, Timestep
from .network_arguments import HALF_TYPES

_NEAR = 1e-3  # timesteps of two libraries, float32, differ by less
_ROUNDINGS = 2  # of a timestep in half precision: it is cast, and divided


def training_time(t: Any, signature: Signature, deployed: Sequence[Timestep] | None) -> npt.NDArray[Any]:
    """Return the timestep of a call, a number or a tensor, as training timesteps of the same shape."""
    half = isinstance(t, torch.Tensor) and t.dtype in HALF_TYPES
    precision = _ROUNDINGS * torch.finfo(t.dtype).eps / 2 if half else 0.0
    given = (t.float() if half else t).detach().cpu().numpy() if isinstance(t, torch.Tensor) else np.asarray(t)
    if given.dtype.kind not in "iuf":
        return given
    if signature.timestep_unit == "steps" and (deployed is None or not half):
        return given
    wide = given.astype(np.float64)
    if signature.timestep_unit != "steps":
        fraction = wide if signature.timestep_unit == "fraction" else 1 - wide
        wide = fraction * signature.num_train_timesteps
    if deployed is None or not wide.size or not bool(np.isfinite(wide).all()):
        return wide
    rows = np.array(deployed, np.float64)
    nearest = rows[np.abs(rows - wide[..., None]).argmin(axis=-1)]
    return np.where(np.abs(nearest - wide) <= np.maximum(_NEAR, precision * np.abs(wide)), nearest, wide)
