"""Codebooks of vectors for a weight: k-means over pairs or quadruples of neighbouring inputs, weighted by the inputs.

    min over c_1 .. c_k of   sum_n min_j sum_i h_ni (u_ni - c_ji)^2,        u = w / s of each row

Lloyd's iterations start, as those of GPTVQ (arXiv 2402.15319), from points that are equally spaced in the order of
their Mahalanobis distance, so that nothing is drawn. At most MOST_POINTS of the points, equally spaced, take part. The
start nearest to 0 is 0 and stays there: silent channels have a value of their own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Floats

from ..core.formats import nearest_vectors
from .codebooks import LARGEST_LEVEL

MOST_POINTS = 1 << 16
LLOYD_ITERATIONS = 30


def vector_table(rows: Floats, scale: Floats, importance: Floats, count: int, size: int) -> npt.NDArray[np.int8]:
    """Return `count` int8 vectors `[count, size]` for weights `[rows, d]`; `importance` is `[rows, d]`."""
    points = (rows / scale[:, None]).reshape(-1, size)
    weights = (importance * scale[:, None].astype(np.float64) ** 2).astype(np.float32).reshape(-1, size)
    every = -(-len(points) // MOST_POINTS)
    points, weights = points[::every].astype(np.float32), weights[::every]
    centers = _start(points, count)
    silent = int(np.square(centers).sum(axis=1).argmin())
    centers[silent] = 0
    for _ in range(LLOYD_ITERATIONS):
        chosen = nearest_vectors(points, centers, weights)
        total, sums = (
            np.stack([np.bincount(chosen, part, count) for part in each.T], axis=1).astype(np.float64)
            for each in (weights, weights * points)
        )
        new = np.where(total > 0, sums / np.where(total > 0, total, 1), centers)
        new[silent] = 0
        if np.abs(new - centers).max() < 0.5:  # of a step of the int8 grid
            centers = new
            break
        centers = new
    table: npt.NDArray[np.int8] = np.clip(np.rint(centers), -LARGEST_LEVEL, LARGEST_LEVEL).astype(np.int8)
    return table


def _start(points: Floats, count: int) -> npt.NDArray[np.float64]:
    centered = points - points.mean(axis=0)
    spread = centered.T @ centered / len(points) + 1e-6 * np.eye(points.shape[1])
    distance = np.einsum("ni,ij,nj->n", centered, np.linalg.inv(spread), centered)
    order = np.argsort(distance, kind="stable")
    chosen = order[np.rint(np.linspace(0, len(points) - 1, count)).astype(np.int64)]
    return points[chosen].astype(np.float64)
