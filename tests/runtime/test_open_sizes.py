"""Sizes of open dimensions by the names that exporters give them, and conditions of these sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.calibration.conditions import random_rows, sizes_of_rows
from mezzotint.runtime.call_inputs import CallInputs
from mezzotint.runtime.engine import TensorInfo
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.open_sizes import known_size, open_size
from mezzotint.runtime.signature import Signature


@pytest.mark.parametrize(
    ("dimension", "size"),
    [("tokens", 5), ("tokens + 16", 21), ("other", 77), ("other + 3", 80), ("2*tokens", 77), ("", 77), (None, 77)],
)
def test_a_name_or_a_name_and_a_number(dimension: str | None, size: int) -> None:
    assert open_size(dimension, {"tokens": 5}, 77) == size
    assert known_size(dimension, {"tokens": 5}) == (size if size in (5, 21) else None)


@pytest.mark.parametrize("named", [{}, {"tokens": 5}])
def test_random_conditions_fit_each_other(named: dict[str, int]) -> None:
    """The mask of Chroma covers the prompt and 16 tokens of an image."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    inputs = {
        "prompt": ir.Value(name="prompt", shape=ir.Shape(["batch", "tokens", 3]), type=kind),
        "mask": ir.Value(name="mask", shape=ir.Shape(["batch", "tokens + 16"]), type=kind),
    }
    tokens = named.get("tokens", 77)

    rows = random_rows(inputs, (4, 8), 2, 0, named)

    assert rows["prompt"].shape == (2, tokens, 3) and rows["mask"].shape == (2, tokens + 16)
    assert sizes_of_rows(inputs, rows) == {"tokens": tokens}


def test_the_lengths_of_a_call_fit_each_other() -> None:
    shapes: dict[str, tuple[Any, ...]] = {
        "x": ("batch", 4, 8),
        "t": ("batch",),
        "prompt": ("batch", "tokens", 3),
        "mask": ("batch", "tokens + 4"),
    }
    declared = {name: TensorInfo("tensor(float)", np.dtype(np.float32), shape) for name, shape in shapes.items()}
    calls = CallInputs(Signature("x", "t", "out", ("prompt", "mask")), declared, None)

    def call(tokens: int, masked: int) -> dict[str, Any]:
        rows = {"prompt": np.zeros((2, tokens, 3), np.float32), "mask": np.zeros((2, masked), np.float32)}
        return calls.feeds(np.zeros((2, 4, 8), np.float32), 1, rows)

    assert call(5, 9)["mask"].shape == (2, 9) and call(1, 5)["prompt"].shape == (2, 1, 3)
    with pytest.raises(InputError, match=r"'mask' is float32 \[2, 8\]") as caught:
        call(5, 8)
    assert caught.value.where == "axis 1, where tokens + 4 is 9"
