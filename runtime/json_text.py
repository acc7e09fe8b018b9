"""JSON and text files, read with bounds: what is refused is refused before it takes time or memory.

Python's reader accepts more than JSON: NaN, numbers of any length, a key twice, and nesting as deep as its stack.
"""

from __future__ import annotations

import json
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import MezzotintError

MOST_BYTES = 32 << 20
"""Bytes of a text file. The largest manifests have a few megabytes."""
DEEPEST = 100
"""Levels of nesting."""
LARGEST_INTEGER = 2**64


def require_file(path: Path, what: str, error: type[MezzotintError], hint: str | None = None) -> None:
    """Raise `error` for a path that is no regular file: reading a FIFO waits, and a device may have no end.

    `what` names the file in the message, like "the manifest".
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as failure:  # ValueError: a path with a null character
        raise error(f"{what} cannot be read: {_reason(failure)}", where=str(path), hint=hint) from failure
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise error(f"{what} cannot be read: it is {kind}, not a file", where=str(path), hint=hint)


def read_text(
    path: Path, what: str, error: type[MezzotintError], *, hint: str | None = None, most: int = MOST_BYTES
) -> str:
    """Return the text of a file in UTF-8, with or without a byte order mark. Raise `error` for any other file."""
    require_file(path, what, error, hint)
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            data = file.read(min(size, most) + 1)  # `read` takes all of the memory that it is asked for at once
    except OSError as failure:
        raise error(f"{what} cannot be read: {_reason(failure)}", where=str(path), hint=hint) from failure
    if len(data) > most:
        raise error(f"{what} cannot be read: it has more than {most} bytes", where=str(path), hint=hint)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as failure:
        byte = f"byte {failure.start} is 0x{data[failure.start]:02x}"
        raise error(f"{what} is no text in UTF-8: {byte}", where=str(path), hint=hint) from failure


def read_json(
    path: Path,
    what: str,
    error: type[MezzotintError],
    *,
    hint: str | None = None,
    infinite: bool = False,
    most: int = MOST_BYTES,
) -> Any:
    """Return the data of a JSON file. Raise `error` for a file that is no JSON or that passes a bound.

    `infinite` accepts Infinity and -Infinity, which diffusers writes for the bounds of its schedulers.
    """
    text = read_text(path, what, error, hint=hint, most=most)
    try:
        return parse_json(text, infinite=infinite)
    except ValueError as failure:
        raise error(f"{what} is not readable JSON: {failure}", where=str(path), hint=hint) from failure


def parse_json(text: str, *, infinite: bool = False) -> Any:
    """Return the data of a JSON text. Raise ValueError for what is no JSON, and for what passes a bound."""

    def constant(name: str) -> float:
        if infinite and name != "NaN":
            return float(name.replace("Infinity", "inf"))
        raise ValueError(f"it has {name} as a number")

    try:
        data = json.loads(
            text, parse_constant=constant, parse_int=_integer, parse_float=_number, object_pairs_hook=_object
        )
    except RecursionError as failure:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from failure
    if text.count("[") + text.count("{") > DEEPEST:
        _check_depth(data)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as failure:
            raise ValueError("a text has half of a surrogate pair") from failure
    return data


def _integer(digits: str) -> int:
    if len(digits) > 21 or not -LARGEST_INTEGER < (value := int(digits)) < LARGEST_INTEGER:
        raise ValueError(f"the integer {digits[:12]}... has more than 64 bits")
    return value


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} is there twice")
    return mapping


def _check_depth(data: Any) -> None:
    level, depth = [data], 0
    while level:
        depth += 1
        if depth > DEEPEST + 1:
            raise ValueError(f"it is nested deeper than {DEEPEST} levels")
        level = [inner for value in level for inner in _inside(value)]


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _reason(failure: Exception) -> str:
    return (failure.strerror if isinstance(failure, OSError) else None) or str(failure)
