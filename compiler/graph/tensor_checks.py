"""Checks of the tensors in a model file: data types, sizes, and external data.

Only the headers are read: a tensor of many gigabytes costs as much as a small one. Nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
from onnx import TensorProto

from ..errors import ModelError
from .limits import check_limit

_HINT = "export the model again, or copy or download it again"
_BITS: dict[int, int] = {
    TensorProto.BOOL: 8,
    TensorProto.INT8: 8,
    TensorProto.UINT8: 8,
    TensorProto.INT16: 16,
    TensorProto.UINT16: 16,
    TensorProto.FLOAT16: 16,
    TensorProto.BFLOAT16: 16,
    TensorProto.INT32: 32,
    TensorProto.UINT32: 32,
    TensorProto.FLOAT: 32,
    TensorProto.INT64: 64,
    TensorProto.UINT64: 64,
    TensorProto.DOUBLE: 64,
    TensorProto.COMPLEX64: 64,
    TensorProto.COMPLEX128: 128,
    TensorProto.INT4: 4,
    TensorProto.UINT4: 4,
    TensorProto.FLOAT8E4M3FN: 8,
    TensorProto.FLOAT8E4M3FNUZ: 8,
    TensorProto.FLOAT8E5M2: 8,
    TensorProto.FLOAT8E5M2FNUZ: 8,
}
_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_FIELD_OF: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.UINT64: "uint64_data",
}  # the others are in int32_data


def tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, TensorProto]]:
    """Yield (description, tensor) for each initializer and each attribute of a graph, without its subgraphs."""
    for tensor in graph.initializer:
        yield f"the constant {tensor.name[:200]!r}", tensor
    yield from node_tensors(graph.node)


def node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, TensorProto]]:
    """Yield (description, tensor) for each attribute of nodes."""
    for node in nodes:
        for attribute in node.attribute:
            where = f"attribute {attribute.name[:80]!r} of node {(node.name or node.op_type)[:200]!r}"
            if attribute.HasField("t"):
                yield where, attribute.t
            yield from ((where, tensor) for tensor in attribute.tensors)


def check_tensor(what: str, tensor: TensorProto, path: Path) -> None:
    """Raise ModelError for a tensor whose data does not have its type and shape. `path` is the model file."""
    where = str(path)
    if tensor.data_type == TensorProto.STRING:
        raise ModelError(f"{what} holds texts, and a denoiser computes with numbers", where=where, hint=_HINT)
    if tensor.data_type not in _BITS:
        raise ModelError(f"{what} has the unknown data type {tensor.data_type}", where=where, hint=_HINT)
    if tensor.HasField("segment"):
        raise ModelError(f"{what} is stored in segments, which no runtime reads", where=where, hint=_HINT)
    check_limit("rank", len(tensor.dims), f"{what} has too many dimensions", where)
    if min(tensor.dims, default=0) < 0:
        raise ModelError(f"{what} has the shape {list(tensor.dims)}", where=where, hint=_HINT)
    count = math.prod(tensor.dims)
    size = -(-count * _BITS[tensor.data_type] // 8)
    fields = [name for name in _FIELDS if len(getattr(tensor, name))]
    if tensor.data_location == TensorProto.EXTERNAL:
        if not what.startswith("the constant"):
            raise ModelError(f"{what} has external data, which only constants may", where=where, hint=_HINT)
        if tensor.HasField("raw_data") or fields:
            raise ModelError(f"{what} has data both in the model file and outside", where=where, hint=_HINT)
        _check_external(what, tensor, size, path)
        return
    if tensor.HasField("raw_data"):
        if fields:
            raise ModelError(f"{what} has its data twice: raw_data and {fields[0]}", where=where, hint=_HINT)
        stored, needed = f"{len(tensor.raw_data)} bytes", f"{size} bytes"
    else:
        field = _FIELD_OF.get(tensor.data_type, "int32_data")
        if other := [name for name in fields if name != field]:
            raise ModelError(f"{what} has its data in {other[0]}, expected {field}", where=where, hint=_HINT)
        stored, needed = f"{len(getattr(tensor, field))} numbers", f"{_numbers(tensor, count)} numbers"
    if stored != needed:
        raise ModelError(
            f"{what} has {stored}, and its shape {list(tensor.dims)} needs {needed}", where=where, hint=_HINT
        )


def _numbers(tensor: TensorProto, count: int) -> int:
    """Return the length of a tensor's typed field."""
    if tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        return 2 * count
    return -(-count // 2) if _BITS[tensor.data_type] == 4 else count


def data_file(location: str, path: Path) -> Path | None:
    """Return the file of external data, or None if it is not a path inside the model's folder.

    Links are followed; the file may be next to the model's link, or next to the file that this link names, as in the
    cache of the Hugging Face hub.
    """
    if not location or len(location) > 4096 or "\0" in location:
        return None
    if any(kind(location).is_absolute() for kind in (PurePosixPath, PureWindowsPath)):
        return None
    if ".." in PurePosixPath(location.replace("\\", "/")).parts:
        return None
    file = (path.parent / location).resolve()
    homes = (path.parent.resolve(), path.resolve().parent)
    return file if any(file.is_relative_to(home) for home in homes) else None


def _check_external(what: str, tensor: TensorProto, size: int, path: Path) -> None:
    facts: dict[str, str] = {}
    for entry in tensor.external_data:
        if entry.key in facts:
            raise ModelError(f"{what} states the {entry.key[:40]!r} of its data twice", where=str(path), hint=_HINT)
        facts[entry.key] = entry.value
    location = facts.get("location", "")
    try:
        file = data_file(location, path)
        if file is None:
            raise ModelError(
                f"{what} has its data at {location[:200]!r}, which is not a file of the model's folder",
                where=str(path),
                hint="put the data into the folder of the .onnx file, and name it by a relative path",
            )
        if not file.exists():
            raise ModelError(
                f"the model's external data is missing: {location} ({what})",
                where=str(path),
                hint="put the file next to the .onnx file",
            )
        if not file.is_file() or file == path.resolve():
            raise ModelError(f"{what} has its data at {location!r}, which is no data file", where=str(path), hint=_HINT)
        there = file.stat().st_size
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a ring of links
        raise ModelError(f"the data of {what} cannot be found: {str(error)[:300]}", where=str(path)) from error
    offset = _integer(facts.get("offset", "0"), "offset", what, path)
    if "length" in facts and (length := _integer(facts["length"], "length", what, path)) != size:
        raise ModelError(
            f"{what} has {length} bytes of external data, and its shape {list(tensor.dims)} needs {size}",
            where=str(path),
            hint=_HINT,
        )
    if there < offset + size:
        raise ModelError(
            f"the external data file is shorter than {what} needs ({there} of {offset + size} bytes)",
            where=str(file),
            hint="copy or download it again",
        )


def _integer(text: str, key: str, what: str, path: Path) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise ModelError(f"{what} has the {key} {text[:40]!r} in its file", where=str(path), hint=_HINT)
    return int(text)
