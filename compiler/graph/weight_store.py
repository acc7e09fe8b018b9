"""The file that holds the weights while a program is compiled.

The import streams every weight once into one file of the working folder, and what a pass makes of a weight is appended
to it. After any pass, the graph is a small ONNX file next to it. A model of several gigabytes is never in memory as a
whole, a clone costs milliseconds, and the sessions of all passes read the same bytes.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

WEIGHTS = "weights.data"
INLINE_BYTES = 1024  # smaller constants (shapes, scales) stay in the ONNX file, where shape inference reads them
ALIGNMENT = 4096  # of appended weights: onnxruntime maps whole pages
COPIED_BYTES = 1 << 24  # at once
SIZES_BYTES = 1 << 14  # the same for integers: a Split of all rows of tables has as many sizes as the graph has tables


def adopt(model: ir.Model, folder: Path) -> None:
    """Stream all weights of a freshly imported model into `folder/weights.data`, and refer to them there."""
    externalize(model, folder, WEIGHTS)


def write(model: ir.Model, folder: Path, stem: str | None = None) -> Path:
    """Write a graph next to the stored weights as `stem.onnx`, and return its path. The model is not changed.

    Large constants that are not in the folder yet go to `stem.onnx.data`.
    """
    stem = stem or uuid.uuid4().hex
    clone = model.clone()
    externalize(clone, folder, f"{stem}.onnx.data")
    path = folder / f"{stem}.onnx"
    ir.save(clone, path)
    return path


def kept(array: npt.NDArray[Any], name: str, folder: Path) -> ir.TensorProtocol:
    """Return a new constant. A large one is appended to the stored weights of the folder and not kept in memory."""
    tensor = ir.tensor(array, name=name)
    if not is_large(tensor):
        return tensor
    with (folder / WEIGHTS).open("ab") as file:
        file.write(bytes(-file.tell() % ALIGNMENT))
        offset = file.tell()
        array.tofile(file)
    return ir.ExternalTensor(
        WEIGHTS, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(array.shape), name=name, base_dir=folder
    )


def settle(model: ir.Model, folder: Path) -> None:
    """Append the large constants that are in memory to the stored weights, and refer to them there.

    Otherwise each session on the graph would write them to a file of its own. Types below a byte stay: they are packed.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.Tensor) and is_large(tensor) and tensor.dtype.bitwidth >= 8:
            value.const_value = kept(np.asarray(tensor.numpy()), name, folder)


def bare(model: ir.Model) -> ir.Model:
    """Return a clone whose large constants are inputs, small enough for a checker or shape inference."""
    clone = model.clone()
    inputs = set(clone.graph.inputs)
    for name, value in list(clone.graph.initializers.items()):
        if value.const_value is not None and is_large(value.const_value):
            del clone.graph.initializers[name]
            value.const_value = None
            if value not in inputs:
                clone.graph.inputs.append(value)
    return clone


def rehomed(model: ir.Model, folder: Path) -> ir.Model:
    """Return a clone that refers to a copy of the stored weights in `folder`. Constants in other files are read into
    memory, because such a file belongs to a graph that may be written again.
    """
    clone = model.clone()
    for value in clone.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.location == WEIGHTS:
            place = (WEIGHTS, tensor.offset, tensor.length, tensor.dtype)
            value.const_value = ir.ExternalTensor(*place, shape=tensor.shape, name=tensor.name, base_dir=folder)
        else:
            value.const_value = ir.tensor(np.array(tensor.numpy()), name=value.name)
    return clone


def discard(path: Path) -> None:
    """Remove the files that `write` wrote."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".data").unlink(missing_ok=True)


def parameter_bytes(model: ir.Model) -> int:
    """Return the sum of the bytes of all float initializers."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sum(t.nbytes for t in tensors if t is not None and t.dtype.is_floating_point())


def externalize(model: ir.Model, folder: Path, name: str) -> None:
    """Move the large constants of a model to `folder/name`, except those that are in a file of that folder already."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor) and not is_large(value.const_value):
            value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    values = [v for v in model.graph.initializers.values() if _is_elsewhere(v.const_value, folder)]
    tensors = [v.const_value for v in values if v.const_value is not None]
    if not tensors:
        return
    external = ir.external_data.convert_tensors_to_external(tensors, folder, name)
    for value, tensor in zip(values, external, strict=True):
        value.const_value = tensor


def is_large(tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant may be stored outside the ONNX file."""
    return tensor.nbytes >= (SIZES_BYTES if tensor.dtype == ir.DataType.INT64 else INLINE_BYTES)


def _is_elsewhere(tensor: ir.TensorProtocol | None, folder: Path) -> bool:
    if tensor is None or not is_large(tensor) or tensor.dtype == ir.DataType.STRING:
        return False
    return not (isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == folder)


def copy(source: Path, target: Path) -> None:
    """Copy a file of stored weights, if it exists. Not a link: onnx and onnx_ir refuse to read linked files.

    To an earlier copy only what was appended since then is added.
    """
    if not source.exists():
        return
    with source.open("rb") as read, target.open("ab") as written:
        read.seek(written.tell())
        shutil.copyfileobj(read, written, COPIED_BYTES)


def move(path: Path, folder: Path) -> Path:
    """Move the files that `write` wrote into another folder, which has the stored weights too; return the path."""
    for part in (path, path.with_name(path.name + ".data")):
        if part.exists():
            shutil.move(part, folder / part.name)
    return folder / path.name
