"""Whether an ONNX file is in the integer form of onnxruntime, which other engines refuse, or compute wrongly."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

# A NodeProto spells its operation as field 4 and its domain as field 7: key, length, text. OpenVINO 2026.4 computes
# QLinearConv with 16 to 19 dB, and refuses the operations of the domain com.microsoft or what stands behind them.
_QLINEAR = re.compile(rb"\x22([\x0a-\x20])(QLinear[A-Za-z]{1,24})")
_DOMAIN = b"\x3a\x0dcom.microsoft"


def foreign_operation(model: str | Path | bytes) -> str | None:
    """Return an operation that only onnxruntime runs, None for a graph without. A file that is missing has none."""
    if isinstance(model, bytes):
        return _found(model)
    try:
        with Path(model).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _found(data)
    except (OSError, ValueError):  # missing, or empty: the engine says what is wrong with it
        return None


def _found(data: bytes | mmap.mmap) -> str | None:
    for match in _QLINEAR.finditer(data):
        if match[1][0] == len(match[2]):
            return match[2].decode("ascii")
    return "the operations of com.microsoft" if data.find(_DOMAIN) >= 0 else None
