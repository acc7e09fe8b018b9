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
from mezzotint.compiler.graph.attention import Attention, attention_of
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
from mezzotint.compiler.graph.require import producer
from mezzotint.runtime.open_sizes import open_size
from mezzotint.runtime.sampling.condition_network import call_conditions
from mezzotint.runtime.targets import ONNXRUNTIME, Target


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
            if queries[name_of(attention.query.rows)] >= self.tokens:
                _fuse(graph, names, attention)
                fused += 1
        remove_dead(graph)
        return program.noted(f"{fused} of {len(found)} attentions fused")


def _queries(program: Program, context: Context, found: Sequence[Attention]) -> dict[str, int]:
    """Return the number of tokens of each query at the program's sample size: one call tells what no shape states."""
    sizes = {name_of(one.query.rows): known_ints(one.query.rows.shape, [1]) for one in found}
    unknown = [name for name, size in sizes.items() if size is None]
    measured: dict[str, int] = {}
    if unknown:
        batch = program.fixed_batch or 1
        x, t = np.zeros((batch, *program.shape), np.float32), program.deployment.timesteps[0]
        with Executor(program.model, context.folder, taps=unknown, threads=context.threads, only_taps=True) as executor:
            given = _zeros(program, batch) | context.condition_rows(0, batch)
            values = executor.call(program.signature, x, t, call_conditions(context.condition_network, x, t, given))
        measured = {name: values[name].shape[1] for name in unknown}
    return {name: measured[name] if size is None else size[0] for name, size in sizes.items()}


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


def _fuse(graph: ir.Graph, names: Names, found: Attention) -> None:
    graph.opset_imports.setdefault(MICROSOFT, 1)
    output = found.output
    build = Builder(graph, names, producer(output))
    fused = build.op(
        "MultiHeadAttention",
        [found.query.rows, found.key.rows, found.value.rows],
        f"{name_of(output)}_fused",
        like=output,
        attributes={"num_heads": found.query.heads, "scale": found.scale},
        domain=MICROSOFT,
    )
    replace_value(output, fused)
