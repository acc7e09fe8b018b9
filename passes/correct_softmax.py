"""correct_softmax: add back the probability that rounding removes from attention.

Most probabilities of a long row are smaller than half a step of an 8-bit grid and round to 0, so a row of Q(A) sums to
less than 1. The error has one sign, and no averaging removes it. Softmax Bias Correction for Quantized Generative
Models (arXiv 2309.01729) adds the mean of the missing probability to every entry:

    beta = E[A - Q(A)]

over calibration, for each head where the layout `[batch, heads, tokens, tokens]` shows the heads, and for each call of
the deployment where timesteps have tables.

The paper puts beta into the quantizer's offset. An integer kernel has no fractional zero point, so here it is added
behind the value matmul, which stays as it is (except that onnxruntime then adds and quantizes instead of quantizing in
the kernel):

    (Q(A) + beta) V = Q(A) V + beta * sum_j V_j

The cost is one ReduceSum over the tokens of V, one Mul, and one Add over the matmul's output. A correction that does
not improve images of another seed is discarded; the history has the figures.

Measured on the digits (four attentions over 64 tokens): rows of 8-bit probabilities lack 0.1 %, and after correct_bias,
with 4-bit weights, the correction gains 0.07 dB of the images, too little for 16 images to show. It shows with more
tokens and fewer bits. With nothing but probabilities and values quantized, SQNR of epsilon in dB:

    network                               bits  rows lack  before  after  centred values  delayed  both of these
    digits-dit, 64 tokens                    4       43 %    18.1   25.8            29.6     34.2           34.3
    random, 2 heads, 256 tokens, sharp       8        4 %    28.1   32.1            39.5     39.6           47.4
    random, 2 heads, 1024 tokens, sharp      8       20 %    15.7   18.2            32.1     33.4           42.7
    random, 2 heads, 4096 tokens, sharp      8       38 %     9.7   12.5            20.3     26.7           36.0
    random, 2 heads, 4096 tokens, flat       8       86 %     2.6   12.3            23.9     41.1           56.0

The last three columns have no correction, but center_attention.values, delay_softmax, and both: the errors that they
remove are larger. Rows of 1024 flat tokens sum to 8 % more than 1, and the correction loses 2 dB there (16.6 to 14.5):
one number for all queries is the wrong one for most of them, and only `held_out` keeps that out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.calibration.calibrate import follow_trajectories
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.biases import take_over
from mezzotint.compiler.correction.channel_means import ChannelMeans, with_means
from mezzotint.compiler.correction.trial import judged
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import Builder, Names, is_op, name_of
from mezzotint.compiler.graph.scopes import TABLES_SCOPE
from mezzotint.compiler.lowering.qdq import dequantizer
from mezzotint.compiler.scales.timetable import deployed_rows, lookup, nearest_row_of_timestep, step_index
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep

SMALLEST_RANK = 3  # onnxruntime makes a float Gemm of a MatMul of two matrices and the Add behind it


@dataclass(frozen=True)
class CorrectSoftmax(Pass):
    """Corrected attention probabilities, and the trial that judges them.

    - `steps`: `rows` has a beta for each call of the deployment, `mean` one for all.
    - `heads`: a beta for each head, or one for all.
    - `held_out`: samples of another seed that judge the correction; 0 keeps it without a trial.
    """

    steps: Literal["rows", "mean"] = "rows"
    heads: bool = True
    held_out: int = 4

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def __post_init__(self) -> None:
        if self.held_out < 0:
            raise RecipeError(f"{self.name}.held_out is {self.held_out}", where=self.name, hint="choose 0 or more")

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        attentions = _attentions(program)
        flat = [a for a in attentions if a.rank < SMALLEST_RANK]
        attentions = [a for a in attentions if a not in flat]
        about = f"; {len(flat)} on plain matrices stay" if flat else ""
        if not attentions:
            return program.noted(f"no softmax is quantized: nothing to correct{about}")
        before = replace(program, model=program.model.clone())
        timed = self.steps == "rows" and program.frozen is not None
        betas, lost = self._measure(program, context, attentions, timed)
        names = Names(program.graph)
        rows = _look_up(program, names, betas) if timed else [None] * len(attentions)
        for attention, beta, row in zip(attentions, betas, rows, strict=True):
            _correct(program.graph, names, attention, beta, row)
        note = f"{len(attentions)} softmaxes corrected, whose rows lacked {np.mean(lost):.3%} on average{about}"
        return judged(before, program, context, self.held_out, note, self.name)

    def _measure(
        self, program: Program, context: Context, attentions: Sequence[_Attention], timed: bool
    ) -> tuple[list[Doubles], list[float]]:
        """Return (E[A - Q(A)] `[rows, heads]`, the share of probability that Q(A) lacks) of each attention."""
        row_of = {t: row for row, t in enumerate(deployed_rows(program))}
        heads = [a.heads if self.heads else 1 for a in attentions]
        means = [ChannelMeans(len(row_of) if timed else 1, n) for n in heads]
        values = [(name_of(value), 1) for a in attentions for value in (a.rounded, a.weights)]
        logical, outputs = with_means(program.model, values)
        sums = np.zeros((len(attentions), 2))
        signature, threads = program.signature, context.threads
        with (
            Executor(program.require_float_model(), context.folder, threads=threads) as exact,
            Executor(logical, context.folder, threads=threads, level="none") as quantized,
        ):

            def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
                inner = quantized.call(signature, x, t, conditions)
                for i, (mean, n) in enumerate(zip(means, heads, strict=True)):
                    pair = [inner[name].astype(np.float64) for name in outputs[2 * i : 2 * i + 2]]
                    rounded, whole = (v if n > 1 else v.mean(axis=1, keepdims=True) for v in pair)
                    mean.add(row_of[t] if timed else 0, rounded, whole, len(x))
                    sums[i] += len(x) * np.array([rounded.mean(), whole.mean()])
                return np.asarray(exact.call(signature, x, t, conditions)[signature.output], np.float32)

            follow_trajectories(program, context, denoiser, self.name)
        betas = [mean.by_row() if timed else mean.overall() for mean in means]
        return betas, [float(1 - rounded / whole) for rounded, whole in sums]


@dataclass(frozen=True, eq=False)
class _Attention:
    """softmax -> Q -> DQ (`rounded`) -> `matmul` with values: `weights` is what the softmax makes."""

    weights: ir.Value
    rounded: ir.Value
    matmul: ir.Node

    @property
    def rank(self) -> int:
        return len(self.weights.shape or ())

    @property
    def heads(self) -> int:
        """Return the heads that the layout `[batch, heads, tokens, tokens]` shows; 1 where it is another."""
        size = self.weights.shape[1] if self.weights.shape is not None and self.rank == 4 else 1
        return size if isinstance(size, int) else 1


def _attentions(program: Program) -> list[_Attention]:
    """Return the softmaxes that a matmul reads through a quantizer, in the graph's order."""
    attentions = []
    for node in program.graph:
        pairs = [dequantizer(v) for v in node.inputs[:2]] if is_op(node, "MatMul") else [None]
        if pairs[0] is None or pairs[-1] is None or pairs[0].inputs[0] is None:
            continue
        quantize = pairs[0].inputs[0].producer()
        if is_op(quantize, "Clip") and quantize is not None and quantize.inputs[0] is not None:
            quantize = quantize.inputs[0].producer()  # a format of fewer than 8 bits
        weights = quantize.inputs[0] if quantize is not None and is_op(quantize, "QuantizeLinear") else None
        if weights is not None and is_op(weights.producer(), "Softmax"):
            attentions.append(_Attention(weights, pairs[0].outputs[0], node))
    return attentions


