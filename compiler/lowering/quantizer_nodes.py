"""The nodes of a quantizer, and the lookup of its scale where that is a row of a table. insert_qdq places them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from ..core.program import Program, Quantizer
from ..graph.nodes import Builder, Names, name_of
from ..graph.scopes import TABLES_SCOPE
from ..scales.timetable import group_of_train, lookup, step_index

STORED_BITS = 8  # every format is stored in whole bytes


def table_rows(program: Program, names: Names, tables: list[Quantizer]) -> dict[int, tuple[ir.Value, ir.Value]]:
    """Return (scale `[1]` or `[C]`, zero point of that shape) of each table quantizer at the call's timestep."""
    build = Builder(program.graph, names, program.graph[0], scope=TABLES_SCOPE)
    row = step_index(build, program, group_of_train(program), "group")
    rows: dict[int, tuple[ir.Value, ir.Value]] = {}
    groups: dict[str, list[Quantizer]] = {}  # the zero points of a table have one type
    for quantizer in tables:
        stem = f"{'signed_' if quantizer.format.signed else ''}{'' if quantizer.axis is None else 'channel_'}"
        groups.setdefault(stem, []).append(quantizer)
    for stem, chosen in sorted(groups.items()):
        columns = [(q.scale.reshape(len(q.scale), -1), q.zero_point.reshape(len(q.scale), -1)) for q in chosen]
        sizes = [scale.shape[1] for scale, _ in columns]
        scales = lookup(build, np.concatenate([scale for scale, _ in columns], axis=1), row, sizes, f"{stem}scales")
        zeros = lookup(build, np.concatenate([zero for _, zero in columns], axis=1), row, sizes, f"{stem}zero_points")
        rows |= {id(q): pair for q, pair in zip(chosen, zip(scales, zeros, strict=True), strict=True)}
    return rows


def pair_nodes(build: Builder, value: ir.Value, quantizer: Quantizer, scale: ir.Value, zero: ir.Value) -> ir.Value:
    """Write Q, the Clip of a format of fewer than 8 bits, and DQ; return the dequantized value."""
    stem = name_of(value)
    axis = {} if quantizer.axis is None else {"axis": quantizer.axis}
    dtype = ir.DataType.from_numpy(quantizer.zero_point.dtype)
    integers = build.op(
        "QuantizeLinear", [value, scale, zero], f"{stem}_quantized", like=value, dtype=dtype, attributes=axis
    )
    fmt = quantizer.format
    if fmt.bits < STORED_BITS:
        # QuantizeLinear saturates at the ends of its storage type; a narrower format ends earlier.
        ends = (("qmin", fmt.qmin), ("qmax", fmt.qmax))
        limits = [build.constant(f"{stem}_{end}", np.array(q, fmt.dtype)) for end, q in ends]
        integers = build.op("Clip", [integers, *limits], f"{stem}_narrowed", like=integers)
    return build.op("DequantizeLinear", [integers, scale, zero], f"{stem}_dequantized", like=value, attributes=axis)
