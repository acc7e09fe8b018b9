"""fuse_attention: let one operation compute an attention over many tokens, in float and without its big matrix.

    MatMul(q, k^T) -> Softmax -> MatMul(., v), with the moves into heads    ->    MultiHeadAttention(q, k, v)

onnxruntime's operation (domain com.microsoft) computes blocks of rows one after the other, so the matrix of all tokens
with all tokens is never stored: 1.1 GB for 4096 tokens, 8 heads and a batch of 2. As integers the two products save
less than the softmax, its quantizer and the moves of 8-bit values into heads cost. Measured at sizes of Stable
Diffusion 1.5, batch 2, two threads of a processor with AVX512-VNNI, seconds and the process's peak of memory, while
other work ran (with nothing else, 4096 tokens take 0.27 s in MultiHeadAttention, and 0.30 s as integers without moves):

    tokens, keys     integer products     MultiHeadAttention     float products
    4096, 4096       1.84   4.3 GB        1.43   0.15 GB         1.80   5.4 GB
    1024, 1024       0.16   0.36 GB       0.16   0.11 GB         0.21   0.43 GB
    4096, 77         0.06   0.18 GB       0.04   0.11 GB         0.06   0.21 GB

In transformers a norm of each head, rotary embeddings, and the concatenation of text and image stand between the split
into heads and the first product. They stay where they are: what they make is merged into rows again. A mask of the keys
`[b, h, 1, keys]` becomes one more channel of each head, 1 / scale in the queries and the mask in the keys, because with
an input for it the operation stores the matrix after all. So does one number for each key times one for each query.
Keys and values that groups of queries share are repeated in front, as exporters write them. With heads as wide as those
of Flux (128), integer products are 3 to 8 % faster than the operation, and need 2.7 times the memory at 1536 tokens,
6.7 times at 4608 (docs/measurements.md).

Only onnxruntime knows the operation, so other targets keep the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, GraphPass, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.attention import SPLIT, TOKENS, Attention, Heads, attention_of
from mezzotint.compiler.graph.attention_bias import ScoreBias
from mezzotint.compiler.graph.nodes import (
    MICROSOFT,
    Builder,
    Names,
    is_op,
    known_ints,
    name_of,
    remove_dead,
    replace_value,
)
from mezzotint.compiler.graph.require import producer, shape_of
from mezzotint.runtime.open_sizes import open_size
from mezzotint.runtime.sampling.condition_network import call_conditions
from mezzotint.runtime.targets import ONNXRUNTIME, Target

LOWEST = -1e30
"""What is added to the scores of a masked key, at the least: far below all scores, and finite for every scale."""


@dataclass(frozen=True)
class FuseAttention(GraphPass):
    """Which attention becomes one operation.

    - `tokens`: the fewest queries of an attention that does; null for none, which other targets than onnxruntime get.
    """

    tokens: int | None = 1024

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # the softmax is computed in parts

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise RecipeError(f"tokens is {self.tokens}", where=self.name, hint="choose at least 1, or null for none")

    def for_target(self, target: Target, passes: Sequence[Pass]) -> FuseAttention:
        """Return this pass, which fuses nothing for an engine that lacks the operation."""
        return self if target == ONNXRUNTIME else replace(self, tokens=None)

    def run(self, program: Program, context: Context) -> Program:
        graph, fused = program.graph, 0
        if self.tokens is None:
            return program.noted("no attention is fused")
        found = [one for node in graph if is_op(node, "Softmax") and (one := attention_of(node)) is not None]
        queries = _queries(program, context, found)
        names = Names(graph)
        for attention in found:
            if queries[name_of(attention.query.split)] >= self.tokens:
                _fuse(graph, names, attention)
                fused += 1
        remove_dead(graph)
        return program.noted(f"{fused} of {len(found)} attentions fused")


def _queries(program: Program, context: Context, found: Sequence[Attention]) -> dict[str, int]:
    """Return the number of tokens of each query at the program's sample size: one call tells what no shape states."""
    axes = {name_of(one.query.split): one.query.dims.index((TOKENS,)) for one in found}
    sizes = {name_of(one.query.split): _known(one.query) for one in found}
    unknown = [name for name, size in sizes.items() if size is None]
    measured: dict[str, int] = {}
    if unknown:
        batch = program.fixed_batch or 1
        x, t = np.zeros((batch, *program.shape), np.float32), program.deployment.timesteps[0]
        with Executor(program.model, context.folder, taps=unknown, threads=context.threads, only_taps=True) as executor:
            given = _zeros(program, batch) | context.condition_rows(0, batch)
            values = executor.call(program.signature, x, t, call_conditions(context.condition_network, x, t, given))
        measured = {name: values[name].shape[axes[name]] for name in unknown}
    return {name: measured[name] if size is None else size for name, size in sizes.items()}


