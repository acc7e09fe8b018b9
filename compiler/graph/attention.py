"""Attention as exporters write it: two products of activations, a softmax between them, and the moves into heads.

    q, k, v  [batch, tokens, heads * width]
      -> Reshape, Transpose                [batch, heads, tokens, width]
      -> MatMul(q, k^T) -> Mul(scale) -> Softmax -> MatMul(., v)
      -> Transpose, Reshape                [batch, tokens, heads * width]

Exporters write the moves in many ways (torch's dynamo exporter brings the keys to three dimensions and back), and
factors stand in front of the first product or behind it. So the dimensions are followed through the moves, whatever
these are. In transformers a norm of each head, rotary embeddings or the concatenation of text and image stand between
the split into heads and the product: the moves are followed back to these, where the heads have four dimensions in any
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import onnx_ir as ir

from .attention_bias import ScoreBias, score_bias, unguarded
from .nodes import consumers, is_constant, is_op, known_ints, numpy_of

MergedDim = tuple[str, ...]
"""A dimension as the product of those that it was merged from, such as ("batch", "heads")."""

BATCH, TOKENS, HEADS, WIDTH = "batch", "tokens", "heads", "width"
_ROWS: tuple[MergedDim, ...] = ((BATCH,), (TOKENS,), (HEADS, WIDTH))
SPLIT: tuple[MergedDim, ...] = ((BATCH,), (TOKENS,), (HEADS,), (WIDTH,))
_HEAD_FIRST: tuple[MergedDim, ...] = ((BATCH,), (HEADS,), (TOKENS,), (WIDTH,))
_TRANSPOSED: tuple[MergedDim, ...] = ((BATCH,), (HEADS,), (WIDTH,), (TOKENS,))


@dataclass(frozen=True, eq=False)
class Heads:
    """Queries, keys or values on their way into heads.

    split   the value with the four dimensions `dims`, as far in front of the moves as these can be followed
    rows    the same as `[batch, tokens, heads * width]`, where a Reshape splits it; then `dims` are in this order
    factor  the product of the Muls and Divs behind it
    moves   how many Reshapes and Transposes are behind `split`
    """

    rows: ir.Value | None
    split: ir.Value
    dims: tuple[MergedDim, ...]
    heads: int
    width: int
    factor: float
    moves: int


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention.

    product  the MatMul of queries and keys
    output   the value `[batch, queries, heads * width]` where the heads are rows again
    scale    the factor of the scores
    bias     what is added to the scaled scores: a mask
    """

    query: Heads
    key: Heads
    value: Heads
    product: ir.Node
    output: ir.Value
    scale: float
    bias: ScoreBias | None = None


def attention_of(softmax: ir.Node) -> Attention | None:
    """Return the attention that a softmax belongs to, or None where it is no attention, or one of another form."""
    scores, scale = _unscaled(softmax.inputs[0])
    product, bias, before = _product(scores, scale)
    weights = unguarded(softmax, bias)
    readers = [] if weights is None else consumers(weights)
    if product is None or weights is None or len(readers) != 1 or not is_op(readers[0], "MatMul"):
        return None
    if readers[0].inputs[0] is not weights or weights.is_graph_output() or not _over_keys(softmax):
        return None
    query = _source(product.inputs[0], _HEAD_FIRST)
    key = _source(product.inputs[1], _TRANSPOSED)
    value = _source(readers[0].inputs[1], _HEAD_FIRST)
    if query is None or key is None or value is None or value.factor != 1:
        return None
    output = _joined(readers[0].outputs[0], query.heads, value.width)
    if output is None or len({query.heads, key.heads, value.heads}) != 1 or query.width != key.width:
        return None
    return Attention(query, key, value, product, output, before * query.factor * key.factor, bias)


