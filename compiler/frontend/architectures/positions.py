"""Positions of tokens that a pipeline computes from the size of its image, and a network takes as an argument."""

from __future__ import annotations

Region = tuple[tuple[int, int], tuple[int, int]]


def centred_region(height: int, width: int, base_height: int, base_width: int) -> Region:
    """Return (top, left) and (bottom, right) of a grid that is scaled to fit into another, and put into its middle."""
    scale = base_height / height if height * base_width > width * base_height else base_width / width
    tall, wide = round(scale * height), round(scale * width)
    top, left = round((base_height - tall) / 2), round((base_width - wide) / 2)
    return (top, left), (top + tall, left + wide)


def packed_ids(grid: tuple[int, ...], axes: int = 3) -> list[list[float]]:
    """Return the ids of image tokens in rows, `[rows * columns, axes]`: axis 1 is the row, axis 2 the column."""
    height, width = grid
    return [[0.0, float(y), float(x), *([0.0] * (axes - 3))] for y in range(height) for x in range(width)]
