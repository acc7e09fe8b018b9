"""log_attention: round the weights of an attention to powers of a base, since most are near 0 and few near 1.

    u = -log(p) / log(base)      p' = base^-round(u) for the 2^bits powers from d down, else 0      base: 2, or sqrt 2

d is the power at the end of the range that the plan has for the weights, and `bits` its width. Of 16 equal steps half
are above 1/2, where few weights are; of 16 powers of the root of 2 the smallest is 1/181 of the largest.

    Softmax(s) -> Q -> DQ         ->    LogSoftmax(s) -> Mul, Round, Mul -> Exp -> ThresholdedRelu -> Q' -> DQ'
    Exp(s - max s) -> Q -> DQ     ->          s - max s -> Mul, Round, Mul -> Exp -> ThresholdedRelu -> Q' -> DQ'

Q' is uint8 with the step d / 256 (int8 and d / 128 where an engine asks for that), so that the product with the values
stays the integer kernel that it was. The powers become its integers (4 bits of sqrt 2: 255, 181, 128, 91, 64, 45, 32,
23, 16, 11, 8, 6, 4, 3, 2, 1), and widths above 4 bits add none. This is about fidelity at few bits; it saves nothing. A
kernel computes with 8 bits either way, and on one thread (8 heads, 1024 tokens, width 40) softmax, quantizer and
product take 48 ms in place of 23.

Sources: RepQ-ViT (arXiv 2212.08254): base sqrt 2, d near the end of the measured range, behind the softmax. DGQ (arXiv
2501.04304): base 2, d the largest weight at run time, which is 1 behind delay_softmax, there for each query.
Deviations: d is a power of the base, the integers are those of the kernel, and the first token of a prompt has no path
of its own.

Measured on digits-dit (5 attentions over 64 tokens), with nothing but the weights and the values of attention in 4
bits, SQNR of epsilon: 18.1 dB with equal steps, 32.7 with powers of sqrt 2, 31.1 with those of 2; behind delay_softmax
34.2, 34.8 and 34.2. With 3 bits behind delay_softmax: 26.7, 25.6 and 27.1. Of all layers in 4 bits (repq-vit beside
repq), the images of the digits gain 0.5 dB (0.1 to 0.6). At 8 bits base 2 is worse than equal steps.
Trained around it (repquant beside repq-vit, 150 steps, all layers of digits-dit in 4 bits, 32 images) epsilon goes from
7.0 to 11.3 dB, and images from 17.8 to 20.9 dB; the paired gain is 3.7 dB (2.5 to 5.1).

Errors: PassError where the scale of the weights depends on the timestep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.formats import Format
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import Builder, Names, consumers, is_op, name_of, remove_dead, replace_use
from mezzotint.compiler.graph.require import producer, required
from mezzotint.compiler.lowering.qdq import dequantizer
from mezzotint.compiler.lowering.quantizer_nodes import STORED_BITS, pair_nodes
from mezzotint.runtime.arrays import Doubles

PER_HALVING = {"2": 1, "sqrt2": 2}
"""How many powers of a base lie between a number and its half."""


@dataclass(frozen=True)
class LogAttention(Pass):
    """Powers of `base` as the levels of attention weights."""

    base: Literal["2", "sqrt2"] = "sqrt2"

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})

    def run(self, program: Program, context: Context) -> Program:
        graph, names, plan = program.graph, Names(program.graph), program.require_plan()
        quantizers, counts = dict(plan.quantizers), []
        for weights, quantized in list(_quantized_weights(graph)):
            before = required(quantizers.pop(Site(name_of(weights)), None), "the quantizer of the weights", weights)
            if before.table:
                hint = "use it in a recipe with constant scales, such as w8a8"
                raise PassError("the scale of the weights depends on the timestep", where=name_of(weights), hint=hint)
            end = self.power_above(float(before.scale) * before.format.qmax)
            grid = replace(before.format, bits=STORED_BITS)
            step, zero_point = np.asarray(end / (grid.qmax + 1), np.float32), np.array(0, grid.dtype)
            after = Quantizer(grid, step, zero_point, self.name)
            build = Builder(graph, names, after=producer(weights))
            rounded = self._round(build, weights, end, before.format.bits, float(step))
            ends = (("scale", step), ("zero_point", zero_point))
            scale, zero = (build.constant(f"{name_of(rounded)}_{name}", number) for name, number in ends)
            quantized.replace_all_uses_with(pair_nodes(build, rounded, after, scale, zero))
            for node in consumers(weights):
                if is_op(node, "ReduceSum"):  # the sum that delay_softmax divides by is that of the rounded weights
                    replace_use(node, weights, rounded)
            quantizers[Site(name_of(rounded))] = after
            counts.append(len(self.integers(before.format.bits, grid)))
        remove_dead(graph)
        if not counts:
            return program.noted("no weights of an attention are quantized")
        note = f"the weights of {len(counts)} attentions on {max(counts)} powers of {self.base} and 0, as integers"
        return replace(program, plan=replace(plan, quantizers=quantizers), note=note)

    def power_above(self, end: float) -> float:
        """Return the least power of the base that is no less than the end of a range, but for rounding; 1 at most."""
        rate = PER_HALVING[self.base]
        return float(2.0 ** -(max(np.floor(-rate * np.log2(end) + 1e-3), 0) / rate))

    def integers(self, bits: int, grid: Format) -> Doubles:
        """Return the integers of the powers on the kernel's grid, without 0, the smallest first."""
        powers = np.exp2(-np.arange(2.0**bits) / PER_HALVING[self.base])
        found: Doubles = np.unique(np.minimum(np.rint(powers * (grid.qmax + 1)), grid.qmax))
        return found[found > 0]

    def _round(self, build: Builder, weights: ir.Value, end: float, bits: int, step: float) -> ir.Value:
        """Add the nodes that round weights to powers of the base, and those below the smallest power to 0."""
        node, stem, rate = producer(weights), name_of(weights), PER_HALVING[self.base]
        logs = required(node.inputs[0], "the logarithms of the weights", node)
        if is_op(node, "Softmax"):
            logs = build.op("LogSoftmax", [logs], f"{stem}_logs", like=weights, attributes={"axis": -1})
        powers = build.constant(f"{stem}_rate", np.float32(rate / np.log(2)))
        logarithm = build.constant(f"{stem}_base", np.float32(np.log(2) / rate))
        found = build.op("Mul", [logs, powers], f"{stem}_exact_power", like=weights)
        found = build.op("Round", [found], f"{stem}_power", like=weights)
        found = build.op("Mul", [found, logarithm], f"{stem}_rounded_logs", like=weights)
        found = build.op("Exp", [found], f"{stem}_rounded", like=weights)
        between = end * 2.0 ** ((0.5 - 2.0**bits) / rate)  # the smallest power and the one behind it, which is 0
        if between < 0.5 * step:
            return found  # what is smaller is 0 on the grid
        limit = {"alpha": float(between)}
        return build.op("ThresholdedRelu", [found], f"{stem}_kept", like=weights, attributes=limit)


def _quantized_weights(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield (weights, the same behind their quantizer) of attentions, in the graph's order."""
    for node in graph:
        pair = dequantizer(node.inputs[0]) if is_op(node, "MatMul") else None
        quantize = None if pair is None or pair.inputs[0] is None else pair.inputs[0].producer()
        if is_op(quantize, "Clip") and quantize is not None and quantize.inputs[0] is not None:
            quantize = quantize.inputs[0].producer()  # a format of fewer than 8 bits
        weights = quantize.inputs[0] if quantize is not None and is_op(quantize, "QuantizeLinear") else None
        maker = None if weights is None else weights.producer()
        if pair is not None and weights is not None and (is_op(maker, "Softmax") or _is_delayed(maker)):
            yield weights, pair.outputs[0]


def _is_delayed(node: ir.Node | None) -> bool:
    """Return whether a node is the Exp of scores below the largest of their row, as delay_softmax writes it."""
    below = None if node is None or not is_op(node, "Exp") or node.inputs[0] is None else node.inputs[0].producer()
    if below is None or not is_op(below, "Sub") or below.inputs[1] is None:
        return False
    largest = below.inputs[1].producer()
    return largest is not None and is_op(largest, "ReduceMax") and largest.inputs[0] is below.inputs[0]
