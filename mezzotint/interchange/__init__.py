"""Files for other tools: the overrides of onnxruntime's quantizer, and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.bundle.staging import check_target_file
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import read_json

from ..io.files import replacing

OVERRIDES = "TensorQuantOverrides"
OVERRIDES_FORMAT = 1


def write_json(path: Path, data: Any, *, force: bool = False) -> None:
    """Write a temporary file and move it into place. Raises OutputError for an existing target."""
    check_target_file(path, force=force)
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8", newline="\n")


def load_overrides(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """Return the argument of `quantize_static(..., extra_options={"TensorQuantOverrides": ...})`, with its own types.

    Raises InputError for a file that `mezzotint overrides` did not write.
    """
    from onnxruntime.quantization import QuantType

    data = _read(Path(path))
    types = {"scale": np.float32, "rmin": np.float32, "rmax": np.float32}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for name, rows in data[OVERRIDES].items():
        kind = QuantType[rows[0]["quant_type"]]
        zero = {"QInt8": np.int8, "QUInt8": np.uint8}.get(rows[0]["quant_type"])
        overrides[name] = []
        for row in rows:
            values: dict[str, Any] = {key: np.array(row[key], types[key]) for key in types if key in row}
            if "zero_point" in row:
                # numpy has no 4-bit integers; onnxruntime converts the value.
                values["zero_point"] = np.array(row["zero_point"], zero or np.int8)
            values |= {"axis": row["axis"]} if "axis" in row else {}
            overrides[name].append({"quant_type": kind, **values})
    return overrides


def load_arguments(path: str | Path) -> dict[str, Any]:
    """Return the keyword arguments of `quantize_static` in a file of overrides, with the overrides."""
    from onnxruntime.quantization import QuantFormat, QuantType

    arguments = _read(Path(path))["arguments"]
    return {
        "quant_format": QuantFormat[arguments["quant_format"]],
        "activation_type": QuantType[arguments["activation_type"]],
        "weight_type": QuantType[arguments["weight_type"]],
        "per_channel": arguments["per_channel"],
        "op_types_to_quantize": arguments["op_types_to_quantize"],
        "nodes_to_exclude": arguments["nodes_to_exclude"],
        "extra_options": {OVERRIDES: load_overrides(path)},
    }


def _read(path: Path) -> dict[str, Any]:
    data = read_json(path, "the file of overrides", InputError)
    if (
        not isinstance(data, dict)
        or data.get("format") != OVERRIDES_FORMAT
        or not {OVERRIDES, "arguments"} <= set(data)
    ):
        raise InputError(
            "this is not a file of overrides", where=str(path), hint="write it with `mezzotint overrides BUNDLE`"
        )
    return data
