"""store_half: what stays in float is rounded to values that half precision has.

The file stores a float32 constant in two bytes wherever nothing is lost by it (compiler/lowering/packing.py), behind a
Cast that onnxruntime computes when a session is built. Weights that were trained or saved in half precision need no
more than that; for all others this pass makes it so: x -> float32(float16(x)), relative error up to 2^-11 = 4.9e-4, in
the islands' weights, the factors and shifts of norms, and tables that depend on the timestep, from 1 kB on.

Not rounded: what an integer kernel reads (weights become integers anyway; biases become int32, which are finer), zero
points, and, unless `scales` asks for it, tables of scales. Those may be: quantizer, dequantizer and the int32 biases
all read the same table, so that a grid only becomes wider or narrower by 2^-11, an eighth of a step at the end of one
of 256.

A constant stays as it is where half precision does not reach: beyond 65504, or where a row of its values (along the
first axis) moves by more than `largest_error`, relative to the row's length, because it lies among the subnormal
numbers, below 6.1e-5. The history says how many.
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
from mezzotint.compiler.lowering.packing import SMALLEST_SAVING, is_float_constant, rounded_to_half

_PASSED_ON = ("Gather", "Split", "Squeeze", "Reshape")  # what stands between a table and its readers


@dataclass(frozen=True)
class StoreHalf(Pass):
    """`largest_error` is relative to a row's length; `scales` rounds tables of activation scales as well."""

    largest_error: float = 1e-3
    scales: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        if not 0 < self.largest_error < 1:
            raise RecipeError(
                f"largest_error is {self.largest_error}", where=self.name, hint="choose a number between 0 and 1"
            )

    def run(self, program: Program, context: Context) -> Program:
        made, kept, exact, saved = 0, 0, 0, 0
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
                made += 1
            saved += array.nbytes // 2
            context.progress(self.name, i + 1, len(chosen))
        note = f"{made} constants rounded to half precision, {exact} had it already; {saved} bytes saved"
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
    """The nodes that read a constant, or a row or a part of it, and as which input."""
    found: set[tuple[ir.Node, int]] = set()
    for node, index in value.uses():
        if is_op(node, *_PASSED_ON) and index == 0:
            for out in node.outputs:
                found |= _readers(out)
        else:
            found.add((node, index))
    return found


def _is_integer(node: ir.Node) -> bool:
    """Whether a layer multiplies dequantized matrices."""
    makers = [value.producer() for value in node.inputs[:2] if value is not None]
    return len(makers) == 2 and all(is_op(maker, "DequantizeLinear") for maker in makers)


def _error(array: npt.NDArray[np.float32], half: npt.NDArray[np.float32]) -> float:
    """How far the values of a row move at most, relative to its length; infinite beyond half precision's range."""
    if not np.isfinite(half).all():
        return float("inf")
    rows = array.reshape(len(array), -1) if array.ndim > 1 else array.reshape(1, -1)
    worst = 0.0
    for row, other in zip(rows, half.reshape(rows.shape), strict=True):
        length = float(np.linalg.norm(row.astype(np.float64)))
        if length:
            worst = max(worst, float(np.linalg.norm((row - other).astype(np.float64))) / length)
    return worst
