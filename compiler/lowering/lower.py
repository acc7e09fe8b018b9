"""The lowerings: a quantized program becomes the graph that its target gets, in one of several forms."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from mezzotint.runtime.targets import ONNXRUNTIME

from ..core.program import Lowering, Program
from ..errors import RecipeError
from . import packing
from .bias_room import with_room
from .constant import lower_constant
from .float_islands import keep_islands, unpack_transposed
from .integer import lower_integer
from .packable import has_sparse_floats
from .qdq import lower_qdq

LOWERINGS: Mapping[Lowering, Callable[[Program], ir.Model]] = {
    "qdq": lambda program: lower_qdq(program.model),
    "integer": lower_integer,
    "constant": lower_constant,
}


def lower_float(program: Program) -> ir.Model:
    """Return the graph that the target gets of a program in float: its own, with pruned weights stored as such."""
    if program.target != ONNXRUNTIME or not has_sparse_floats(program.model):
        return program.model
    model = program.model.clone()
    packing.pack_floats(model)
    return model


def lower(program: Program) -> ir.Model:
    """Return the graph that the target gets of a quantized program, in the form of `program.lowering`, packed.

    Raises RecipeError for an unknown lowering, PassError for a bias that fits into int32 at no scale.
    """
    if program.lowering not in LOWERINGS:
        raise RecipeError(
            f"unknown lowering {program.lowering!r}",
            where="insert_qdq.lowering",
            hint=f"choose one of {', '.join(LOWERINGS)}",
        )
    if program.lowering == "constant":  # its biases are float; what follows is for onnxruntime's CPU provider
        model = lower_constant(program)
        packing.pack(model, "int8" if program.target == "tensorrt" else "whole")
        return model
    model = LOWERINGS[program.lowering](with_room(program))
    keep_islands(model.graph)
    unpack_transposed(model.graph)
    packing.pack(model)
    return model
