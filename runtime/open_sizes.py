"""Sizes of open dimensions, by the names that a graph declares them with.

A dimension that differs from a named one by a fixed number is written by torch's exporter as `tokens + 16`.
"""

from __future__ import annotations

from collections.abc import Mapping


def known_size(dimension: str | None, named: Mapping[str, int]) -> int | None:
    """Return the size of an open dimension, None for one whose name is not in `named`."""
    name, more = _parts(dimension)
    return named[name] + more if name in named else None


def open_size(dimension: str | None, named: Mapping[str, int], usual: int) -> int:
    """Return the size of an open dimension; one whose name is not in `named` counts as `usual`."""
    name, more = _parts(dimension)
    return named.get(name, usual) + more


def _parts(dimension: str | None) -> tuple[str, int]:
    name, plus, more = (dimension or "").partition(" + ")
    return (name, int(more)) if plus and more.isdecimal() else (dimension or "", 0)
