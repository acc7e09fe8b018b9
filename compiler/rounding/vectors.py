"""gptq for codebooks of vectors (GPTVQ, arXiv 2402.15319): `size` neighbouring inputs of a row are rounded at once.

gptq's errors of the columns b of a vector are e = (w_b - s c) U_bb^-1, and they cost |e|^2. So the best vector c is the
nearest one of the table behind U_bb^-1, and later columns j compensate: w_j -= e U_bj. With vectors of one input this
is gptq. GPTVQ weights the distance by the inverse of the block of H^-1, which is the same number.
"""

from __future__ import annotations

import numpy as np

from mezzotint.runtime.arrays import Floats

from ..core.formats import Vectors, nearest_vectors
from .matrix import ColumnOrder, Matrix, Root, in_place_of


def vector_order(gram: Matrix, size: int, sort: bool) -> ColumnOrder:
    """Columns of the vectors with the largest inputs first, or as they are; those of a vector stay together."""
    groups = np.arange(len(gram)).reshape(-1, size)
    power = np.diagonal(gram).reshape(-1, size).sum(axis=1)
    return (groups[np.argsort(-power, kind="stable")] if sort else groups).reshape(-1)


def gptq_vectors(weight: Matrix, root: Root, scale: Floats, grid: Vectors, *, block: int) -> Floats:
    """Integers `[rows, d]`, as float32. `root` has an order of vector_order."""
    size, table = grid.table.shape[1], grid.table.astype(root.dtype)
    turned = np.ascontiguousarray(weight.T[root.order], dtype=root.dtype)
    integers = np.empty(turned.shape, np.float32)
    step = scale.astype(turned.dtype)[:, None]
    block = max(block // size, 1) * size
    for start in range(0, len(turned), block):
        stop = min(start + block, len(turned))
        rows = np.ascontiguousarray(root.upper[start:stop, start:])
        errors = np.empty((stop - start, turned.shape[1]), turned.dtype)
        for i in range(0, stop - start, size):
            here = slice(i, i + size)
            inverse = np.linalg.inv(rows[here, here])
            values = turned[start + i : start + i + size].T / step
            chosen = table[nearest_vectors(values @ inverse, table @ inverse)]
            integers[start + i : start + i + size] = chosen.T
            errors[here] = ((values - chosen) * step @ inverse).T
            turned[start + i + size : stop] -= rows[here, i + size : stop - start].T @ errors[here]
        if stop < len(turned):
            turned[stop:] -= rows[:, stop - start :].T @ errors
    return in_place_of(integers, root.order)
