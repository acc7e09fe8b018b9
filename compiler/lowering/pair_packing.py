"""Large 4-bit weights with at most two of every four inputs left (2:4), in 3 bits a value.

    pairs     UINT8, a nibble for each four values: which two of them are left, one of six pairs
    both      UINT8, the two values of each four, a nibble for each
    result    Gather(values of fours [6 * 256, 4], 256 pair + both) -> Reshape

The bits of sparse_packing.py take as many bytes, but onnxruntime frees what it computes in advance only when a session
is built: 25 bytes for each value there, and 7 here. A network of 860 M weights did not open in 23 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Integers

from ..graph.nodes import Builder
from .codes import Once

LARGE = 1 << 20  # values of a weight; below, memory is no matter, and the table would be a part of the file
FOUR = 4
PAIRS = tuple(combinations(range(FOUR), 2))


@dataclass(frozen=True, eq=False)
class PairForm:
    """A weight of `shape` in fours along `axis`: `pairs` `[n]` are numbers of PAIRS, `both` int8 `[n, 2]` the values.

    n is even.
    """

    shape: tuple[int, ...]
    axis: int
    pairs: npt.NDArray[np.uint8]
    both: Integers

    @staticmethod
    def of(q: Integers) -> PairForm | None:
        """Return the form of integers in -8 .. 7, or None where they have none or are few."""
        if q.size < LARGE or q.min() < -8 or q.max() > 7:
            return None
        for axis in range(q.ndim):
            if q.shape[axis] % FOUR or q.size % (2 * FOUR):
                continue
            fours = np.moveaxis(q, axis, -1).reshape(-1, FOUR)
            kept = (fours != 0) @ (1 << np.arange(FOUR)).astype(np.uint8)
            pairs = _PAIR_OF[kept]
            if (pairs < len(PAIRS)).all():
                both = np.take_along_axis(fours, np.array(PAIRS)[pairs], axis=1)
                return PairForm(q.shape, axis, pairs, both)
        return None


def unpack_pairs(form: PairForm, build: Builder, once: Once, stem: str) -> ir.Value:
    """Add the constants of a form and the nodes that unpack them, and return the int8 weight."""
    integer, int8 = ir.DataType.INT32, ir.DataType.INT8
    nibbles = form.pairs.reshape(-1, 2)
    stored = build.constant(f"{stem}_pairs", nibbles[:, 0] | nibbles[:, 1] << 4)
    index = build.op("Cast", [stored], f"{stem}_byte", dtype=integer, attributes={"to": int(integer)})
    pairs = build.op("Gather", [once("pair_starts", (), _starts), index], f"{stem}_start", dtype=integer)
    low, high = (form.both[:, k].astype(np.uint8) & 15 for k in (0, 1))
    values = build.constant(f"{stem}_both", (low | high << 4).reshape(-1, 2))
    wide = build.op("Cast", [values], f"{stem}_wide", dtype=integer, attributes={"to": int(integer)})
    code = build.op("Add", [pairs, wide], f"{stem}_code", dtype=integer)
    fours = build.op("Gather", [once("pair_values", (), _fours), code], f"{stem}_fours", dtype=int8)
    moved = (*form.shape[: form.axis], *form.shape[form.axis + 1 :], form.shape[form.axis])
    shape = once("unpacked_shape", moved, lambda: np.array(moved, np.int64))
    result = build.op("Reshape", [fours, shape], f"{stem}_full", dtype=int8, shape=moved)
    if form.axis == len(moved) - 1:
        return result
    back = np.insert(np.arange(len(moved) - 1), form.axis, len(moved) - 1).tolist()
    return build.op("Transpose", [result], f"{stem}_back", dtype=int8, shape=form.shape, attributes={"perm": back})


def _pair_of() -> npt.NDArray[np.uint8]:
    """Return a pair that has all bits of each mask of four; len(PAIRS) for masks of more bits."""
    found = np.full(1 << FOUR, len(PAIRS), np.uint8)
    for number, (a, b) in reversed(list(enumerate(PAIRS))):
        for mask in (0, 1 << a, 1 << b, 1 << a | 1 << b):
            found[mask] = number
    return found


def _starts() -> npt.NDArray[np.int32]:
    """Return where the values of both pairs of each byte start `[256, 2]`."""
    byte = np.arange(256)
    return np.asarray(np.stack([byte & 15, byte >> 4], axis=1) * 256, np.int32)


def _fours() -> npt.NDArray[np.int8]:
    """Return the four values of each pair and each byte of two values `[6 * 256, 4]`."""
    byte = np.arange(256)
    found = np.zeros((len(PAIRS), 256, FOUR), np.int8)
    for number, pair in enumerate(PAIRS):
        for place, nibble in zip(pair, (byte & 15, byte >> 4), strict=True):
            found[number, :, place] = (nibble ^ 8) - 8
    return found.reshape(-1, FOUR)


_PAIR_OF = _pair_of()
