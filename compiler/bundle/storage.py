"""The size of the constants of a bundle's graph by storage type: a section of the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from mezzotint.runtime.bundle.manifest_entries import Storage, StoredType

from ..core.program import Program
from ..graph.nodes import is_op
from ..lowering.codes import code_facts

STORAGE_TYPES = ("int1", "int2", "int3", "int4", "int8", "float16", "float32", "int32", "mask")
_NAMES = {"float": "float32"}
_STORED = {1: 2, 2: 2, 3: 4, 4: 4}  # bits of a weight -> bits in the file; all others 8


def storage(program: Program, lowered: ir.Model, files: Iterable[Path]) -> Storage:
    """Return the sizes by storage type, and that of the files, also relative to the float parameters."""
    types: dict[str, StoredType] = {}
    for value in lowered.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            kind, values = _kind(value, tensor)
            total = types.get(kind, StoredType(0, 0, 0))
            types[kind] = StoredType(total.bytes + tensor.nbytes, total.constants + 1, total.values + values)
    size, source = sum(file.stat().st_size for file in files), _float_bytes(program)
    return Storage(
        types={kind: types[kind] for kind in (*STORAGE_TYPES, "other") if kind in types},
        constant_bytes=sum(stored.bytes for stored in types.values()),
        model_bytes=size,
        float_bytes=source,
        ratio=round(size / source, 6) if source else None,
        notes=_notes(program),
    )


def _kind(value: ir.Value, tensor: ir.TensorProtocol) -> tuple[str, int]:
    """Return the storage type of a constant and the number of its values; codes of a codebook are integers, too."""
    if (facts := code_facts(value)) is not None:
        return f"int{facts[0]}", facts[1]
    for node, _ in value.uses():  # packed values, which index a table after a Cast: compiler/lowering/packing.py
        readers = node.outputs[0].uses() if is_op(node, "Cast") and value.dtype == ir.DataType.UINT8 else ()
        if any(is_op(reader, "Add") for reader, _ in readers):  # two values (compiler/lowering/pair_packing.py)
            return "int4", 2 * tensor.size
        tables = [reader.inputs[0] for reader, index in readers if is_op(reader, "Gather") and index == 1]
        if tables and tables[0] is not None and tables[0].const_value is not None:
            # A bit for each value (compiler/lowering/sparse_packing.py), or a nibble for four (pair_packing.py).
            if tables[0].dtype in (ir.DataType.UINT8, ir.DataType.INT32):
                return "mask", 8 * tensor.size
            count = int(tables[0].const_value.shape.numpy()[1])
            return f"int{8 // count}", tensor.size * count
    name = tensor.dtype.name.lower()
    name = _NAMES.get(name, name)
    return name if name in STORAGE_TYPES else "other", tensor.size


def _float_bytes(program: Program) -> int:
    """Return the bytes of the imported parameters; for a program without a front end, those of its float graph."""
    known = program.source.get("parameter_bytes")
    if known is not None:
        return int(known)
    tensors = [v.const_value for v in (program.float_model or program.model).graph.initializers.values()]
    return 4 * sum(t.size for t in tensors if t is not None and t.dtype.is_floating_point())


def _notes(program: Program) -> tuple[str, ...]:
    """Return a note for each width that the file stores in more bits."""
    if program.plan is None or program.float_model is None:
        return ()
    weights = program.float_model.graph.initializers
    chosen = [q for site, q in program.plan.quantizers.items() if site.value in weights]
    bits = {b for q in chosen for b in q.widths or (q.format.bits,)}
    wider = [(b, _STORED.get(b, 8)) for b in sorted(bits) if _STORED.get(b, 8) != b]
    return tuple(f"weights of {b} bits are stored in {stored}: the file has no type between" for b, stored in wider)
