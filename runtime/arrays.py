"""Array types that are named after what they hold. Images are in signature.py, conditions in sampling/guidance.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

AnyArray = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[Any]
"""Of one of numpy's integer types: int8 to int64, or unsigned."""


def shared_row(rows: AnyArray) -> AnyArray | None:
    """Return the one row, `[1, ...]`, that all rows `[n, ...]` are equal to, or None where they differ."""
    return rows[:1] if len(rows) == 1 or bool((rows == rows[:1]).all()) else None
