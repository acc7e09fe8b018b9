"""How images are drawn from a bundle: the choices of a caller, as one value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from .. import bounds
from ..errors import InputError
from .guidance import Conditions, checked_rows, rows_in_turn


@dataclass(frozen=True, eq=False)
class SamplingOptions:
    """The choices of `Bundle.sample` by the same names; None stands for the bundle's own.

    `conditions` and `unconditional` map names to arrays `[rows, ...]`. The images take the rows in turn.
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
        bounds.check_number("images", n, bounds.MOST_SAMPLES)
        bounds.check_number("images in one call", self.batch, bounds.MOST_BATCH)
        bounds.check_seed(self.seed)
        return replace(
            self,
            conditions=checked_rows(self.conditions),
            unconditional=checked_rows(self.unconditional, "unconditional"),
        )

    def of_images(self, first: int, stop: int) -> SamplingOptions:
        """Return the options with the condition rows of images first .. stop - 1."""
        n = stop - first
        return replace(
            self,
            conditions=rows_in_turn(self.conditions, first, n),
            unconditional=rows_in_turn(self.unconditional, first, n),
        )
