"""How images are drawn from a bundle: the choices of a caller, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ..errors import InputError
from .guidance import Conditions


@dataclass(frozen=True, eq=False)
class SamplingOptions:
    """The choices of `Bundle.sample` by the same names; None stands for the bundle's own.

    `conditions` and `unconditional` map names to arrays `[n, ...]`, or `[1, ...]` for all images.
    """

    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    guidance: float | None = None
    seed: int = 0
    batch: int = 16
    correction: bool | None = None
    conditions: Conditions = field(default_factory=dict)
    unconditional: Conditions = field(default_factory=dict)

    def checked(self, n: int) -> SamplingOptions:
        """Return these options for `n` images, their conditions as arrays. Raises InputError."""
        if n < 1 or self.batch < 1:
            raise InputError(f"{n} images in batches of {self.batch}", hint="ask for at least one of each")
        return replace(self, conditions=_checked(self.conditions, n), unconditional=_checked(self.unconditional, n))

    def of_images(self, first: int, stop: int) -> SamplingOptions:
        """Return the options with the condition rows of images first .. stop - 1; `[1, ...]` stays as it is."""
        return replace(
            self,
            conditions=_sliced(self.conditions, first, stop),
            unconditional=_sliced(self.unconditional, first, stop),
        )


def _sliced(conditions: Conditions, first: int, stop: int) -> Conditions:
    return {name: array if len(array) == 1 else array[first:stop] for name, array in conditions.items()}


def _checked(conditions: Conditions, n: int) -> Conditions:
    arrays = {name: np.atleast_1d(np.asarray(array)) for name, array in conditions.items()}  # a number is one row
    for name, array in arrays.items():
        if array.shape[0] not in (1, n):
            raise InputError(f"condition {name!r} has shape {list(array.shape)}", hint=f"give [{n}, ...] or [1, ...]")
    return arrays
