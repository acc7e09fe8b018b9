"""store_half: round constants that stay in float to half precision, where that changes them little.

The file stores a float32 constant in two bytes wherever that loses nothing (compiler/lowering/packing.py), behind a
Cast that onnxruntime computes when it builds a session. Weights that were trained or saved in half precision qualify as
they are. This pass makes the others qualify: x -> float32(float16(x)), with a relative error of up to 2^-11 = 4.9e-4.
It rounds the weights of islands, the factors and shifts of norms, and tables over the timestep, from 1 kB on.

Not rounded: inputs of integer kernels (weights become integers anyway; biases become int32, which is finer), zero
points, and tables of scales unless `scales` is set. Rounding those is safe: quantizer, dequantizer and the int32 biases
read the same table, so a grid only becomes wider or narrower by 2^-11, an eighth of a step at the end of a grid of 256.

A constant stays as it is if it exceeds half precision's range (65504), or if a row of its values (along the first axis)
moves by more than `largest_error` relative to the row's length, because it lies among the subnormal numbers, below
6.1e-5. The history says how many do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import is_op, name_of, numpy_of
from mezzotint.compiler.lowering.packable import SMALLEST_SAVING, is_float_constant, rounded_to_half

_PASSED_ON = ("Gather", "Split", "Squeeze", "Reshape")  # the nodes between a table and its readers


@dataclass(frozen=True)
class StoreHalf(Pass):
    """Constants in half precision.

    - `largest_error`: the largest change of a row, relative to its length (between 0 and 1).
    - `scales`: also round tables of activation scales.
    """

    largest_error: float = 1e-3
    scales: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        if not 0 < self.largest_error < 1:
            raise RecipeError(
                f"{self.name}.largest_error is {self.largest_error}",
                where=self.name,
                hint="choose a number between 0 and 1",
            )

    def run(self, program: Program, context: Context) -> Program:
        changed, kept, exact, saved = 0, 0, 0, 0
        chosen = [v for v in program.graph.initializers.values() if self._is_stored(v)]
        for i, value in enumerate(chosen):
            array = numpy_of(value)
            half = rounded_to_half(array)
            if np.array_equal(half, array):
                exact += 1
            elif _error(array, half) > self.largest_error:
                kept += 1
                continue
            else:
                value.const_value = ir.tensor(half, name=name_of(value))
                changed += 1
            saved += array.nbytes // 2
            context.progress(self.name, i + 1, len(chosen))
        note = f"{changed} constants rounded to half precision, {exact} had it already; {saved} bytes saved"
        if kept:
            note += (
                f"; {kept} kept in float32, where half precision would move a row by more than {self.largest_error:g}"
            )
        return program.noted(note)

    def _is_stored(self, value: ir.Value) -> bool:
        tensor = value.const_value
        if tensor is None or tensor.nbytes // 2 < SMALLEST_SAVING or not is_float_constant(value):
            return False
        readers = _readers(value)
        if any(is_op(node, "QuantizeLinear", "DequantizeLinear") for node, _ in readers):
            return self.scales
        return not any(index == 2 and _is_integer(node) for node, index in readers)


def _readers(value: ir.Value) -> set[tuple[ir.Node, int]]:
    """Return the nodes that read a constant, or a row or part of it, each with the index of the input."""
    readers: set[tuple[ir.Node, int]] = set()
    for node, index in value.uses():
        if is_op(node, *_PASSED_ON) and index == 0:
            for out in node.outputs:
                readers |= _readers(out)
        else:
            readers.add((node, index))
    return readers


def _is_integer(node: ir.Node) -> bool:
    """Return whether a layer multiplies dequantized matrices."""
    producers = [value.producer() for value in node.inputs[:2] if value is not None]
    return len(producers) == 2 and all(is_op(node, "DequantizeLinear") for node in producers)


def _error(array: npt.NDArray[np.float32], half: npt.NDArray[np.float32]) -> float:
    """Return the largest change of a row relative to its length; infinite beyond half precision's range."""
    if not np.isfinite(half).all():
        return float("inf")
    rows = array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1)
    worst = 0.0
    for row, other in zip(rows, half.reshape(rows.shape), strict=True):
        length = float(np.linalg.norm(row.astype(np.float64)))
        if length:
            worst = max(worst, float(np.linalg.norm((row - other).astype(np.float64))) / length)
    return worst
