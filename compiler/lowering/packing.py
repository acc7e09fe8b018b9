"""Storage of the constants of a lowered graph: as few bytes as their values need, without any change of values.

A narrow format saves nothing while each of its integers takes a byte, and an INT4 weight behind a DequantizeLinear
would run in float. So the file holds narrow constants, and operations on constants alone unpack them for their readers.
onnxruntime computes these once, when a session is built, and the kernels get the same constants as before:

    weight, integers in -8 .. 7     INT4 -> Cast(INT8); opset < 21 has no INT4: as below, two to a byte
    weight, integers in -2 .. 1     UINT8, four to a byte -> Gather(table [256, 4], Cast(INT32)) -> Reshape
    weight, only some channels so   Gather(Concat(narrow rows, the other rows), order)
    weight, few different integers  codes of 1 to 4 bits and a table (compiler/lowering/codes.py)
    float32, exact in half          FLOAT16 -> Cast(FLOAT)
    table of integers               INT8 or INT16, less the middle of each column -> Cast -> Add(middle)
    weight with many zeros          a bit for each value, and the others (sparse_packing.py)
    the same, large, 2:4, 4 bits    pairs of places and of values (pair_packing.py)

The values alone decide, not the plan; `store_half` makes float constants exact in half. Measured on onnxruntime 1.31.1
and 1.23.2: all of these are folded, before QLinearConv, MatMulIntegerToFloat and in QDQ form; for weights of 2560 x
1280 x 3 x 3 too. INT2 (opset 25) with a Cast is folded by 1.31.1, but 1.23.2 does not open a model of that opset, hence
the table. Three bits are stored in four, five to seven in eight; a codebook (choose_levels) in those of its codes.

Building a session takes more time and memory, because onnxruntime frees folded constants at the end, and the allocator
may keep their memory. Ten weights of 14.7 M integers in a separate file: int8 0.3 s and 227 MB at most; INT4 0.9 s and
261 MB (1.31.1) or 389 (1.23.2); two bits 1.4 s and 543 to 565 MB; as float32 they are 590 MB. Calls cost the same, to
the bit: digits, W4A8, INT4 against int8 storage, 2 threads, in turns: 0.99 and 1.02 of the time (batch 8 and 1). Zeros
are left out of MOST_SPARSE values at most, because each value takes 25 bytes when a session is built; codes behind the
first MOST_BITWISE are whole, in 4 bits or 8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import Integers

from ..graph.nodes import Builder, Names, name_of, numpy_of
from ..graph.scopes import CONSTANTS_SCOPE
from .codes import BITS_OF_BYTES, Coded, coded, unpacked
from .packable import SMALLEST_SAVING, integer_weights, is_float_weight, is_half, is_table
from .pair_packing import PairForm, unpack_pairs
from .sparse_packing import SparseForm, Store, unpack_sparse

INT4_OPSET, INT4_IR = 21, 10
MOST_SPARSE = 1 << 27  # values of all constants whose zeros are left out one by one
MOST_BITWISE = 1 << 28  # codes of all constants that are stored bit by bit
CODES_COST = 2048  # of the nodes that unpack codes
_NARROW = (np.int8, np.uint8, np.int16)

WeightStorage = Literal["parts", "whole", "int8"]


def pack(model: ir.Model, weights: WeightStorage = "parts") -> None:
    """Store the constants of a lowered graph in fewer bytes; edits the model.

    `weights` are stored in parts of several widths, each as a `whole` in INT4 where that holds all of its values, or
    as they are, in `int8`; then no constant is changed, for engines that fold no operations on constants.

    The exporter's notes on nodes and constants are removed too: the dumps of the passes keep them, and no session reads
    them.
    """
    for annotated in (*model.graph, *model.graph.initializers.values()):
        annotated.metadata_props.clear()
    if weights == "int8":
        return
    packer = _Packer(model)
    given = list(model.graph.initializers.values())  # not the tables that unpack weights
    for value, axis in list(integer_weights(model.graph)):
        packer.weight(value, axis, whole=weights == "whole")
    for value in given:
        if is_table(value):
            packer.table(value)
        else:
            packer.floats(value)


def pack_floats(model: ir.Model) -> None:
    """Store the float constants of a graph that are exact in half precision, or have many zeros; edits the model."""
    packer = _Packer(model)
    for value in list(model.graph.initializers.values()):
        packer.floats(value)


def _widths(q: Integers, axis: int) -> npt.NDArray[np.int64]:
    """Return the bits in which each output channel is stored: 2, 4 or 8; narrow ones only for enough saving."""
    rows = np.moveaxis(q, axis, 0).reshape(q.shape[axis], -1)
    low, high = rows.min(axis=1), rows.max(axis=1)
    widths = np.full(len(rows), 8)
    for bits in (4, 2):
        widths[(low >= -(1 << (bits - 1))) & (high < 1 << (bits - 1))] = bits
    for bits, wider in ((2, 4), (4, 8)):
        chosen = widths == bits
        order = 0 if chosen.all() else 4 * len(rows)
        if int(chosen.sum()) * rows.shape[1] * (wider - bits) // 8 < SMALLEST_SAVING + order:
            widths[chosen] = wider
    return widths


def _narrow(array: Integers) -> type[np.generic] | None:
    """Return the narrowest of _NARROW that holds these integers, or None."""
    low, high = int(array.min()), int(array.max())
    return next((kind for kind in _NARROW if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), None)


def _in_bytes(q: Integers, bits: int, lowest: int) -> npt.NDArray[np.uint8]:
    """Pack integers >= `lowest`, several to a byte, the first one in the low bits; the last byte is padded with 0."""
    count = 8 // bits
    flat = (q.reshape(-1) - np.int8(lowest)).astype(np.uint8) & np.uint8((1 << bits) - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % count, np.uint8)])
    packed = np.zeros(len(flat) // count, np.uint8)
    for i in range(count):
        packed |= flat[i::count] << np.uint8(i * bits)
    return packed


def _table_of(bits: int) -> npt.NDArray[np.int8]:
    """Return the integers that each byte stands for, `[256, 8 // bits]`."""
    shifts = np.arange(0, 8, bits)
    return ((np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)) - (1 << (bits - 1))).astype(np.int8)


class _Packer:
    """Writes narrow constants, and the nodes that unpack them, before a graph's first node."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.build = Builder(self.graph, Names(self.graph), before=self.graph[0], scope=CONSTANTS_SCOPE)
        self._count = self._unpacked = self._bitwise = 0
        self._shared: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
        self._vectors: list[tuple[Coded, ir.Value]] = []  # weights that brought a table of vectors

    def weight(self, value: ir.Value, axis: int, *, whole: bool = False) -> None:
        """Store a weight by output channels, each in the bits that its values need; a `whole` one in INT4 only."""
        q, stem = numpy_of(value), name_of(value)
        widths = _widths(q, axis) if q.size else np.array([8])
        if whole:
            int4 = self.model.opset_imports.get("", 0) >= INT4_OPSET and widths.max() <= 4
            widths = np.full_like(widths, 4 if int4 else 8)
        groups = [(int(bits), np.flatnonzero(widths == bits)) for bits in np.unique(widths)]
        if groups[-1][0] == 8 and q.size and not whole:
            size = sum(bits * len(rows) * q.size // len(widths) // 8 for bits, rows in groups)
            if (by_code := coded(q, axis)) is not None and by_code.nbytes + CODES_COST <= size:
                self._replace(value, self._decoded(by_code, q.shape, axis, stem))
                return
        if groups[0][0] == 8 and (whole or self._sparse_form(q, 8) is None):
            return
        parts = []
        for bits, rows in groups:
            part = q if len(groups) == 1 else np.take(q, rows, axis)
            pairs = PairForm.of(part) if bits == 4 and not whole else None
            form = None if whole or pairs is not None else self._sparse_form(part, bits)
            if pairs is not None:
                parts.append(unpack_pairs(pairs, self.build, self._once, self._short_stem()))
            elif form is None:
                parts.append(self._stored(bits, f"{stem}_int{bits}", part))
            else:
                parts.append(self._sparse(form, partial(self._stored, bits)))
        self._replace(value, self._joined(parts, [rows for _, rows in groups], axis, stem))

    def floats(self, value: ir.Value) -> None:
        """Store a float constant in half precision where it is exact, and by its values that are not 0 if few are."""
        half = is_half(value)
        form = self._sparse_form(numpy_of(value), 16 if half else 32) if is_float_weight(value) else None
        if form is not None:
            self._replace(value, self._sparse(form, self._in_half if half else self.build.constant))
        elif half:
            self._replace(value, self._in_half(name_of(value), numpy_of(value)))

    def _sparse_form(self, array: npt.NDArray[Any], bits: int) -> SparseForm | None:
        """Return the form of a constant without its zeros, None where it is no smaller or too much has one already."""
        return None if self._unpacked + array.size > MOST_SPARSE else SparseForm.of(array, bits)

    def _sparse(self, form: SparseForm, stored: Store) -> ir.Value:
        self._unpacked += prod(form.shape)
        return unpack_sparse(form, self.build, stored, self._once, self._short_stem())

    def _short_stem(self) -> str:
        """Return a name for a dozen nodes: that of the weight in each would be a large part of a small file."""
        self._count += 1
        return f"z{self._count}"

    def _in_half(self, stem: str, array: npt.NDArray[Any]) -> ir.Value:
        """Store an array in half precision, and return it in float32."""
        stored = self.build.constant(f"{stem}_half", array.astype(np.float16))
        return self._cast(stored, ir.DataType.FLOAT, f"{stem}_float")

    def table(self, value: ir.Value) -> None:
        """Store the columns of a table that fit into two bytes, or do so once their middle is subtracted."""
        array, stem = numpy_of(value).astype(np.int64), name_of(value)
        columns = array if array.ndim == 2 else array.reshape(-1, 1)
        if not array.size or value.dtype is None:
            return
        wide, limit = value.dtype.numpy(), int(np.iinfo(np.int16).max)
        low, high = columns.min(axis=0), columns.max(axis=0)
        largest = max(-int(low.min()), int(high.max()))
        if largest > np.iinfo(np.int32).max:
            return
        middle = np.zeros_like(low) if array.ndim != 2 or largest <= limit else (low + high) // 2
        moved = columns - middle
        fits = np.maximum(high - middle, middle - low) <= limit
        kept, rest = np.flatnonzero(fits), np.flatnonzero(~fits)
        kind = _narrow(moved[:, kept]) if kept.size else None
        if kind is None:
            return
        cost = SMALLEST_SAVING + 4 * len(fits) * bool(rest.size) + wide.itemsize * len(kept) * bool(middle.any())
        if moved[:, kept].size * (wide.itemsize - np.dtype(kind).itemsize) < cost:
            return
        narrow = moved[:, kept].astype(kind).reshape(array.shape if not rest.size else (len(columns), len(kept)))
        part = self._cast(self.build.constant(f"{stem}_narrow", narrow), value.dtype, f"{stem}_wide")
        if middle.any():
            middles = self.build.constant(f"{stem}_middle", middle[kept].astype(wide))
            part = self.build.op("Add", [part, middles], f"{stem}_moved", like=part)
        parts, members = [part], [kept]
        if rest.size:
            parts.append(self.build.constant(f"{stem}_rest", columns[:, rest].astype(wide)))
            members.append(rest)
        self._replace(value, self._joined(parts, members, 1, stem))

    def _stored(self, bits: int, stem: str, q: Integers) -> ir.Value:
        """Integers as int8, stored in `bits` bits."""
        if bits == 8:
            return self.build.constant(stem, np.ascontiguousarray(q))
        if bits == 4 and self.model.opset_imports.get("", 0) >= INT4_OPSET:
            self.model.ir_version = max(self.model.ir_version or 0, INT4_IR)
            tensor = ir.PackedTensor(_in_bytes(q, 4, 0), ir.DataType.INT4, shape=q.shape)
            return self._cast(self.build.constant(stem, tensor), ir.DataType.INT8, f"{stem}_unpacked")
        stored = self.build.constant(stem, _in_bytes(q, bits, -(1 << (bits - 1))))
        index = self._cast(stored, ir.DataType.INT32, f"{stem}_index")
        table = self._once(f"unpack_int{bits}", (), lambda: _table_of(bits))
        unpacked = self.build.op("Gather", [table, index], f"{stem}_rows", dtype=ir.DataType.INT8)
        if q.size % (8 // bits):
            flat, zero, end = (self._vector(n) for n in (-1, 0, q.size))
            unpacked = self.build.op("Reshape", [unpacked, flat], f"{stem}_flat", dtype=ir.DataType.INT8)
            unpacked = self.build.op("Slice", [unpacked, zero, end], f"{stem}_cut", dtype=ir.DataType.INT8)
        return self.build.op(
            "Reshape", [unpacked, self._vector(*q.shape)], f"{stem}_unpacked", dtype=ir.DataType.INT8, shape=q.shape
        )

    def _decoded(self, weight: Coded, shape: tuple[int, ...], axis: int, stem: str) -> ir.Value:
        """Int8 integers that are stored by code."""
        int4 = self.model.opset_imports.get("", 0) >= INT4_OPSET
        if weight.bits not in (4, 8):
            self._bitwise += weight.codes.size
            if self._bitwise > MOST_BITWISE:
                weight = replace(weight, bits=4 if weight.bits < 4 and int4 else 8)
        whole = weight.bits == 4 and int4
        if whole:
            self.model.ir_version = max(self.model.ir_version or 0, INT4_IR)
        levels = None
        if weight.size > 1:
            found = ((weight.on(other), table) for other, table in self._vectors)
            same = next(((by_code, table) for by_code, table in found if by_code is not None), None)
            weight, levels = same or (weight, self.build.constant(f"{stem}_levels", weight.table))
            if same is None:
                self._vectors.append((weight, levels))
        once, table_of = self._once, self._bits_table
        return unpacked(self.build, once, table_of, weight, shape, axis, stem, whole=whole, levels=levels)

    def _bits_table(self, bits: int) -> ir.Value:
        """Return the bits of each byte, int32, times 2^k for each k below `bits`: `[256 bits, 8]`."""
        integer = ir.DataType.INT32
        key: tuple[str, tuple[int, ...]] = "unpack_codes_int32", ()
        if key not in self._shared:
            self._shared[key] = self._cast(self.build.constant("unpack_codes", BITS_OF_BYTES), integer, key[0])
        if bits > 1 and (key[0], (bits,)) not in self._shared:
            powers = self._once("code_powers", (bits,), lambda: (1 << np.arange(bits, dtype=np.int32))[:, None, None])
            product = self.build.op("Mul", [self._shared[key], powers], f"{key[0]}_{bits}", dtype=integer)
            rows = self._vector(256 * bits, 8)
            self._shared[key[0], (bits,)] = self.build.op("Reshape", [product, rows], f"bits_{bits}", dtype=integer)
        return self._shared[key[0], (bits,) if bits > 1 else ()]

    def _joined(
        self, parts: Sequence[ir.Value], members: Sequence[npt.NDArray[np.int64]], axis: int, stem: str
    ) -> ir.Value:
        """Concatenate parts of a constant along an axis, and reorder them by their members' indices."""
        if len(parts) == 1:
            return parts[0]
        dtype, order = parts[0].dtype, np.argsort(np.concatenate(members)).astype(np.int32)
        whole = self.build.op("Concat", parts, f"{stem}_parts", dtype=dtype, attributes={"axis": axis})
        index = self.build.constant(f"{stem}_order", order)
        return self.build.op("Gather", [whole, index], f"{stem}_whole", dtype=dtype, attributes={"axis": axis})

    def _cast(self, value: ir.Value, dtype: ir.DataType, preferred: str) -> ir.Value:
        return self.build.op("Cast", [value], preferred, dtype=dtype, shape=value.shape, attributes={"to": int(dtype)})

    def _vector(self, *numbers: int) -> ir.Value:
        return self._once("unpacked_shape", numbers, lambda: np.array(numbers, np.int64))

    def _once(self, preferred: str, key: tuple[int, ...], make: Callable[[], npt.NDArray[Any]]) -> ir.Value:
        if (preferred, key) not in self._shared:
            self._shared[preferred, key] = self.build.constant(preferred, make())
        return self._shared[preferred, key]

    def _replace(self, old: ir.Value, new: ir.Value) -> None:
        """Make all readers of a constant read its unpacked value, which takes over the name."""
        name = name_of(old)
        old.replace_all_uses_with(new)
        del self.graph.initializers[name]
        new.shape, new.name = old.shape, name
