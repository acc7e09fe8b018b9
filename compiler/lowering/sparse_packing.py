"""Constants with many zeros: a bit for each value and the others alone, unpacked when a session is built.

    ranks   UINT8, eight bits to a byte -> Cast -> Gather(table [256, 8]) -> Cast: the r-th bit set of a byte has r
    before  CumSum over bytes of ReduceMax(ranks): how many values the earlier bytes have
    places  ranks + before * min(ranks, 1): 0 for a zero, n for the n-th value
    result  Gather([0, values], places) -> Reshape

onnxruntime computes all of it in advance, like the other forms of compiler/lowering/packing.py, and its kernels get the
same constants as before: none of them skips a zero. Where zeros come in fours along an axis (the pattern `blocks` of
prune_weights), a bit stands for four values. The values themselves are stored as those of any constant: in 2, 4 or 8
bits, in half precision, in float32. A constant stays dense where that is not larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..graph.nodes import Builder
from .codes import Once

GROUP = 4  # values that one bit may stand for
NODES = 1200  # bytes of the nodes that unpack a constant

Store = Callable[[str, npt.NDArray[Any]], ir.Value]
"""Stores values, and returns them as they were: (a name, values)."""


@dataclass(frozen=True, eq=False)
class SparseForm:
    """`kept` `[n]` says which runs of values are not all 0; `values` `[kept + 1, run]` has them, behind one of zeros.

    Runs of GROUP lie along `axis`, which is moved to the end; runs of one value have none.
    """

    shape: tuple[int, ...]
    axis: int | None
    kept: npt.NDArray[np.bool_]
    values: npt.NDArray[Any]

    @staticmethod
    def of(array: npt.NDArray[Any], bits: int) -> SparseForm | None:
        """Return the smallest form of a constant whose values take so many bits, or None if dense is as small."""
        best, least = None, array.size * bits / 8 - NODES
        for axis in (None, *range(array.ndim)):
            if axis is not None and array.shape[axis] % GROUP:
                continue
            runs = array.reshape(-1, 1) if axis is None else np.moveaxis(array, axis, -1).reshape(-1, GROUP)
            kept: npt.NDArray[np.bool_] = np.asarray(runs.any(axis=1))
            size = np.count_nonzero(kept) * runs.shape[1] * bits / 8 + len(kept) / 8
            if size < least:
                best, least = (axis, kept, runs), size
        if best is None:
            return None
        axis, kept, runs = best
        values = np.concatenate([np.zeros((1, runs.shape[1]), array.dtype), runs[kept]])
        return SparseForm(array.shape, axis, kept, values)


def unpack_sparse(form: SparseForm, build: Builder, store: Store, once: Once, stem: str) -> ir.Value:
    """Add the constants of a form and the nodes that unpack them, and return the result."""
    integer, dtype = ir.DataType.INT32, ir.DataType.from_numpy(form.values.dtype)
    run = form.values.shape[1]
    flat = once("unpacked_shape", (-1,), lambda: np.array([-1], np.int64))
    stored = build.constant(f"{stem}_bits", np.packbits(form.kept, bitorder="little"))
    index = build.op("Cast", [stored], f"{stem}_byte", dtype=integer, attributes={"to": int(integer)})
    narrow = build.op("Gather", [once("bit_ranks", (), _ranks), index], f"{stem}_rank8", dtype=ir.DataType.UINT8)
    ranks = build.op("Cast", [narrow], f"{stem}_rank", dtype=integer, attributes={"to": int(integer)})
    last = once("unpacked_shape", (1,), lambda: np.array([1], np.int64))
    counts = build.op("ReduceMax", [ranks, last], f"{stem}_count", dtype=integer)
    first = once("first_axis", (), lambda: np.array(0, np.int64))
    before = build.op("CumSum", [counts, first], f"{stem}_sum", dtype=integer, attributes={"exclusive": 1})
    one = once("one_bit", (), lambda: np.array(1, np.int32))
    present = build.op("Min", [ranks, one], f"{stem}_set", dtype=integer)
    offset = build.op("Mul", [present, before], f"{stem}_at", dtype=integer)
    places = build.op("Add", [ranks, offset], f"{stem}_place", dtype=integer)
    places = build.op("Reshape", [places, flat], f"{stem}_flat", dtype=integer)
    if len(form.kept) % 8:
        count = len(form.kept)
        start = once("unpacked_shape", (0,), lambda: np.array([0], np.int64))
        end = once("unpacked_shape", (count,), lambda: np.array([count], np.int64))
        places = build.op("Slice", [places, start, end], f"{stem}_cut", dtype=integer)
    values = store(f"{stem}_kept", form.values if run > 1 else form.values[:, 0])
    found = build.op("Gather", [values, places], f"{stem}_all", dtype=dtype)
    moved = form.shape if form.axis is None else _moved(form.shape, form.axis)
    shape = once("unpacked_shape", moved, lambda: np.array(moved, np.int64))
    result = build.op("Reshape", [found, shape], f"{stem}_full", dtype=dtype, shape=moved)
    if form.axis is None or form.axis == len(moved) - 1:
        return result
    back = np.insert(np.arange(len(moved) - 1), form.axis, len(moved) - 1).tolist()
    return build.op("Transpose", [result], f"{stem}_back", dtype=dtype, shape=form.shape, attributes={"perm": back})


def _moved(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], *shape[axis + 1 :], shape[axis])


def _ranks() -> npt.NDArray[np.uint8]:
    """Return, for each byte and each of its bits, how many bits up to it are set, or 0 if it is not `[256, 8]`."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return np.asarray(np.cumsum(bits, axis=1) * bits, np.uint8)
