"""The choices of an evaluation as one value."""

from __future__ import annotations

from dataclasses import dataclass, field

from mezzotint.runtime import bounds
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.guidance import Conditions

from .metrics import RESAMPLES
from .shards import SHARD_SIZE


@dataclass(frozen=True, eq=False)
class EvaluationOptions:
    """The choices of `evaluate_bundle` by the same names.

    `n` images in calls of `batch`. Without a `seed` the noise is one that no pass has seen. `conditions` and
    `unconditional` map names to arrays `[rows, ...]`, taken in turn. `features` is a name of extractors.py, None for
    the one that fits the samples. `correction` is that of `Bundle.sample`. `speed` measures the time and memory of a
    call.
    """

    n: int = 64
    seed: int | None = None
    batch: int = 16
    conditions: Conditions = field(default_factory=dict)
    unconditional: Conditions = field(default_factory=dict)
    features: str | None = None
    correction: bool | None = None
    speed: bool = True
    resamples: int = RESAMPLES
    shard_size: int = SHARD_SIZE

    def __post_init__(self) -> None:
        if self.n < 1 or self.batch < 1 or self.shard_size < 1:
            raise InputError(f"{self.n} images in batches of {self.batch}", hint="ask for at least one of each")
        bounds.check_number("pairs of images", self.n, bounds.MOST_SAMPLES)
        bounds.check_number("images in one call", self.batch, bounds.MOST_BATCH)
        bounds.check_number("resamples", self.resamples, bounds.MOST_RESAMPLES)
        bounds.check_seed(self.seed)
