"""Several ONNX files of one network in one folder, with common constants stored once.

Constants whose bytes are equal in two or more of the files (layers in float, biases, tables, weights of equal bits)
move to `shared.data` in the same folder. All files refer to them as external data.

onnxruntime maps external data into memory and does not copy it: all sessions and processes share the pages. But most
kernels repack constant weights when a session opens, and each session keeps its own copy; constants that the optimizer
folds are copied too. Measured with onnxruntime 1.31.1 and a constant of 64 MB that two networks have in common, memory
that the second session adds: 0 MB for a table that Gather reads (68 MB when each file stores it), 64 to 68 MB for
weights of MatMul, Conv and MatMulInteger, shared or not. So sharing saves disk space, reading, and memory of tables.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from ..bundle.writer import EXTERNAL_BYTES, forget_types
from ..graph import weight_store as store
from ..graph.nodes import numpy_of
from ..graph.require import tensor_of

SHARED = "shared.data"
_Key = tuple[int, str]


def write_sharing(sources: Mapping[str, Path], folder: Path) -> int:
    """Write ONNX files `folder/name` from `sources`, and SHARED into the same folder; return the bytes of SHARED.

    The graphs are those of the sources, node for node. Constants are read one at a time, so a source with external
    weights is never in memory as a whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    models = {name: ir.load(path) for name, path in sources.items()}
    readers: dict[_Key, list[tuple[str, ir.Value]]] = {}
    for name, model in models.items():
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.dtype != ir.DataType.STRING and store.is_large(tensor):
                readers.setdefault(_key(tensor), []).append((name, value))
    common = [values for values in readers.values() if len({name for name, _ in values}) > 1]
    # Wide types first: every constant then starts at a multiple of its type's size, without gaps.
    common.sort(key=lambda values: -tensor_of(values[0][1]).dtype.itemsize)
    stored = ir.external_data.convert_tensors_to_external([tensor_of(v[0][1]) for v in common], folder, SHARED)
    for place, values in zip(stored, common, strict=True):
        for _, value in values:  # equal bytes may have another shape or type in another file
            tensor = tensor_of(value)
            value.const_value = ir.ExternalTensor(
                SHARED,
                place.offset,
                place.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=folder,
            )
    if not common:
        (folder / SHARED).unlink(missing_ok=True)
    for name, model in models.items():
        _save(model, folder / name)
    return sum(tensor.nbytes for tensor in stored)


def _save(model: ir.Model, path: Path) -> None:
    """Write one ONNX file. Constants that are not shared are stored in it, or in a second file when they are large."""
    own = [v for v in model.graph.initializers.values() if v.const_value is not None and not _is_shared(v)]
    if sum(tensor_of(value).nbytes for value in own) > EXTERNAL_BYTES:
        store.externalize(model, path.parent, f"{path.name}.data")
    else:
        for value in own:
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(numpy_of(value), name=value.name)
    forget_types(model)
    ir.save(model, path)


def _is_shared(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location == SHARED


def _key(tensor: ir.TensorProtocol) -> _Key:
    return tensor.nbytes, hashlib.sha256(tensor.tobytes()).hexdigest()
