"""Where the weights lie while a program is compiled.

At import every weight is streamed once into one file of the working folder. From then on a graph, after any pass,
is a small ONNX file beside it: a model of several gigabytes is never held in memory whole, a clone costs
milliseconds, and the sessions of all passes read the same bytes.
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
ALIGNMENT = 4096  # of what is appended to the stored weights: onnxruntime maps whole pages
SIZES_BYTES = 1 << 14  # the same for integers: a Split of all rows of tables has as many sizes as the graph has tables


def adopt(model: ir.Model, folder: Path) -> None:
    """Stream all weights of a freshly imported model into `folder/weights.data` and refer to them there."""
    externalize(model, folder, WEIGHTS)


def write(model: ir.Model, folder: Path, stem: str | None = None) -> Path:
    """Write a graph beside the stored weights as `stem.onnx`, ready for onnxruntime; the model is not changed.

    Constants that are not in the folder yet go to `stem.onnx.data`.
    """
    stem = stem or uuid.uuid4().hex
    clone = model.clone()
    externalize(clone, folder, f"{stem}.onnx.data")
    path = folder / f"{stem}.onnx"
    ir.save(clone, path)
    return path


def kept(array: npt.NDArray[Any], name: str, folder: Path) -> ir.TensorProtocol:
    """A new constant, stored behind the weights of the folder where it is large, so that nobody has to hold it."""
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


def bare(model: ir.Model) -> ir.Model:
    """A clone whose weights are inputs: all that a checker or shape inference needs, however large the model is."""
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
    """A clone that refers to a copy of the stored weights in `folder`; what lies in other files is read into memory.

    Such a file belongs to a graph that was written before, and may be about to be written again.
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
    """Remove what `write` wrote."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".data").unlink(missing_ok=True)


def parameter_bytes(model: ir.Model) -> int:
    """Sum of the bytes of all float initializers."""
    tensors = (v.const_value for v in model.graph.initializers.values())
    return sum(t.nbytes for t in tensors if t is not None and t.dtype.is_floating_point())


def externalize(model: ir.Model, folder: Path, name: str) -> None:
    """Move the large constants of a model to `folder/name`, but for those that lie in a file of that folder already."""
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
    """Whether a constant may lie outside the ONNX file."""
    return tensor.nbytes >= (SIZES_BYTES if tensor.dtype == ir.DataType.INT64 else INLINE_BYTES)


def _is_elsewhere(tensor: ir.TensorProtocol | None, folder: Path) -> bool:
    if tensor is None or not is_large(tensor) or tensor.dtype == ir.DataType.STRING:
        return False
    return not (isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == folder)


def copy(source: Path, target: Path) -> None:
    """Copy a file of stored weights, if there is one. Not a link: onnx and onnx_ir refuse to read a linked file."""
    if source.exists():
        shutil.copyfile(source, target)


def move(path: Path, folder: Path) -> Path:
    """Move what `write` wrote into another folder; the stored weights are expected beside it there."""
    for part in (path, path.with_name(path.name + ".data")):
        if part.exists():
            shutil.move(part, folder / part.name)
    return folder / path.name