def _look_up(program: Program, names: Names, betas: Sequence[Doubles]) -> list[ir.Value]:
    """Return the betas `[heads]` at the call's timestep, by one lookup for all of them."""
    build = Builder(program.graph, names, program.graph[0], scope=TABLES_SCOPE)
    row_of = nearest_row_of_timestep(program)
    row = step_index(build, program, row_of, "softmax")
    table = np.concatenate(betas, axis=1).astype(np.float32)
    return lookup(build, table, row, [beta.shape[1] for beta in betas], "softmax_betas")


def _correct(graph: ir.Graph, names: Names, attention: _Attention, beta: Doubles, row: ir.Value | None) -> None:
    """Add beta times the sum of the values; `row` `[heads]` is the call's beta, or None for a constant one."""
    node = attention.matmul
    out, values = node.outputs[0], node.inputs[1]
    readers = [(use.node, use.idx) for use in out.uses()]
    stem, heads = name_of(out), beta.shape[1]
    build = Builder(graph, names, after=node)
    tokens = build.constant(f"{stem}_tokens", np.array([-2]))
    total = build.op("ReduceSum", [values, tokens], f"{stem}_total", dtype=out.dtype, shape=_one_token(values))
    if row is None:
        factor = build.constant(f"{stem}_beta", beta[0].astype(np.float32).reshape([-1, 1, 1] if heads > 1 else []))
    else:
        shape = [heads, 1, 1] if heads > 1 else [1]
        where = build.constant(f"{stem}_beta_shape", np.array(shape))
        factor = build.op("Reshape", [row, where], f"{stem}_beta", dtype=row.dtype, shape=shape)
    missing = build.op("Mul", [total, factor], f"{stem}_missing", like=total)
    take_over(graph, names, out, build.op("Add", [out, missing], f"{stem}_whole", like=out), readers)


def _one_token(values: ir.Value | None) -> list[int | ir.SymbolicDim] | None:
    """Return the shape of a sum over the tokens of `[..., tokens, width]`."""
    if values is None or values.shape is None:
        return None
    return [1 if i == len(values.shape) - 2 else d for i, d in enumerate(values.shape)]
