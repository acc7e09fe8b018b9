"""Layers in parts whose matrices H fit into the memory; layers with the same input share one matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from .layer_inputs import FloatInputs

Item = TypeVar("Item")


def parts_in_memory(
    items: Iterable[Item],
    inputs_of: Callable[[Item], FloatInputs],
    memory_gb: float,
    most: int | None = None,
    *,
    each: int = 0,
) -> Iterator[list[Item]]:
    """Yield runs of successive items whose matrices take at most `memory_gb` GB, each of `most` items or fewer.

    A run has at least one item, however large its matrix is. With `each` above 0 an item has so many matrices for
    itself, whatever the others read.
    """
    part: list[Item] = []
    keys: set[object] = set()
    size = 0.0
    for item in items:
        inputs = inputs_of(item)
        whole = max(each, 1) * inputs.gram_bytes
        new = 0.0 if inputs.key in keys and not each else whole
        if part and (size + new > memory_gb * 1e9 or len(part) == most):
            yield part
            part, keys, size, new = [], set(), 0.0, whole
        part.append(item)
        keys.add(inputs.key)
        size += new
    if part:
        yield part
