"""The spellings that a quantized program can be lowered to, one file each."""

from __future__ import annotations

import onnx_ir as ir

from ..core.program import Program
from . import integer as lower_integer
from . import packing
from . import premul as lower_premul
from . import qdq as lower_qdq


def lower(program: Program) -> ir.Model:
    """What the target gets of a program that insert_qdq quantized, in the spelling that it asked for, packed."""
    model = _spelled(program)
    packing.pack(model)
    return model


def _spelled(program: Program) -> ir.Model:
    if program.lowering == "integer":
        return lower_integer.lower(program)
    if program.lowering == "premul":
        return lower_premul.lower(program)
    return lower_qdq.lower(program.model)
