"""Each helper returns what is there, and names the place where it is not."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core.program import Plan, Program
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.require import dtype_of, inputs, producer, required, shape_of, tensor_of

CONSTANT = ir.Value(name="w", const_value=ir.tensor(np.ones(2, np.float32)), shape=ir.Shape([2]))
OPEN = ir.Value(name="x")
NODE = ir.node("Clip", [OPEN, None, CONSTANT], name="clip")


def test_what_is_there_is_returned() -> None:
    assert required(0, "a number") == 0
    assert inputs(ir.node("Add", [OPEN, CONSTANT]), 2) == (OPEN, CONSTANT)
    assert producer(NODE.outputs[0]) is NODE
    assert shape_of(CONSTANT) == [2]
    assert dtype_of(ir.Value(name="y", type=ir.TensorType(ir.DataType.INT8))) == ir.DataType.INT8
    assert tensor_of(CONSTANT).numpy().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "message", "where"),
    [
        (lambda: required(None, "the plan", "w8a8"), "the plan is missing", "w8a8"),
        (lambda: inputs(NODE, 2), "input 1 of Clip is missing", "Clip 'clip'"),
        (lambda: inputs(ir.node("Add", [CONSTANT], name="add"), 2), "input 1 of Add is missing", "Add 'add'"),
        (lambda: producer(CONSTANT), "the node that computes the value is missing", "value 'w'"),
        (lambda: shape_of(OPEN), "the shape is missing", "value 'x'"),
        (lambda: dtype_of(OPEN), "the element type is missing", "value 'x'"),
        (lambda: tensor_of(OPEN), "the constant is missing", "value 'x'"),
        (lambda: shape_of(None), "the shape is missing", None),
    ],
)
def test_what_is_missing_is_named(call, message, where) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PassError, match=message) as caught:
        call()
    assert caught.value.where == where


def test_a_program_names_what_it_lacks(tiny: Program) -> None:
    for missing in (tiny.require_plan, tiny.require_stats, tiny.require_float_model, tiny.require_frozen):
        with pytest.raises(PassError, match=r"the program has no .*, which "):
            missing()


def test_a_program_returns_what_it_has(tiny: Program) -> None:
    from dataclasses import replace

    plan = Plan()
    assert replace(tiny, plan=plan).require_plan() is plan
    assert replace(tiny, frozen=(3.0,)).require_frozen() == (3.0,)
