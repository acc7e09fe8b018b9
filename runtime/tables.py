"""The row of a frozen table for each timestep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import InputError


def nearest_rows(deployed: Sequence[int], num_train: int) -> npt.NDArray[np.int64]:
    """Return for each training timestep the row of the nearest deployed one, int64 `[num_train]`.

    Row i is `deployed[i]`, in any order. Of two equally near ones the smaller timestep wins. A graph gathers from this
    map, so that any sampler gets a row at any timestep.
    """
    times = np.asarray(deployed)
    if times.ndim != 1 or times.size == 0 or times.dtype.kind not in "iu":
        raise InputError(f"deployed timesteps are {deployed!r}, expected a list of at least one integer")
    order = np.argsort(times)
    rising = times[order].astype(np.int64)
    if rising[0] < 0 or rising[-1] >= num_train or np.any(np.diff(rising) == 0):
        raise InputError(f"deployed timesteps must be different and within 0 to {num_train - 1}, not {times.tolist()}")
    # The nearest changes past the middle of two neighbours; "left" leaves an exact middle with the smaller one.
    middles = (rising[:-1] + rising[1:]) / 2
    found: npt.NDArray[np.int64] = order[np.searchsorted(middles, np.arange(num_train), side="left")].astype(np.int64)
    return found
