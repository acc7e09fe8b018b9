"""Values of a manifest with a form of their own. What is not of that form raises ValueError or TypeError."""

from __future__ import annotations

import re
from typing import Any

_DTYPES = ("float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool")  # those of runtime/session.py
_FORMAT = re.compile(r"u?int([1-9]|1[0-6]|32)")


def dtype_name(value: Any) -> str:
    """Return the name of a dtype that a graph's input may have."""
    if value not in _DTYPES:
        raise ValueError(f"not one of {', '.join(_DTYPES)}")
    return str(value)


def declared_sizes(values: Any) -> tuple[int | str | None, ...]:
    """Return the declared shape of an input: sizes, names, and None for open ones."""
    if not isinstance(values, list) or len(values) > 32:
        raise ValueError("not a list of sizes")
    if not all(value is None or isinstance(value, str) or (type(value) is int and value >= 0) for value in values):
        raise ValueError("a size is a name, null, or an integer that is not negative")
    return tuple(values)


def format_name(value: Any) -> str:
    """Return the name of a quantizer's format."""
    if not isinstance(value, str) or not _FORMAT.fullmatch(value):
        raise ValueError("not a format such as int8 or uint4")
    return value


def number_and_size(value: Any) -> tuple[int, int]:
    """Return the two integers of a list."""
    number, size = (int(n) for n in value)
    return number, size


def scale_or_range(value: Any) -> float | tuple[float, float]:
    """Return the only scale, or (smallest, largest)."""
    if isinstance(value, list):
        low, high = (float(end) for end in value)
        return low, high
    return float(value)
