"""The types of ONNX as those of torch."""

from __future__ import annotations

import onnx_ir as ir
import torch

_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}


def torch_dtype(number: int) -> torch.dtype:
    """Return the torch type of an ONNX type's number. Raise ValueError for one that torch does not have."""
    found = _DTYPES.get(ir.DataType(number))
    if found is None:
        raise ValueError(f"torch has no type {ir.DataType(number).name}")
    return found
