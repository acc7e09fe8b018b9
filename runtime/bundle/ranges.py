"""The range of each quantizer of a bundle at each timestep, and the calibrated extremes there, for display."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..arrays import Floats
from ..errors import BundleError

RANGES = "ranges.safetensors"
"""Its path in a bundle."""


@dataclass(frozen=True, eq=False)
class Ranges:
    """Q rows in the order of the manifest's quantizers, T columns in the order of the deployment's timesteps.

    `low` and `high` float32 `[Q, T]` are the ends of the grid, the outermost where channels have their own; `scale`
    float32 `[Q, T]` is the largest one. `seen_low` and `seen_high` float32 `[Q, T]` are the extremes of the
    calibration, NaN where none were measured (weights); calls of one group of the calibration share them.
    `timesteps` float64 `[T]`.
    """

    timesteps: npt.NDArray[np.float64]
    low: Floats
    high: Floats
    scale: Floats
    seen_low: Floats
    seen_high: Floats

    def __post_init__(self) -> None:
        shapes = {array.shape for array in (self.low, self.high, self.scale, self.seen_low, self.seen_high)}
        if self.timesteps.ndim != 1 or len(shapes) != 1 or shapes.pop()[1:] != self.timesteps.shape:
            raise ValueError("ranges are [quantizers, timesteps] each")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; the same ranges give the same bytes."""
        Path(path).write_bytes(save({f.name: np.ascontiguousarray(getattr(self, f.name)) for f in fields(self)}))

    @classmethod
    def load(cls, path: str | Path) -> Ranges:
        """Read a file of `save`. Raises BundleError for any other file."""
        try:
            with safe_open(path, framework="numpy") as file:
                return cls(**{f.name: file.get_tensor(f.name) for f in fields(cls)})
        except (OSError, SafetensorError, ValueError) as error:
            raise BundleError(f"not a table of ranges: {error}", where=str(path)) from error
