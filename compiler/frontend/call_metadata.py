"""The arguments that an export keeps as constants, noted in the metadata of the ONNX model.

They stay with a file of `--export`: a bundle that is compiled from the file knows them like one from the module.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from mezzotint.runtime.bundle.network_call import METADATA, call_record, is_record

from ..errors import ModelError
from .architectures.row import TokenRows


def note_call(model: ir.Model, arguments: Mapping[str, Any]) -> None:
    """Note arguments of a network's call: plain values, tensors of torch, sequences of them, TokenRows."""
    if arguments:
        record = call_record({name: _as_arrays(value) for name, value in arguments.items()})
        model.metadata_props[METADATA] = json.dumps(record, sort_keys=True, allow_nan=False)


def _as_arrays(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_arrays(part) for part in value]
    if isinstance(value, TokenRows):
        return {"first": list(value.first), "step": list(value.step)}
    return value.detach().numpy() if hasattr(value, "detach") else value


def noted_call(model: ir.Model, where: str) -> dict[str, Any]:
    """Return {"call": the record} of a model that has one, else {}. Raises ModelError for another text in its place."""
    text = model.metadata_props.get(METADATA)
    if text is None:
        return {}
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not is_record(record):
        raise ModelError(
            f"the metadata {METADATA!r} of the model is malformed", where=where, hint="export it again, or remove it"
        )
    return {"call": record}
