"""Weights of few different integers, stored by code: the bits of a code for each weight, and a table of integers.

    codes     `[m, bits]` bytes: bit i of byte k of a row is bit k of the code of its weight i, eight weights to a row
    table     int8 `[levels]` for the whole weight, or `[rows, levels]` for its output channels

The operations that unpack them read constants alone, so that onnxruntime computes them once, when it builds a session
(measured on 1.23.2 and 1.32.0):

    Cast(INT32) -> Add([0, 256, ..]) -> Gather(bits of a byte, times 2^k) -> ReduceSum -> Gather(table)

Rows with tables of their own use GatherElements in the last step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Integers

from ..graph.nodes import Builder, consumers, is_op

CODE_BITS = 4
_CHUNK = 1 << 20  # weights whose integers are counted at once
_BYTE = 8

Once = Callable[[str, tuple[int, ...], Callable[[], npt.NDArray[Any]]], ir.Value]
"""(preferred name, key, make): a constant that the unpacking of several weights shares."""


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight by code: `codes` uint8 in the order of the weight, or `[rows, inputs]` where rows have tables."""

    codes: npt.NDArray[np.uint8]
    table: npt.NDArray[np.int8]
    bits: int

    @property
    def nbytes(self) -> int:
        """Return the bytes of the packed codes and of the table."""
        return -(-self.codes.size // _BYTE) * self.bits + self.table.nbytes


def coded(q: Integers, axis: int) -> Coded | None:
    """Return int8 integers by code, with the smaller of the two tables, or None where a row has too many of them."""
    rows = np.moveaxis(q, axis, 0).reshape(q.shape[axis], -1)
    present = np.zeros((len(rows), 256), bool)
    every = max(_CHUNK // max(rows.shape[1], 1), 1)
    for start in range(0, len(rows), every):
        part = rows[start : start + every]
        present[np.arange(start, start + len(part))[:, None], part.astype(np.int16) + 128] = True
    most = int(present.sum(axis=1).max())
    if most > 1 << CODE_BITS:
        return None
    levels = np.flatnonzero(present.any(axis=0)) - 128
    found = []
    if len(levels) <= 1 << CODE_BITS:
        codes = np.searchsorted(levels, q.reshape(-1)).astype(np.uint8)
        found.append(Coded(codes, levels.astype(np.int8), _bits(len(levels))))
    bits = _bits(most)
    if not found or bits < found[0].bits:
        # Ascending integers of each row, the last one repeated; the code of an integer is how many are smaller.
        smaller = np.cumsum(present, axis=1) - present
        table = np.empty((len(rows), 1 << bits), np.int8)
        table[...] = (255 - present[:, ::-1].argmax(axis=1) - 128)[:, None]
        row, value = np.nonzero(present)
        table[row, smaller[row, value]] = value - 128
        codes = np.take_along_axis(smaller, rows.astype(np.int64) + 128, axis=1).astype(np.uint8)
        found.append(Coded(codes, table, bits))
    return min(found, key=lambda one: one.nbytes)


def code_bits(value: ir.Value) -> int | None:
    """Return the bits of a code where a constant has the codes of a weight, else None."""
    cast = next((node for node, _ in value.uses() if is_op(node, "Cast")), None)
    if value.dtype != ir.DataType.UINT8 or cast is None or value.shape is None:
        return None
    readers = [node for node, _ in cast.outputs[0].uses()]
    readers = [
        node for reader in readers for node in ([reader] if is_op(reader, "Gather") else consumers(reader.outputs[0]))
    ]
    tables = [node.inputs[0] for node in readers if is_op(node, "Gather")]
    of_codes = tables and tables[0] is not None and tables[0].dtype == ir.DataType.INT32
    return int(value.shape.numpy()[-1]) if of_codes else None


def unpacked(
    build: Builder, once: Once, table: ir.Value, weight: Coded, shape: tuple[int, ...], axis: int, stem: str
) -> ir.Value:
    """Write the codes and the nodes that unpack them. Return the int8 weight of this shape.

    `table` has the numbers of `bits_of_bytes` as int32.
    """
    count, bits = weight.codes.size, weight.bits
    int8, int32 = ir.DataType.INT8, ir.DataType.INT32
    stored = build.constant(f"{stem}_codes", _planes(weight.codes.reshape(-1), bits))
    index = build.op("Cast", [stored], f"{stem}_bytes", dtype=int32, attributes={"to": int(int32)})
    if bits > 1:
        places = once("code_planes", (bits,), lambda: np.arange(bits, dtype=np.int32) * 256)
        index = build.op("Add", [index, places], f"{stem}_places", dtype=int32)
    looked_up = build.op("Gather", [table, index], f"{stem}_bits", dtype=int32)
    one = once("code_axis", (1,), lambda: np.array([1], np.int64))
    codes = build.op("ReduceSum", [looked_up, one], f"{stem}_index", dtype=int32, attributes={"keepdims": 0})

    def numbers(*values: int) -> ir.Value:
        return once("unpacked_shape", values, lambda: np.array(values, np.int64))

    if count % _BYTE:
        codes = build.op("Reshape", [codes, numbers(-1)], f"{stem}_flat", dtype=int32)
        codes = build.op("Slice", [codes, numbers(0), numbers(count)], f"{stem}_cut", dtype=int32)
    levels = build.constant(f"{stem}_levels", weight.table)
    if weight.table.ndim == 1:
        values = build.op("Gather", [levels, codes], f"{stem}_rows", dtype=int8)
        turned = shape
    else:
        codes = build.op("Reshape", [codes, numbers(*weight.codes.shape)], f"{stem}_turned", dtype=int32)
        values = build.op("GatherElements", [levels, codes], f"{stem}_rows", dtype=int8, attributes={"axis": 1})
        turned = (shape[axis], *(n for i, n in enumerate(shape) if i != axis))
    values = build.op("Reshape", [values, numbers(*turned)], f"{stem}_unpacked", dtype=int8, shape=ir.Shape(turned))
    if turned != shape:
        back = [i + (i < axis) for i in range(len(shape))]
        back[axis] = 0
        values = build.op(
            "Transpose", [values], f"{stem}_as_read", dtype=int8, shape=ir.Shape(shape), attributes={"perm": back}
        )
    return values


def _bits(count: int) -> int:
    return max((count - 1).bit_length(), 1)


def _planes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Return `[m, bits]` bytes of codes `[n]`, eight to a row, the first one in the low bits."""
    rows = np.concatenate([codes, np.zeros(-len(codes) % _BYTE, np.uint8)]).reshape(-1, 1, _BYTE)
    planes = rows >> np.arange(bits, dtype=np.uint8)[:, None] & 1
    return np.packbits(planes, axis=2, bitorder="little")[:, :, 0]


def bits_of_bytes(bits: int) -> npt.NDArray[np.int8]:
    """Return 2^k times each bit of each byte `[bits * 256, 8]`, the table of plane k behind that of plane k - 1."""
    whole = np.arange(256)[:, None] >> np.arange(_BYTE) & 1
    return np.concatenate([whole << k for k in range(bits)]).astype(np.int8)
