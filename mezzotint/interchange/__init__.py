"""Reading and writing what other tools read: the overrides of onnxruntime's quantizer, and JSON files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.errors import InputError

from ..io.files import replacing

OVERRIDES = "TensorQuantOverrides"
OVERRIDES_FORMAT = 1


def write_json(path: Path, data: Any, *, force: bool = False) -> None:
    """Write a file beside its target and move it into place. Raises OutputError for one that exists."""
    if path.exists() and not (force and path.is_file()):
        raise OutputError("the output exists already", where=str(path), hint="choose another file, or add --force")
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="\n")


def load_overrides(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """What `quantize_static(..., extra_options={"TensorQuantOverrides": ...})` wants, with its QuantType and numpy.

    Raises InputError for a file that `mezzotint overrides` did not write.
    """
    from onnxruntime.quantization import QuantType

    data = _read(Path(path))
    types = {"scale": np.float32, "rmin": np.float32, "rmax": np.float32}
    found: dict[str, list[dict[str, Any]]] = {}
    for name, rows in data[OVERRIDES].items():
        kind = QuantType[rows[0]["quant_type"]]
        zero = {"QInt8": np.int8, "QUInt8": np.uint8}.get(rows[0]["quant_type"])
        found[name] = []
        for row in rows:
            made = {key: np.array(row[key], types[key]) for key in types if key in row}
            if "zero_point" in row:
                # numpy has no 4-bit integers of its own; onnxruntime converts what it is given.
                made["zero_point"] = np.array(row["zero_point"], zero or np.int8)
            made |= {"axis": row["axis"]} if "axis" in row else {}
            found[name].append({"quant_type": kind, **made})
    return found


def load_arguments(path: str | Path) -> dict[str, Any]:
    """All keyword arguments of `quantize_static` that a file of overrides knows, the overrides among them."""
    from onnxruntime.quantization import QuantFormat, QuantType

    given = _read(Path(path))["arguments"]
    return {
        "quant_format": QuantFormat[given["quant_format"]],
        "activation_type": QuantType[given["activation_type"]],
        "weight_type": QuantType[given["weight_type"]],
        "per_channel": given["per_channel"],
        "op_types_to_quantize": given["op_types_to_quantize"],
        "nodes_to_exclude": given["nodes_to_exclude"],
        "extra_options": {OVERRIDES: load_overrides(path)},
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"the overrides are not readable JSON: {error}", where=str(path)) from error
    if (
        not isinstance(data, dict)
        or data.get("format") != OVERRIDES_FORMAT
        or not {OVERRIDES, "arguments"} <= set(data)
    ):
        raise InputError(
            "this is no file of overrides", where=str(path), hint="write it with `mezzotint overrides BUNDLE`"
        )
    return data