def _zeros(program: Program, batch: int) -> dict[str, npt.NDArray[Any]]:
    """Return conditions of zeros: only shapes are asked for, and some commands have no conditions."""
    found = {}
    for value in program.graph.inputs:
        if value.name in program.signature.conditions and value.shape is not None and value.dtype is not None:
            sizes = [size if isinstance(size, int) else open_size(size.value, {}, 1) for size in value.shape]
            if sizes and not isinstance(value.shape[0], int):
                sizes[0] = batch
            found[value.name] = np.zeros(sizes, value.dtype.numpy())
    return found


def _known(query: Heads) -> int | None:
    """Return the number of tokens of a query where its shape states it."""
    stated = known_ints(query.split.shape, [query.dims.index((TOKENS,))])
    return None if stated is None else stated[0]


def _fuse(graph: ir.Graph, names: Names, found: Attention) -> None:
    graph.opset_imports.setdefault(MICROSOFT, 1)
    output = found.output
    build = Builder(graph, names, producer(output))
    columns: tuple[ir.Value | None, ir.Value | None] = (None, None)
    if found.bias is not None:
        columns = _query_column(build, found, found.bias), _key_column(build, found.bias)
    fused = build.op(
        "MultiHeadAttention",
        [
            _rows(build, found.query, columns[0]),
            _rows(build, found.key, columns[1]),
            _rows(build, found.value, None),
        ],
        f"{name_of(output)}_fused",
        like=output,
        attributes={"num_heads": found.query.heads, "scale": found.scale},
        domain=MICROSOFT,
    )
    replace_value(output, fused)


def _query_column(build: Builder, found: Attention, bias: ScoreBias) -> ir.Value:
    """Return what multiplies the keys' column, `[b, queries or 1, h, 1]`; the operation scales it as any other."""
    share = build.constant(f"{name_of(found.output)}_share", np.full((1, 1, 1, 1), 1 / found.scale, np.float32))
    if bias.query is None:
        return share
    stem = name_of(bias.query)
    turned = _turned(build, bias.query, [0, 2, 1, 3], f"{stem}_column")
    return build.op("Mul", [turned, share], f"{stem}_share", like=turned)


def _key_column(build: Builder, bias: ScoreBias) -> ir.Value:
    """Return the bias of each key `[b, keys, h, 1]`, above a number that the scale cannot make infinite."""
    stem = name_of(bias.key)
    lowest = build.constant(f"{stem}_lowest", np.float32(LOWEST))
    finite = build.op("Max", [bias.key, lowest], f"{stem}_finite", like=bias.key)
    return _turned(build, finite, [0, 3, 1, 2], f"{stem}_column")


def _rows(build: Builder, heads: Heads, column: ir.Value | None) -> ir.Value:
    """Return queries, keys or values as `[batch, tokens, heads * width]`, with one more channel for each head."""
    if heads.rows is not None and column is None:
        return heads.rows
    value, stem = heads.split, name_of(heads.split)
    order = [heads.dims.index(dim) for dim in SPLIT]
    if order != sorted(order):
        value = _turned(build, value, order, f"{stem}_split")
    sizes, width = list(shape_of(value)), heads.width
    if column is not None:
        ends = {"start": 0, "end": 3}
        count = build.op("Shape", [value], f"{stem}_sizes", dtype=ir.DataType.INT64, shape=[3], attributes=ends)
        one = build.constant(f"{stem}_one", np.array([1]))
        whole = build.op(
            "Concat", [count, one], f"{stem}_column_sizes", dtype=ir.DataType.INT64, shape=[4], attributes={"axis": 0}
        )
        spread = build.op("Expand", [column, whole], f"{stem}_column", like=value, shape=[*sizes[:3], 1])
        width += 1
        value = build.op(
            "Concat", [value, spread], f"{stem}_more", like=value, shape=[*sizes[:3], width], attributes={"axis": -1}
        )
    merged = build.constant(f"{stem}_merged", np.array([0, 0, heads.heads * width]))
    return build.op("Reshape", [value, merged], f"{stem}_rows", like=value, shape=[*sizes[:2], heads.heads * width])


def _turned(build: Builder, value: ir.Value, order: Sequence[int], name: str) -> ir.Value:
    sizes = [shape_of(value)[axis] for axis in order]
    return build.op("Transpose", [value], name, like=value, shape=sizes, attributes={"perm": list(order)})
