"""The matrices of one stage of round_weights where attention says how much an error matters (aespa, arXiv 2402.08958).

    scores  S_h = Q_h K_h^T,   out_h = A_h V_h,   A = softmax(S),   Q = X W_Q^T, and K and V likewise;  h: a head

An error E_h of the rows of W_Q that make Q_h changes the scores by X E_h^T K_h^T, one of W_V the output by A_h X E_h^T:

    queries   tr(K_h^T K_h E_h X^T X E_h^T)        H_I = X^T X, H_O block-diagonal with K_h^T K_h
    keys      tr(Q_h^T Q_h E_h X^T X E_h^T)        the same with the queries
    values    tr(E_h (A_h X)^T (A_h X) E_h^T)      a matrix H_I for each head

H_I of queries and keys is that of the quantized graph, as without a weighting. Q, K, A and the X of values are those of
the float graph at the same latents. All other layers keep their own H.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Floats

from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..graph.attention import attention_of
from ..graph.nodes import name_of
from ..graph.ops import layers
from ..graph.score_products import score_products
from .gathering import gather
from .layer_inputs import FloatInputs, Gathered, Inputs, Latents
from .weights import layer_name

ProjectionRole = Literal["query", "key", "value"]


@dataclass(frozen=True)
class Projection:
    """A layer that makes queries, keys or values of so many heads.

    `other` names the operand of the scores that meets its output, or A; `tap` its own input. `transposed`: the operand
    is `[..., width, tokens]`.
    """

    role: ProjectionRole
    heads: int
    other: str
    tap: str
    transposed: bool = False


def find_projections(graph: ir.Graph) -> dict[str, Projection]:
    """Return the projections of a float graph's attentions by the names of their layers.

    A layer counts where its output is split into heads as it is: no norm, no rotation, no other part of a joint weight.
    """
    made_by = {layer.output: layer for layer in layers(graph) if layer.weight is not None and layer.kind != "conv"}
    found = {}
    for products in score_products(graph):
        attention = attention_of(products.softmax)
        if attention is None or products.mix is None:
            continue
        query, key = (name_of(value) for value in products.scores.inputs)
        weights = name_of(products.mix.inputs[0])
        sides: tuple[tuple[ProjectionRole, ir.Value | None, str, bool], ...] = (
            ("query", attention.query.rows, key, True),
            ("key", attention.key.rows, query, False),
            ("value", attention.value.rows, weights, False),
        )
        for role, rows, other, transposed in sides:
            layer = None if rows is None else made_by.get(rows)
            if layer is not None:
                tap = name_of(layer.activations[0])
                found[layer.name] = Projection(role, attention.query.heads, other, tap, transposed)
    return found


class ScoreStage(Gathered):
    """The matrices of one stage: those of `plain`, and what attention adds to the projections."""

    def __init__(self, plain: Gathered) -> None:
        super().__init__()
        self._plain = plain
        self._sides: dict[int, Floats] = {}
        self._mixed: dict[int, Floats] = {}

    def add_side(self, inputs: FloatInputs, operand: Floats) -> None:
        """Add the products within each head of an operand `[batch, heads, tokens, width]`."""
        heads, width = operand.shape[1], operand.shape[3]
        side = self._sides.setdefault(id(inputs), np.zeros((1, heads * width, heads * width), np.float32))
        for h in range(heads):
            rows = operand[:, h].reshape(-1, width)
            part = slice(h * width, (h + 1) * width)
            side[0, part, part] += rows.T @ rows

    def add_mixed(self, inputs: FloatInputs, head: int, heads: int, columns: Floats) -> None:
        """Add the columns `[positions, d]` of one head's A X."""
        width = columns.shape[1]
        self._mixed.setdefault(id(inputs), np.zeros((heads, width, width), np.float32))[head] += columns.T @ columns

    def gram(self, inputs: FloatInputs) -> Floats:
        """H_I `[groups, d, d]`: of values as many as heads."""
        own = self._mixed.get(id(inputs))
        return self._plain.gram(inputs) if own is None else own

    def side(self, inputs: FloatInputs) -> Floats | None:
        """H_O `[1, rows, rows]` of queries and keys."""
        return self._sides.get(id(inputs))

    def forget(self, inputs: FloatInputs) -> None:
        self._sides.pop(id(inputs), None)
        self._mixed.pop(id(inputs), None)
        self._plain.forget(inputs)


