"""Weights of few different integers, stored by code: the bits of a code for each weight, and a table of integers.

    codes     4 bits: UINT4. Others, and opsets without it: `[m, bits]` bytes, eight weights to a row; bit i of byte k
              is bit k of the code of weight i
    table     int8 `[levels]` for the whole weight, or `[rows, levels]` for its output channels; of vectors of
              neighbouring inputs, `[vectors, size]`, where a code is that of a vector and has up to 8 bits. A weight
              whose vectors are all in the table of one before has that table

The operations that unpack them read constants alone, so that onnxruntime computes them once, when it builds a session
(measured on 1.23.2 and 1.32.0):

    Cast(INT32) [-> Add(256 k) -> Gather(2^k times the bits of a byte) -> ReduceSum] -> Gather(table) -> Reshape

Rows with tables of their own use GatherElements in the last step. onnxruntime frees all of this when the session is
built: 4 bytes for a weight whose codes are whole (4 bits, or 8), else 4 bytes for each bit of a code and 7 more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Integers

from ..graph.nodes import Builder, consumers, is_constant, is_op

CODE_BITS = 4
_CHUNK = 1 << 20  # weights whose integers are counted at once
_BYTE = 8
_UNPACKING = ("Cast", "Add", "Gather", "GatherElements", "ReduceSum", "Reshape", "Slice")
VECTOR_SIZES = (2, 4)
_WORDS = {2: np.uint16, 4: np.uint32}
_LOOK_FIRST = 1 << 14  # vectors that are counted before all others

BITS_OF_BYTES: npt.NDArray[np.int8] = (np.arange(256)[:, None] >> np.arange(_BYTE) & 1).astype(np.int8)
"""The bits of each byte `[256, 8]`, the lowest one first."""

Once = Callable[[str, tuple[int, ...], Callable[[], npt.NDArray[Any]]], ir.Value]
"""(preferred name, key, make): a constant that the unpacking of several weights shares."""


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight by code: `codes` uint8 `[n]` in the order of the weight, or `[rows, inputs]` where rows have tables.

    Codes of vectors of `size` inputs are `[rows, inputs / size]`.
    """

    codes: npt.NDArray[np.uint8]
    table: npt.NDArray[np.int8]
    bits: int
    size: int = 1

    @property
    def nbytes(self) -> int:
        """Return the bytes of the packed codes and of the table."""
        return -(-self.codes.size // _BYTE) * self.bits + self.table.nbytes

    def on(self, other: Coded) -> Coded | None:
        """Return vectors by the codes of another weight's table, if it has all of them and its codes as many bits."""
        if (self.size, self.bits) != (other.size, other.bits) or self.size == 1:
            return None
        own, theirs = (each.table.view(_WORDS[self.size])[:, 0] for each in (self, other))  # ascending
        places = np.minimum(np.searchsorted(theirs, own), len(theirs) - 1)
        if not np.array_equal(theirs[places], own):
            return None
        return Coded(places[self.codes].astype(np.uint8), other.table, self.bits, self.size)


def coded(q: Integers, axis: int) -> Coded | None:
    """Return int8 integers by code, in the form of fewest bytes, or None where there are too many of them."""
    rows = np.moveaxis(q, axis, 0).reshape(q.shape[axis], -1)
    present = np.zeros((len(rows), 256), bool)
    every = max(_CHUNK // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), every):
        part = rows[start : start + every]
        present[np.arange(start, start + len(part))[:, None], part.astype(np.int16) + 128] = True
    found = [by_vector for size in VECTOR_SIZES if (by_vector := _of_vectors(rows, size)) is not None]
    most = int(present.sum(axis=1).max())
    if most > 1 << CODE_BITS:
        return min(found, key=lambda one: one.nbytes, default=None)
    levels = np.flatnonzero(present.any(axis=0)) - 128
    flat = None
    if len(levels) <= 1 << CODE_BITS:
        codes = np.searchsorted(levels, q.reshape(-1)).astype(np.uint8)
        flat = Coded(codes, levels.astype(np.int8), _bits(len(levels)))
        found.append(flat)
    bits = _bits(most)
    if flat is None or bits < flat.bits:
        # Ascending integers of each row, the last one repeated; the code of an integer is how many are smaller.
        smaller = np.cumsum(present, axis=1) - present
        table = np.empty((len(rows), 1 << bits), np.int8)
        table[...] = (255 - present[:, ::-1].argmax(axis=1) - 128)[:, None]
        row, value = np.nonzero(present)
        table[row, smaller[row, value]] = value - 128
        codes = np.take_along_axis(smaller, rows.astype(np.int64) + 128, axis=1).astype(np.uint8)
        found.append(Coded(codes, table, bits))
    return min(found, key=lambda one: one.nbytes)


def _of_vectors(rows: Integers, size: int) -> Coded | None:
    """Return rows `[rows, inputs]` by codes of vectors, or None where there are more than 256 different ones."""
    if rows.shape[1] % size:
        return None
    words = np.ascontiguousarray(rows).view(_WORDS[size])
    if len(np.unique(words.reshape(-1)[:_LOOK_FIRST])) > 256:
        return None
    vectors, codes = np.unique(words, return_inverse=True)
    if len(vectors) > 256:
        return None
    bits = max(_bits(len(vectors)), 4)
    table = vectors.view(np.int8).reshape(-1, size)
    return Coded(codes.reshape(words.shape).astype(np.uint8), table, bits + bits % 2, size)


def code_facts(value: ir.Value) -> tuple[int, int] | None:
    """Return (bits, number) of the weights whose codes a constant has, else None. A vector has its bits in common."""
    if value.dtype not in (ir.DataType.UINT4, ir.DataType.UINT8) or value.shape is None or not len(value.shape):
        return None
    bits = 4 if value.dtype == ir.DataType.UINT4 else int(value.shape.numpy()[-1]) if len(value.shape) == 2 else 8
    number = value.shape.numpy()[0] * (_BYTE if len(value.shape) == 2 else 1)
    node = next((node for node, _ in value.uses() if is_op(node, "Cast")), None)
    while node is not None and is_op(node, *_UNPACKING):
        table = node.inputs[0]
        if is_op(node, "Gather", "GatherElements") and is_constant(table) and table is not None:
            tensor = table.const_value
            if tensor is None or not node.outputs[0].name or not table.name or not table.name.endswith("_levels"):
                return None
            size = int(tensor.shape.numpy()[1]) if is_op(node, "Gather") and len(tensor.shape) == 2 else 1
            return bits // size, int(number) * size
        following = consumers(node.outputs[0])
        node = following[0] if following else None
    return None


def unpacked(
    build: Builder,
    once: Once,
    once_table: Callable[[int], ir.Value],
    weight: Coded,
    shape: tuple[int, ...],
    axis: int,
    stem: str,
    *,
    whole: bool,
    levels: ir.Value | None = None,
) -> ir.Value:
    """Write the codes and the nodes that unpack them. Return the int8 weight of this shape.

    `levels` is the table where it is written already. `once_table` gives BITS_OF_BYTES times 2^k for k below the bits
    of a code, int32 `[256 bits, 8]`. Codes are stored `whole`, as UINT4, or bit by bit. Names of what a session folds
    are short: they are most of the bytes that a small weight adds.
    """
    count, bits = weight.codes.size, weight.bits
    int8, int32 = ir.DataType.INT8, ir.DataType.INT32

    def numbers(*values: int) -> ir.Value:
        return once("unpacked_shape", values, lambda: np.array(values, np.int64))

    if whole:
        tensor = ir.PackedTensor(_halves(weight.codes.reshape(-1)), ir.DataType.UINT4, shape=ir.Shape([count]))
        codes = build.op(
            "Cast", [build.constant(f"{stem}_codes", tensor)], "code_index", dtype=int32, attributes={"to": int(int32)}
        )
    elif bits == _BYTE:
        stored = build.constant(f"{stem}_codes", weight.codes.reshape(-1))
        codes = build.op("Cast", [stored], "code_index", dtype=int32, attributes={"to": int(int32)})
    else:
        stored = build.constant(f"{stem}_codes", _planes(weight.codes.reshape(-1), bits))
        index = build.op("Cast", [stored], "code_bytes", dtype=int32, attributes={"to": int(int32)})
        if bits > 1:
            starts = once("code_starts", (bits,), lambda: 256 * np.arange(bits, dtype=np.int32))
            index = build.op("Add", [index, starts], "code_places", dtype=int32)
        looked_up = build.op("Gather", [once_table(bits), index], "code_bits", dtype=int32)
        codes = build.op("ReduceSum", [looked_up, numbers(1)], "code_index", dtype=int32, attributes={"keepdims": 0})
        if count % _BYTE:
            codes = build.op("Reshape", [codes, numbers(-1)], "code_flat", dtype=int32)
            codes = build.op("Slice", [codes, numbers(0), numbers(count)], "code_cut", dtype=int32)
    levels = build.constant(f"{stem}_levels", weight.table) if levels is None else levels
    by_rows = weight.size > 1 or weight.table.ndim == 2
    turned = (shape[axis], *(n for i, n in enumerate(shape) if i != axis)) if by_rows else shape
    if weight.table.ndim == 1 or weight.size > 1:
        values = build.op("Gather", [levels, codes], "code_values", dtype=int8)
    else:
        codes = build.op("Reshape", [codes, numbers(*weight.codes.shape)], "code_rows", dtype=int32)
        values = build.op("GatherElements", [levels, codes], "code_values", dtype=int8, attributes={"axis": 1})
    values = build.op("Reshape", [values, numbers(*turned)], "code_weight", dtype=int8, shape=ir.Shape(turned))
    if by_rows and axis:  # whatever the sizes: those of a square weight do not say that it is turned
        back = [i + (i < axis) for i in range(len(shape))]
        back[axis] = 0
        values = build.op(
            "Transpose", [values], f"{stem}_unpacked", dtype=int8, shape=ir.Shape(shape), attributes={"perm": back}
        )
    return values


def _bits(count: int) -> int:
    return max((count - 1).bit_length(), 1)


def _halves(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return codes of 4 bits `[n]`, two to a byte, the first one in the low half."""
    pairs = np.concatenate([codes, np.zeros(len(codes) % 2, np.uint8)]).reshape(-1, 2)
    packed: npt.NDArray[np.uint8] = pairs[:, 0] | pairs[:, 1] << 4
    return packed


def _planes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return `[m, bits]` bytes of codes `[n]`, eight to a row, the first one in the low bits."""
    rows = np.concatenate([codes, np.zeros(-len(codes) % _BYTE, np.uint8)]).reshape(-1, 1, _BYTE)
    planes = rows >> np.arange(bits, dtype=np.uint8)[:, None] & 1
    return np.packbits(planes, axis=2, bitorder="little")[:, :, 0]
