"""ONNX files of others, read in one place: what is no regular file, no protobuf or no valid model is refused here."""

from __future__ import annotations

import stat
from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import ModelError
from .model_checks import check_model
from .tensor_checks import data_file

_LARGEST = (1 << 31) - 1  # bytes of a protobuf message
_HINT = "export or download it again"
_KINDS = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device"}


def read_model(path: Path, *, oldest_opset: int = 1) -> ir.Model:
    """Return the model of an ONNX file, checked, with its external weights still on disk. Raises ModelError."""
    proto = check_model_file(path, oldest_opset=oldest_opset)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises many kinds of errors
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"this is not a valid ONNX model: {text}", where=str(path), hint=_HINT) from error
    ir.external_data.set_base_dir(model.graph, path.parent)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = _followed(value.const_value, path)
    return model


def check_model_file(path: Path, *, oldest_opset: int = 1) -> onnx.ModelProto:
    """Return the protobuf of an ONNX file with its nodes in order, without external data. Raises ModelError.

    A session is safe with the file after this check; before it, a session may hang, or end the process.
    """
    size = _size(path)
    if size > _LARGEST:
        raise ModelError(
            f"the file has {size} bytes, and an ONNX file has less than 2 GiB",
            where=str(path),
            hint="keep the weights in external data",
        )
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise ModelError(f"the model file cannot be read: {error.strerror}", where=str(path)) from error
    except Exception as error:  # protobuf raises errors of its own, which onnx does not export
        raise ModelError(
            f"this is not an ONNX model, or it is truncated ({type(error).__name__})", where=str(path), hint=_HINT
        ) from error
    check_model(proto, path, oldest_opset=oldest_opset)
    return proto


def _size(path: Path) -> int:
    """Return the size of a regular file. Raises ModelError for anything else."""
    try:
        state = path.stat()
    except FileNotFoundError as error:
        raise ModelError("the model file does not exist", where=str(path), hint="check the path") from error
    except (OSError, RuntimeError, ValueError) as error:  # a ring of links, a name that is too long or has a null
        text = getattr(error, "strerror", None) or str(error)
        raise ModelError(f"the model file cannot be found: {text}", where=str(path)[:300]) from error
    if not stat.S_ISREG(state.st_mode):
        kind = next((name for test, name in _KINDS.items() if test(state.st_mode)), "no regular file")
        raise ModelError(f"this is {kind}, not a model file", where=str(path), hint="give an .onnx file")
    return state.st_size


def _followed(tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """Return an external tensor that names its file without links, which onnx_ir refuses to follow."""
    file = data_file(str(tensor.location), path)
    if file is None:
        raise ModelError(f"{tensor.name!r} has its data outside the model's folder", where=str(path), hint=_HINT)
    place = (file.name, tensor.offset, tensor.length, tensor.dtype)
    return ir.ExternalTensor(*place, shape=tensor.shape, name=str(tensor.name), base_dir=file.parent)
