"""fold_scales: move constant factors behind a layer into its weights.

1. A scalar factor, with only data movers between it and the layer:

       Mul(move(layer(x, w, b)), c)  ->  move(layer(x, c w, c b))

   Exported attention multiplies queries and keys by the fourth root of 1 / width each, behind the Transposes that
   split them into heads. Folding saves two passes over the activations. Only data movers remain between layer and
   matmul, so clean_qdq can make them move 8-bit values.

2. A Transpose that only moves dimensions of size 1 (attention with one head), because a Reshape does not copy:

       Transpose(x)  ->  Reshape(x)

3. The keys of an attention that are brought to three dimensions and back, by shapes which the graph computes (torch's
   dynamo exporter), because one Transpose copies once, and moves 8-bit values:

       Mul(Reshape(Transpose(Reshape(Transpose(keys)))), c)  ->  Mul(Transpose(keys), c)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.attention import BATCH, HEADS, TOKENS, WIDTH, attention_of
from mezzotint.compiler.graph.nodes import (
    Builder,
    Names,
    consumers,
    is_constant,
    is_op,
    name_of,
    numpy_of,
    remove_dead,
    replace_use,
    replace_value,
)
from mezzotint.compiler.graph.ops import Layer, is_mover, layers


@dataclass(frozen=True)
class FoldScales(GraphPass):
    """It has no options; the cases are numbered in the module's docstring."""

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    tolerance: ClassVar[float | None] = 1e-4  # products are rounded in another order

    def run(self, program: Program, context: Context) -> Program:
        graph = program.graph
        names = Names(graph)
        direct = sum(_move_once(graph, names, node) for node in list(graph) if is_op(node, "Softmax"))  # case 3
        remove_dead(graph)  # what read the keys before hides the layer that makes them
        by_output = {layer.output: layer for layer in layers(graph) if layer.weight is not None}
        # Cases 1 and 2.
        folded = sum(_fold(graph, names, node, by_output) for node in list(graph) if is_op(node, "Mul"))
        turned = sum(_reshape(graph, names, node) for node in list(graph) if is_op(node, "Transpose"))
        remove_dead(graph)
        note = f"{folded} factors moved into weights, {turned} Transposes became Reshapes"
        return program.noted(f"{note}, {direct} keys moved once" if direct else note)


def _fold(graph: ir.Graph, names: Names, mul: ir.Node, by_output: dict[ir.Value, Layer]) -> bool:
    factor = next((v for v in mul.inputs if v is not None and is_constant(v) and v.const_value is not None), None)
    x = next((v for v in mul.inputs if v is not factor), None)
    if factor is None or x is None or factor.const_value is None or factor.const_value.size != 1:
        return False
    if mul.outputs[0].shape is None or x.shape is None or len(mul.outputs[0].shape) != len(x.shape):
        return False  # a factor [1, 1, ...] of higher rank also adds dimensions
    layer = _layer_behind(x, by_output)
    if layer is None or (layer.bias is not None and not is_constant(layer.bias)):
        return False
    number = numpy_of(factor).reshape(())
    build = Builder(graph, names, layer.node)
    for node, value in ((layer.node, layer.weight), (layer.bias_add or layer.node, layer.bias)):
        if value is not None:
            scaled = build.constant(f"{name_of(value)}_scaled", (numpy_of(value) * number).astype(np.float32))
            node.replace_input_with(list(node.inputs).index(value), scaled)
    replace_value(mul.outputs[0], x)
    graph.remove(mul, safe=True)
    return True


def _layer_behind(value: ir.Value, by_output: dict[ir.Value, Layer]) -> Layer | None:
    """Return the layer that computes a value, seen through data movers; None if a value on the way has two readers."""
    if len(consumers(value)) != 1 or value.is_graph_output():
        return None
    if value in by_output:
        return by_output[value]
    producer = value.producer()
    if producer is None or not is_mover(producer) or producer.inputs[0] is None:
        return None
    return _layer_behind(producer.inputs[0], by_output)


def _reshape(graph: ir.Graph, names: Names, node: ir.Node) -> bool:
    x, out = node.inputs[0], node.outputs[0]
    if x is None or x.shape is None or "perm" not in node.attributes:
        return False
    order = list(node.attributes["perm"].as_ints())
    if [d for d in order if x.shape[d] != 1] != sorted(d for d in order if x.shape[d] != 1):
        return False
    # In a Reshape 0 copies the size of the same dimension. Of the unknown sizes that move, -1 can stand for one.
    sizes = [0 if d == place else (n if isinstance(n := x.shape[d], int) else -1) for place, d in enumerate(order)]
    if sizes.count(-1) > 1:
        return False
    build = Builder(graph, names, node)
    shape = build.constant(f"{name_of(out)}_shape", np.array(sizes))
    replace_value(out, build.op("Reshape", [x, shape], f"{name_of(out)}_reshaped", like=out))
    graph.remove(node, safe=True)
    return True


def _move_once(graph: ir.Graph, names: Names, softmax: ir.Node) -> bool:
    found = attention_of(softmax)
    keys = None if found is None else found.product.inputs[1]
    if found is None or keys is None or found.key.moves < 2 or keys.shape is None or len(keys.shape) != 4:
        return False
    build = Builder(graph, names, found.product)
    stem = name_of(keys)
    order = [found.key.dims.index((dim,)) for dim in (BATCH, HEADS, WIDTH, TOKENS)]
    moved = build.op("Transpose", [found.key.split], f"{stem}_once", like=keys, attributes={"perm": order})
    if found.key.factor != 1:
        factor = build.constant(f"{stem}_factor", np.float32(found.key.factor))
        moved = build.op("Mul", [moved, factor], f"{stem}_scaled", like=keys)
    replace_use(found.product, keys, moved)
    return True