def projections_of(program: Program, stage: Sequence[Inputs]) -> dict[int, Projection]:
    """Return the projections among the weights of a stage, by their places. One of several layers is none."""
    known = find_projections(program.require_float_model().graph)
    readers = {i: inputs.weight.readers for i, inputs in enumerate(stage)}
    return {i: known[layer_name(nodes[0])] for i, nodes in readers.items() if _alone(nodes, known)}


def _alone(readers: Sequence[ir.Node], known: Mapping[str, Projection]) -> bool:
    return len(readers) == 1 and layer_name(readers[0]) in known


def gather_scores(
    program: Program,
    context: Context,
    stage: Sequence[Inputs],
    latents: Sequence[Latents],
    *,
    rounded: Collection[str],
    columns: int,
    balance: bool,
    step: Callable[[], None],
) -> Gathered:
    """Return the matrices of every weight of a stage; `step` after each batch. Options as those of `gather`."""
    plain = gather(
        program, context, stage, latents, rounded=rounded, columns=columns, balance=balance, shifts=False, step=step
    )
    found = projections_of(program, stage)
    if not found:
        return plain
    gathered = ScoreStage(plain)
    wanted = [name for p in found.values() for name in ((p.other, p.tap) if p.role == "value" else (p.other,))]
    graph_inputs = {name_of(v) for v in program.graph.inputs}
    taps = [name for name in dict.fromkeys(wanted) if name not in graph_inputs]
    limit = max(columns // len(latents), 1)
    with Executor(
        program.require_float_model(),
        context.folder,
        taps=taps,
        threads=context.threads,
        spinning=False,
        only_taps=True,
    ) as executor:
        for batch in latents:
            seen = executor.call(program.signature, batch.x, batch.timestep, batch.conditions)
            seen |= {program.signature.sample: batch.x, **batch.conditions}
            rng = streams.POSITIONS.generator(context.seed, batch.call, batch.batch)
            for i, projection in found.items():
                operand = _by_head(seen[projection.other], projection)
                if projection.role == "value":
                    _add_values(gathered, stage[i], operand, seen[projection.tap], limit, rng, balance)
                else:
                    gathered.add_side(stage[i], operand * _balancing(operand, balance))
    return gathered


def _by_head(operand: Floats, projection: Projection) -> Floats:
    """Return an operand as `[batch, heads, rows, columns]`, whose batch may have been merged with its heads."""
    apart = operand.reshape(-1, projection.heads, *operand.shape[-2:])
    return apart.swapaxes(-1, -2) if projection.transposed else apart


def _add_values(
    gathered: ScoreStage,
    inputs: Inputs,
    weights: Floats,
    x: Floats,
    limit: int,
    rng: np.random.Generator,
    balance: bool,
) -> None:
    """Add A_h X of each head at `limit` queries: `weights` `[batch, heads, queries, keys]`, X `[batch, keys, d]`."""
    batch, heads, queries, _ = weights.shape
    each = min(max(limit // batch, 1), queries)
    chosen = np.sort(rng.choice(queries, each, replace=False))
    mixed = np.einsum("bhqk,bkd->hbqd", weights[:, :, chosen], x, optimize=True)
    mixed = mixed * _balancing(mixed, balance)
    for h in range(heads):
        gathered.add_mixed(inputs, h, heads, mixed[h].reshape(-1, x.shape[-1]))


def _balancing(values: Floats, balance: bool) -> np.float32:
    """Return what makes the mean square of an array 1, where calls are balanced."""
    mean = float(np.mean(np.square(values), dtype=np.float64))
    return np.float32(1 / np.sqrt(mean)) if balance and mean > 0 else np.float32(1)