def _product(scores: ir.Value | None, scale: float) -> tuple[ir.Node | None, ScoreBias | None, float]:
    """Return the product of queries and keys behind scores, what is added to it, and its factor in all."""
    node = None if scores is None else scores.producer()
    if is_op(node, "MatMul"):
        return node, None, scale
    if node is None or not is_op(node, "Add") or scale != 1:
        return None, None, scale
    for value, other in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        inner, factor = _unscaled(value)
        product = None if inner is None else inner.producer()
        bias = score_bias(other)
        if is_op(product, "MatMul") and bias is not None:
            return product, bias, factor
    return None, None, scale


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return the value in front of Muls and Divs by one number, and their factor."""
    factor = 1.0
    while value is not None and is_op(node := value.producer(), "Mul", "Div") and node is not None:
        x, number = node.inputs
        if node.op_type == "Mul" and is_constant(x):
            x, number = number, x
        if number is None or not is_constant(number) or number.const_value is None or number.const_value.size != 1:
            break
        if x is None or x.shape is None or len(number.const_value.shape) > len(x.shape):
            break  # a factor [1, 1, ...] of higher rank also adds dimensions
        constant = float(numpy_of(number).reshape(()))
        factor = factor * constant if node.op_type == "Mul" else factor / constant
        value = x
    return value, factor


def _over_keys(softmax: ir.Node) -> bool:
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    rank = None if softmax.outputs[0].shape is None else len(softmax.outputs[0].shape)
    return axis == -1 or (rank is not None and axis == rank - 1)


def _source(value: ir.Value | None, wanted: Sequence[MergedDim]) -> Heads | None:
    """Follow a value of these dimensions, or with the first two merged, back to where its tokens are whole rows.

    Return where it has four dimensions last on the way if something else than moves stands in front of that.
    """
    moves: list[ir.Node] = []
    factor, found = 1.0, None
    while value is not None:
        value, here = _unscaled(value)
        factor *= here
        if value is None:
            break
        found = _parted(value, moves, wanted, factor) or found
        node = value.producer()
        if node is None or not is_op(node, "Reshape", "Transpose"):
            break
        rows, sizes = node.inputs[0], _split_sizes(node)
        dims = None if sizes is None else _follow(_ROWS, [node, *moves], *sizes)
        if rows is not None and sizes is not None and dims is not None and _as_heads(dims) == tuple(wanted):
            return Heads(rows, value, SPLIT, *sizes, factor, len(moves))
        moves.insert(0, node)
        value = rows
    return found


def _parted(value: ir.Value, moves: Sequence[ir.Node], wanted: Sequence[MergedDim], factor: float) -> Heads | None:
    """Return a value with four dimensions as heads, if the moves turn some order of these into the wanted one."""
    if value.shape is None or len(value.shape) != 4:
        return None
    for dims in permutations(SPLIT):
        sizes = known_ints(value.shape, [dims.index((HEADS,)), dims.index((WIDTH,))])
        after = None if sizes is None else _follow(dims, moves, *sizes)
        if sizes is not None and after is not None and _as_heads(after) == tuple(wanted):
            return Heads(None, value, dims, sizes[0], sizes[1], factor, len(moves))
    return None


def _as_heads(dims: Sequence[MergedDim]) -> tuple[MergedDim, ...]:
    """Return the dimensions with batch and heads apart."""
    return tuple(part for dim in dims for part in ([(BATCH,), (HEADS,)] if dim == (BATCH, HEADS) else [dim]))


def _split_sizes(node: ir.Node) -> tuple[int, int] | None:
    """Return heads and width if a node reshapes `[batch, tokens, channels]` to `[batch, tokens, heads, width]`."""
    before, after = node.inputs[0], node.outputs[0]
    if not is_op(node, "Reshape") or before is None or before.shape is None or after.shape is None:
        return None
    if len(before.shape) != 3 or len(after.shape) != 4 or before.shape[1] != after.shape[1]:
        return None
    sizes, channels = known_ints(after.shape, [2, 3]), known_ints(before.shape, [2])
    if sizes is None or channels is None or sizes[0] * sizes[1] != channels[0]:
        return None
    return sizes[0], sizes[1]


def _joined(value: ir.Value, heads: int, width: int) -> ir.Value | None:
    """Follow the only reader of each value until the heads are whole rows again."""
    dims: Sequence[MergedDim] | None = _HEAD_FIRST
    if value.shape is not None and len(value.shape) == 3:
        dims = ((BATCH, HEADS), (TOKENS,), (WIDTH,))
    while dims is not None and tuple(dims) != _ROWS:
        readers = consumers(value)
        if len(readers) != 1 or value.is_graph_output() or not is_op(readers[0], "Reshape", "Transpose"):
            return None
        dims = _follow(dims, readers, heads, width)
        value = readers[0].outputs[0]
    return value if dims is not None else None


def _follow(dims: Sequence[MergedDim], moves: Sequence[ir.Node], heads: int, width: int) -> Sequence[MergedDim] | None:
    """Return the dimensions behind these moves, or None where a Reshape does something else."""
    found: Sequence[MergedDim] | None = dims
    for node in moves:
        if found is None:
            return None
        if node.op_type == "Transpose":
            perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(found))[::-1]
            found = [found[axis] for axis in perm] if len(perm) == len(found) else None
        else:
            found = _reshaped(found, node, heads, width)
    return found


def _reshaped(dims: Sequence[MergedDim], node: ir.Node, heads: int, width: int) -> Sequence[MergedDim] | None:
    """Return the dimensions behind a Reshape that merges two neighbours or parts one; the others keep their sizes."""
    before = None if node.inputs[0] is None else node.inputs[0].shape
    after = node.outputs[0].shape
    if before is None or after is None or len(before) != len(dims) or abs(len(after) - len(before)) > 1:
        return None
    if len(after) == len(before):
        return dims if list(before) == list(after) else None
    merges = len(after) < len(before)
    long, short = (before, after) if merges else (after, before)
    places = [i for i in range(len(short)) if _same(long[:i], short[:i]) and _same(long[i + 2 :], short[i + 1 :])]
    if merges:
        pairs = [i for i in places if (*dims[i], *dims[i + 1]) in ((BATCH, HEADS), (HEADS, WIDTH))]
        i = pairs[0] if len(pairs) == 1 else None
        return None if i is None else [*dims[:i], (*dims[i], *dims[i + 1]), *dims[i + 2 :]]
    inner: dict[MergedDim, int] = {(BATCH, HEADS): heads, (HEADS, WIDTH): width}
    for i in places:
        if dims[i] in inner and after[i + 1] == inner[dims[i]]:
            return [*dims[:i], dims[i][:1], dims[i][1:], *dims[i + 1 :]]
    return None


def _same(some: Sequence[int | ir.SymbolicDim], others: Sequence[int | ir.SymbolicDim]) -> bool:
    """Return whether dimensions are equal; one without a name equals no other."""
    known = all(isinstance(size, int) or size.value is not None for size in (*some, *others))
    return known and list(some) == list(others)
