"""center_tokens: take the loud tokens of a prompt out of the range of the others.

The first token of a CLIP prompt is the same for all prompts, and up to a hundred times as large as the others (MixDQ,
arXiv 2405.17873): a range that holds it leaves two or three levels of 8 bits to the words, and the rounding of the
token itself, and of the weights that it meets, is as loud as it is. A condition `[B, T, C]` loses the mean of each loud
token in front of the layers that read it. Their outputs get back what they make of it, computed here, in float:

    MatMul(c, w)    ->    MatMul(c - m, w) + m w                              m: [1, T, C], zero for the other tokens
                          MatMul((c - m) / s, w) s + m w                      where a token is loud without its mean

Where the number of tokens is open, m, s and m w are rows of tables that end one row behind the last loud token:

    m = Gather(means, Min(Range(T), last + 1))

A token that is the same in every prompt is then exact, and one that varies is as exact as the others. MixDQ takes the
first token's outputs as they are, whatever the token is; this also computes the function of the float graph for prompts
with another first token. Means and factors (powers of two) are those of the calibration's conditions; a token is loud
where its largest value is `ratio` times the median of all tokens. Keys and values that are loud themselves stay so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import (
    Builder,
    Names,
    consumers,
    is_constant,
    is_op,
    name_of,
    numpy_of,
    replace_use,
)
from mezzotint.compiler.graph.require import required, shape_of

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Loud:
    """The means of loud tokens `[1, T, C]`, the factor of each token `[1, T, 1]`, and how many are loud.

    For an open number of tokens the last row is that of all quiet tokens behind the loud ones.
    """

    means: _Floats
    factors: _Floats
    count: int


@dataclass(frozen=True)
class CenterTokens(GraphPass):
    """Tokens at least `ratio` times as large as the median token are taken out of the range."""

    ratio: float = 4.0

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # c - m is rounded where c is far from m

    def __post_init__(self) -> None:
        if not self.ratio >= 2:
            raise RecipeError(f"center_tokens.ratio is {self.ratio}", where=self.name, hint="choose 2 or more")

    def run(self, program: Program, context: Context) -> Program:
        graph, names, said = program.graph, Names(program.graph), []
        by_name = {name_of(value): value for value in graph.inputs}
        for name in program.signature.conditions:
            arrays = [rows[name] for rows in (context.conditions, context.unconditional) if name in rows]
            layers = _readers(by_name[name])
            loud = _loud_tokens(by_name[name], arrays, self.ratio) if layers else None
            if loud is not None:
                _center(graph, names, by_name[name], layers, loud)
                said.append(f"{loud.count} loud tokens of {name} taken out of the range of {len(layers)} layers")
        return program.noted("; ".join(said) or "no token is louder than the others")


def _readers(condition: ir.Value) -> list[ir.Node]:
    """Return the layers over tokens that read a condition with constant weights."""
    found = [n for n in consumers(condition) if is_op(n, "MatMul") and n.inputs[0] is condition]
    return [node for node in found if is_constant(node.inputs[1])]


def _loud_tokens(condition: ir.Value, arrays: list[npt.NDArray[Any]], ratio: float) -> _Loud | None:
    """Return the loud tokens, None where there are none."""
    shape = condition.shape
    if shape is None or len(shape) != 3 or condition.dtype != ir.DataType.FLOAT:
        return None
    is_open = not isinstance(shape[1], int)
    rows = np.concatenate(arrays) if arrays else np.zeros((1, 1, 1))
    largest = np.abs(rows).max(axis=(0, 2))
    median = float(np.median(largest))
    loud = largest >= ratio * median
    if not median > 0 or not (is_open or len(largest) == shape[1]) or not bool(loud.any()):
        return None
    means = np.where(loud[:, None], rows.mean(axis=0, dtype=np.float64), 0.0).astype(np.float32)
    rest = np.abs(rows - means).max(axis=(0, 2)) / median
    factors = np.exp2(np.round(np.log2(np.where(loud & (rest >= ratio), rest, 1.0)))).astype(np.float32)
    if is_open:
        tokens = int(np.flatnonzero(loud)[-1]) + 1
        means = np.concatenate([means[:tokens], np.zeros_like(means[:1])])
        factors = np.append(factors[:tokens], np.float32(1))
    return _Loud(means[None], factors.reshape(1, -1, 1), int(loud.sum()))


class _Rows:
    """The row of each token in a table `[1, T, C]`: the constant itself, or a Gather for an open number of tokens."""

    def __init__(self, build: Builder, condition: ir.Value, stem: str, loud: _Loud) -> None:
        self._build, self._tokens = build, shape_of(condition)[1]
        self._index: ir.Value | None = None
        if isinstance(self._tokens, int):
            return
        int64, axis = ir.DataType.INT64, {"start": 1, "end": 2}
        count = build.op("Shape", [condition], f"{stem}_count", dtype=int64, shape=[1], attributes=axis)
        scalar = build.constant(f"{stem}_scalar", np.array([], np.int64))
        stop = build.op("Reshape", [count, scalar], f"{stem}_stop", dtype=int64, shape=[])
        first, step = (build.constant(f"{stem}_{name}", np.array(n)) for name, n in (("first", 0), ("step", 1)))
        places = build.op("Range", [first, stop, step], f"{stem}_places", dtype=int64, shape=[self._tokens])
        last = build.constant(f"{stem}_last", np.array([loud.means.shape[1] - 1]))
        self._index = build.op("Min", [places, last], f"{stem}_rows", dtype=int64, shape=[self._tokens])

    def of(self, name: str, table: _Floats) -> ir.Value:
        """Return the rows of a table."""
        value = self._build.constant(name, table)
        if self._index is None:
            return value
        known: dict[str, Any] = {"dtype": ir.DataType.FLOAT, "shape": [1, self._tokens, table.shape[2]]}
        return self._build.op("Gather", [value, self._index], f"{name}_rows", attributes={"axis": 1}, **known)


def _center(graph: ir.Graph, names: Names, condition: ir.Value, layers: list[ir.Node], loud: _Loud) -> None:
    stem = name_of(condition)
    build = Builder(graph, names, next(node for node in graph if node in layers))
    rows = _Rows(build, condition, stem, loud)
    even = build.op("Sub", [condition, rows.of(f"{stem}_means", loud.means)], f"{stem}_centered", like=condition)
    factor = rows.of(f"{stem}_factors", loud.factors) if bool((loud.factors > 1).any()) else None
    if factor is not None:
        shares = rows.of(f"{stem}_shares", np.float32(1) / loud.factors)
        even = build.op("Mul", [even, shares], f"{stem}_even", like=condition)
    for node in layers:
        out, weight = node.outputs[0], numpy_of(required(node.inputs[1], "the weight", name_of(node.outputs[0])))
        readers = consumers(out)
        replace_use(node, condition, even)
        behind, back = Builder(graph, names, after=node), out
        if factor is not None:
            back = behind.op("Mul", [back, factor], f"{name_of(out)}_loud", like=out)
        known = rows.of(f"{name_of(out)}_of_means", (loud.means.astype(np.float64) @ weight).astype(np.float32))
        back = behind.op("Add", [back, known], f"{name_of(out)}_whole", like=out)
        for reader in readers:
            replace_use(reader, out, back)
