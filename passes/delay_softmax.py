"""delay_softmax: divide by the sum of a softmax behind the product with the values, and not in front of it.

    MatMul(Softmax(s), v)    ->    e = Exp(s - max s);    MatMul(e, v) / sum e              max and sum over the keys

This is exact. The largest e of each query is 1, whatever the number of tokens is that its attention spreads over: the
one scale of 1/255 is the scale of each row, 1/255 of its largest weight. The weights of a softmax share the grid of the
sharpest query instead, and one that looks at a hundred tokens equally has two or three levels.

Source: SageAttention (arXiv 2410.02367) quantizes the weights in this form, with 1/127 as their scale, because its
kernel computes a softmax in parts. Deviation: the grid is that of uint8.

The softmax becomes four operations. On one thread, 8 heads, 1024 tokens, width 40, softmax, quantizer and product take
32 ms in place of 23 (27 in float), and 0.7 in place of 0.6 with 256 tokens. A softmax whose output anything else than
the product reads stays.

Measured on digits-dit (5 attentions over 64 tokens), with nothing but the weights and the values of attention
quantized, SQNR of epsilon: from 52.9 to 57.2 dB at 8 bits, from 38.7 to 45.9 at 6, and from 18.1 to 34.2 at 4. On a
random network of 4096 tokens at 8 bits it goes from 2.6 to 41.1 dB, and with centred values to 56.0 (correct_softmax
has more of these figures). faces64, a UNet with 11 attentions over 256 and 64 tokens, goes from 43.6 to 55.4 dB, and
with all its layers quantized from 31.8 to 32.1, as with attention in float; w8a8-steps goes from 36.1 to 36.7. Whole
networks of 64 tokens show none of it: other layers lose far more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import Builder, Names, name_of, remove_dead, replace_value
from mezzotint.compiler.graph.require import producer, required, shape_of
from mezzotint.compiler.graph.score_products import score_products


@dataclass(frozen=True)
class DelaySoftmax(GraphPass):
    """It has no options."""

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # quotients are rounded in another order

    def run(self, program: Program, context: Context) -> Program:
        graph, names = program.graph, Names(program.graph)
        found = score_products(graph)
        ready = [(products.softmax, products.mix) for products in found if products.mix is not None]
        for softmax, mix in ready:
            _delay(graph, names, softmax, mix)
        remove_dead(graph)
        return program.noted(f"{len(ready)} of {len(found)} attentions divide behind the product with the values")


def _delay(graph: ir.Graph, names: Names, softmax: ir.Node, mix: ir.Node) -> None:
    scores, weights, out = required(softmax.inputs[0], "the scores", softmax), softmax.outputs[0], mix.outputs[0]
    build, stem = Builder(graph, names, softmax), name_of(weights)
    one: dict[str, Any] = {"dtype": weights.dtype, "shape": [*shape_of(weights)[:-1], 1], "attributes": {"keepdims": 1}}
    axes = build.constant(f"{stem}_keys", np.array([-1], np.int64))
    largest = build.op("ReduceMax", [scores, axes], f"{stem}_largest", **one)
    below = build.op("Sub", [scores, largest], f"{stem}_below", like=weights)
    powers = build.op("Exp", [below], f"{stem}_powers", like=weights)
    total = build.op("ReduceSum", [powers, axes], f"{stem}_total", **one)
    mix.replace_input_with(0, powers)
    shared = Builder(graph, names, after=mix).op("Div", [out, total], f"{name_of(out)}_shared", like=out)
    replace_value(out, shared)
    producer(shared).replace_input_with(0, out)
