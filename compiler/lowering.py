"""The spellings that a quantized program can be lowered to, one file each."""

from __future__ import annotations

import onnx_ir as ir

from . import lower_integer, lower_premul, lower_qdq, packing
from .program import Program


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
