"""center_attention: take the mean token out of keys, queries and values, which their quantizers then need not hold.

    keys      softmax(q (k - mean k)^T) = softmax(q k^T)           the scores of a query all lose the number q . mean k
    queries   q k^T = (q - mean q) k^T + (mean q) k^T              the last term, one number for each key, is in float
    values    p v = p (v - mean v) + mean v                        because the weights p of a query sum to 1

Means are over the tokens of one sample and head, computed at run time. All three are exact, with masks too: what a mask
adds is not touched. The keys of transformers have channels that are loud and nearly the same for all tokens: a range
that holds them leaves few levels to what tells the tokens apart, which alone counts.

Sources: SageAttention (arXiv 2410.02367) smooths the keys, SageAttention2 (arXiv 2411.10958) the queries and values as
well; its means of queries are those of blocks of 128 tokens, here of all of them. Behind centred values the share of a
row that rounding takes costs little: it is spread over values whose sum is 0 (correct_softmax adds it back instead).

Keys and values are centred where their tokens are whole rows, in front of the split into heads, if nothing else reads
them on the way; two passes over as many numbers as a linear layer makes. Queries cost one over the matrix of scores as
well, for the Add. Attentions over plain matrices, without a batch, stay as they are.

Measured on digits-dit (5 attentions over 64 tokens), with nothing but the attention quantized, SQNR of epsilon: 52.0 dB
at 8 bits and 18.1 at 4; with centred values 52.5 and 27.9. The mean has a quarter of its keys' energy and none of their
peak: centred, they lose 0.1 dB. A random network whose keys have a bias of 100 in one channel goes from 34.0 dB to
44.9, as without the bias (with the product of queries and keys alone quantized). A mean of the calibration, folded into
biases, would cost no time, in place of 5 to 9 % of an attention of 64 to 1024 tokens; here it lowers no peak either, so
it is left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.attention import Attention, Heads, attention_of
from mezzotint.compiler.graph.nodes import Builder, Names, name_of, replace_use, replace_value
from mezzotint.compiler.graph.ops import BRANCH
from mezzotint.compiler.graph.require import producer, required, shape_of
from mezzotint.compiler.graph.score_products import ScoreProducts, only_read_by, score_products

LEAST_RANK = 3  # onnxruntime makes a float Gemm of a MatMul of two matrices and the Add behind it
ROW_TOKENS = 1  # the axis of the tokens where they are whole rows `[batch, tokens, heads * width]`


@dataclass(frozen=True)
class CenterAttention(GraphPass):
    """Which factors of an attention's products lose the mean of their tokens."""

    keys: bool = True
    queries: bool = False
    values: bool = False

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # differences from a mean are rounded

    def __post_init__(self) -> None:
        if not (self.keys or self.queries or self.values):
            hint = "choose keys, queries or values, or leave the pass out"
            raise RecipeError(f"{self.name} has nothing to center", where=self.name, hint=hint)

    def run(self, program: Program, context: Context) -> Program:
        graph, names = program.graph, Names(program.graph)
        done: Counter[str] = Counter()
        found = score_products(graph)
        for products in found:
            if len(products.scores.outputs[0].shape or ()) < LEAST_RANK:
                done["over plain matrices stay"] += 1
                continue
            attention = attention_of(products.softmax)
            if self.keys:
                _center_keys(graph, names, products, attention)
                done["lose the mean key"] += 1
            if self.queries:
                _center_queries(graph, names, products)
                done["the mean query"] += 1
            if self.values and products.mix is not None:
                _center_values(graph, names, products.mix, attention)
                done["the mean value"] += 1
        counts = ", ".join(f"{count} {what}" for what, count in done.items())
        return program.noted(f"of {len(found)} attentions {counts}" if found else "no attention to center")


def _center_keys(graph: ir.Graph, names: Names, products: ScoreProducts, attention: Attention | None) -> None:
    operand = required(products.scores.inputs[1], "the keys", products.scores)
    place = _rows(operand, None if attention is None else attention.key)
    if place is not None:
        _subtract_mean(graph, names, *place, ROW_TOKENS)
    else:
        _subtract_mean(graph, names, operand, products.scores, len(shape_of(products.scores.outputs[0])) - 1)


def _center_queries(graph: ir.Graph, names: Names, products: ScoreProducts) -> None:
    node = products.scores
    queries, keys = (required(value, "an operand", node) for value in node.inputs[:2])
    out = node.outputs[0]
    stem, layer = name_of(out), node.name or name_of(out)
    dims = shape_of(out)
    mean = _subtract_mean(graph, names, queries, node, len(dims) - 2)
    build = Builder(graph, names, node)
    row = build.op("MatMul", [mean, keys], f"{stem}_of_mean", dtype=out.dtype, shape=[*dims[:-2], 1, dims[-1]])
    producer(row).metadata_props[BRANCH] = layer  # a part of rank 1 of the product, in float
    _add_behind(graph, names, out, row, f"{stem}_whole")


def _center_values(graph: ir.Graph, names: Names, mix: ir.Node, attention: Attention | None) -> None:
    operand = required(mix.inputs[1], "the values", mix)
    place = None if attention is None else _rows(operand, attention.value)
    if place is not None and attention is not None:
        mean = _subtract_mean(graph, names, *place, ROW_TOKENS)
        out = attention.output
    else:
        out = mix.outputs[0]
        mean = _subtract_mean(graph, names, operand, mix, len(shape_of(out)) - 2)
    _add_behind(graph, names, out, mean, f"{name_of(out)}_whole")


def _rows(operand: ir.Value, heads: Heads | None) -> tuple[ir.Value, ir.Node] | None:
    """Return the rows that an operand is made of, and the node that splits them, if nothing else reads them."""
    if heads is None or heads.rows is None:
        return None
    reader = only_read_by(heads.rows, operand)
    return None if reader is None else (heads.rows, reader)


def _subtract_mean(graph: ir.Graph, names: Names, value: ir.Value, reader: ir.Node, axis: int) -> ir.Value:
    """Let a node read a value less its mean along an axis; return the mean, whose axis has the length 1."""
    build, stem = Builder(graph, names, reader), name_of(value)
    shape = None if value.shape is None else [1 if d == axis else n for d, n in enumerate(value.shape)]
    axes = build.constant(f"{stem}_tokens", np.array([axis], np.int64))
    kept = {"keepdims": 1}
    mean = build.op("ReduceMean", [value, axes], f"{stem}_mean", dtype=value.dtype, shape=shape, attributes=kept)
    replace_use(reader, value, build.op("Sub", [value, mean], f"{stem}_centered", like=value))
    return mean


def _add_behind(graph: ir.Graph, names: Names, out: ir.Value, summand: ir.Value, name: str) -> None:
    """Let all readers of a value read it plus a summand, which is computed in front of it."""
    build = Builder(graph, names, after=producer(out))
    whole = build.op("Add", [out, summand], name, like=out)
    replace_value(out, whole)
    producer(whole).replace_input_with(0, out)
