"""What a network was called with while it was exported, beside the inputs of the graph: `unet/call.json`.

A pipeline of diffusers gives some networks positions, sizes and shapes that the graph holds as constants: the ids of
Flux, the frames of LTX, the rotary positions of CogVideoX. The file has an entry for each such argument, so that a
stand-in can tell a call that means the same from one that the graph cannot follow:

    {"arguments": {"height": {"value": 16}, "img_ids": {"shape": [4096, 3], "sums": [...], "values": [...]}}}

A plain value is kept as it is. Of a tensor there are its shape, its sum, its sum of squares, and 256 of its values,
evenly apart: rotary positions of a video have millions. Several tensors in one argument are a list of `parts`. A
tensor with a row for each token of a prompt, of any length, has the `first` row and the `step` to the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import BundleError
from ..json_text import read_json
from .layout import located

if TYPE_CHECKING:
    from .bundle import Bundle

CALL = "unet/call.json"
METADATA = "mezzotint.call"
"""The key of an exported ONNX file's metadata that holds the same text."""
VALUES = 256
_NEAR = 1e-5
"""Of the largest value: positions that two versions of a library computed, float32."""


def call_record(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of the file for arguments that are plain values, arrays, sequences of arrays, or
    {"first": row, "step": row}."""
    return {"arguments": {name: _entry(value) for name, value in arguments.items()}}


def _entry(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "sums": _sums(value), "values": _some(value)}
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, np.ndarray) for part in value):
        return {"parts": [_entry(part) for part in value]}
    return {"value": _plain(value)}


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _some(array: npt.NDArray[Any]) -> list[float]:
    flat = array.reshape(-1)
    at = np.unique(np.linspace(0, flat.size - 1, min(VALUES, flat.size)).astype(np.int64))
    return [float(v) for v in flat[at]]


def _sums(array: npt.NDArray[Any]) -> list[float]:
    wide = array.astype(np.float64).reshape(-1)
    return [float(wide.sum()), float(wide @ wide)]


def bundle_call(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """Return the entries of a bundle's file by argument, {} for one without. Raises BundleError."""
    name = located(CALL, bundle.manifest.files)
    if name not in bundle.manifest.files:
        return {}
    file = bundle.path / name
    data = read_json(file, "the record of the network's call", BundleError)
    if not is_record(data):
        raise BundleError("the record of the network's call is malformed", where=str(file), hint="compile it again")
    entries: dict[str, dict[str, Any]] = data["arguments"]
    return entries


def is_record(data: Any) -> bool:
    """Return whether plain data has the form of a record."""
    entries = data.get("arguments") if isinstance(data, dict) else None
    return isinstance(entries, dict) and all(_is_entry(entry) for entry in entries.values())


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    if "parts" in entry:
        return isinstance(entry["parts"], list) and all(_is_tensor(part) for part in entry["parts"])
    if "first" in entry:
        first, step = entry["first"], entry.get("step", [])
        return _all(first, (int, float)) and _all(step, (int, float)) and len(first) == len(step)
    return "value" in entry or _is_tensor(entry)


def _is_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and _all(entry.get("shape"), int)
        and _all(entry.get("values"), (int, float))
        and _all(entry.get("sums"), (int, float))
        and len(entry["sums"]) == 2
    )


def _all(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def difference(entry: Mapping[str, Any], value: Any, precision: float = 0.0) -> str | None:
    """Return how an argument differs from its entry, in words that follow its name; None where it means the same.

    `value` is plain, an array or a sequence of arrays. An array may have an axis more in front, of equal rows.
    `precision` is the relative rounding of its type, for arrays that were rounded on their way.
    """
    if "parts" in entry:
        parts = entry["parts"]
        if not isinstance(value, (list, tuple)) or len(value) != len(parts):
            return f"is not the {len(parts)} tensors of the export"
        found = (difference(part, one, precision) for part, one in zip(parts, value, strict=True))
        return next((text for text in found if text), None)
    if "value" in entry:
        return None if _same(entry["value"], value) else f"is {_short(value)}, and was {_short(entry['value'])}"
    if not isinstance(value, np.ndarray):
        return "is no tensor"
    rank = 2 if "first" in entry else len(entry["shape"])
    if value.ndim == rank + 1 and len(value) and bool((value == value[:1]).all()):
        value = value[0]
    shape = ["tokens", len(entry["first"])] if "first" in entry else entry["shape"]
    if value.ndim != rank or any(want not in (own, "tokens") for own, want in zip(value.shape, shape, strict=True)):
        return f"has the shape {list(value.shape)}, and had {shape}".replace("'", "")
    near = _near_rows if "first" in entry else _near
    return None if near(entry, value, precision) else "has other values than it had"


def _near_rows(entry: Mapping[str, Any], value: npt.NDArray[Any], precision: float) -> bool:
    want = np.array(entry["first"]) + np.arange(len(value))[:, None] * np.array(entry["step"])
    peak = max(float(np.abs(want).max(initial=0)), 1.0)
    return bool((np.abs(want - value) <= (_NEAR + precision) * peak).all())


def _near(entry: Mapping[str, Any], value: npt.NDArray[Any], precision: float) -> bool:
    want, got = np.array(entry["values"]), np.array(_some(value))
    if want.shape != got.shape:
        return False
    peak, within = max(float(np.abs(want).max(initial=0)), 1e-30), _NEAR + precision
    sums = zip(entry["sums"], _sums(value), (peak, peak**2), strict=True)
    return bool(np.abs(want - got).max(initial=0) <= within * peak) and all(
        abs(one - other) <= 2 * within * value.size * scale for one, other, scale in sums
    )


def _same(known: Any, value: Any) -> bool:
    if isinstance(known, list):
        return (
            isinstance(value, Sequence)
            and len(known) == len(value)
            and all(_same(a, b) for a, b in zip(known, value, strict=True))
        )
    if isinstance(known, bool) or not isinstance(known, (int, float)):
        return bool(known == value)
    return isinstance(value, (int, float)) and math.isclose(known, value, rel_tol=1e-6)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
