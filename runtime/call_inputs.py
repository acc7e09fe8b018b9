"""The inputs of a call: checked against the graph's declarations and the signature before the network runs.

An engine would report an error about an inner node, or, for a timestep outside a frozen table, return wrong numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import shared_row
from .engine import TensorInfo
from .errors import InputError, MixedTimesteps, TimestepNotDeployed
from .open_sizes import known_size
from .signature import Signature, Timestep, whole


class CallInputs:
    """The declared inputs of a graph with their meaning. Makes the feeds of one call.

    `deployed` are the timesteps that the graph's tables have rows for; None means every timestep.
    """

    def __init__(
        self, signature: Signature, declared: Mapping[str, TensorInfo], deployed: Sequence[Timestep] | None
    ) -> None:
        self.signature = signature
        self.declared = declared
        self.deployed = None if deployed is None else frozenset(whole(deployed))

    def feeds(self, x: object, t: object, conditions: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return contiguous arrays for every input. Raises InputError, MixedTimesteps or TimestepNotDeployed."""
        sizes: dict[str, int] = {}
        sample = self._checked(self.signature.sample, x, sizes)
        feeds = {self.signature.sample: sample}
        if set(conditions) != set(self.signature.conditions):
            raise InputError(
                f"conditions {sorted(conditions)} were given, the model takes {sorted(self.signature.conditions)}"
            )
        for name, value in conditions.items():
            feeds[name] = self._checked(name, value, sizes)
        feeds[self.signature.timestep] = self._timestep(t, sample.shape[0])
        return feeds

    def _checked(self, name: str, array: object, sizes: dict[str, int]) -> npt.NDArray[Any]:
        """Return `array` for the input `name`, contiguous. `sizes` collects the sizes of named dimensions of a call."""
        value = self.declared[name]
        dtype = np.dtype(value.dtype)
        expected = f"{dtype} {list(value.shape)}"
        array = self._shared(name, array)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != len(value.shape):
            raise InputError(f"input {name!r} is {array_kind(array)}, expected a numpy array {expected}")
        for axis, (size, declared) in enumerate(zip(array.shape, value.shape, strict=True)):
            known = known_size(declared, sizes) if isinstance(declared, str) else declared
            if isinstance(declared, str) and known is None:
                known = sizes[declared] = size
            if size == 0 or (known is not None and size != known):
                raise InputError(
                    f"input {name!r} is {array_kind(array)}, expected {expected}",
                    where=f"axis {axis}" + (f", where {declared} is {known}" if isinstance(declared, str) else ""),
                )
        return np.ascontiguousarray(array)

    def _shared(self, name: str, array: object) -> object:
        """Return the one row that all samples share for a condition that the graph declares as a number or one row."""
        shape = self.declared[name].shape
        serves_all = name in self.signature.conditions and (not shape or shape[0] == 1)
        if not serves_all or not isinstance(array, np.ndarray) or array.ndim != max(len(shape), 1) or not len(array):
            return array
        row = shared_row(array)
        if row is None:
            raise InputError(
                f"the model takes one {name!r} for all samples of a call, and the rows of {array_kind(array)} differ",
                hint="call it with one sample, or with the same row for all",
            )
        return row if shape else row.reshape(())

    def _timestep(self, t: object, batch: int) -> npt.NDArray[Any]:
        """Return one timestep in the unit, the dtype and the shape that the graph wants: [], [1] or [batch]."""
        name = self.signature.timestep
        value = self.declared[name]
        step = _one_timestep(t, batch)
        dtype = np.dtype(value.dtype)
        if not isinstance(step, int) and not np.issubdtype(dtype, np.floating):
            raise InputError(
                f"timestep {step:g} lies between two training timesteps, and the graph's input {name!r} is {dtype}",
                hint="compile the model for this sampler, or sample with timestep_spacing leading or trailing",
            )
        if self.deployed is not None and step not in self.deployed:
            near = sorted(sorted(sorted(self.deployed), key=lambda known: abs(known - step))[:2])
            # float32 timesteps of two libraries may differ in the last bits; two rows differ by more.
            if not near or min(abs(known - step) for known in near) > 1e-3:
                raise TimestepNotDeployed(
                    f"timestep {step:g} has no row in this graph's tables; the nearest are "
                    f"{', '.join(f'{known:g}' for known in near)}",
                    hint="sample with the --steps that the graph was compiled for, or compile it for these",
                )
        seen = self.signature.network_time(step)
        if len(value.shape) == 0:
            return np.array(seen, dtype=dtype)
        size = value.shape[0] if isinstance(value.shape[0], int) else batch
        return np.full(size, seen, dtype=dtype)


def _one_timestep(t: object, batch: int) -> Timestep:
    if type(t) is int and t >= 0:  # the usual case, and not a bool
        return t
    array = np.asarray(t)
    if array.dtype.kind not in "iuf" or array.ndim > 1 or array.size not in (1, batch):
        raise InputError(f"the timestep is {array_kind(t)}, expected a number, or an array of 1 or {batch} equal ones")
    first = float(array.flat[0])
    if not first >= 0 or not np.isfinite(first):
        raise InputError(f"timestep {first:g} is not a training timestep", hint="timesteps count 0, 1, 2, ...")
    if not bool(np.all(array == first)):
        raise MixedTimesteps(
            f"the batch holds timesteps {sorted(set(array.tolist()))[:4]}; one call has one timestep",
            hint="call once for each timestep",
        )
    return int(first) if first.is_integer() else first


def array_kind(value: object) -> str:
    """Return dtype and shape of an array, else the name of the type."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
