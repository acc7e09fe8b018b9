"""What rounding takes from a weight, as further layers of the same shape beside it.

    layer(x, W) + bias  =  Sum(layer(x, Q(W)) + bias, layer(x, Q(W - Q(W))), ...)  +  layer(x, the rest)

Each term reads the same value, and is a layer of its own with scales of its own: REx (arXiv 2203.14645).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats

from ..core.formats import scale_for_range
from ..graph import weight_store as store
from ..graph.nodes import Builder, Names, is_op, name_of
from ..graph.ops import Layer
from ..graph.require import producer, shape_of
from ..rounding.matrix import nearest
from ..scales.weights import WeightMethod, row_limits, weight_format
from .branches import add_beside


def expanded(rows: Floats, bits: int, method: WeightMethod, terms: int) -> list[Floats]:
    """Return `terms` weights `[rows, inputs]` whose sum is `rows`: all but the last are on a grid of so many bits."""
    grid = weight_format(bits)
    found, left = [], rows
    for _ in range(terms - 1):
        limit = row_limits(left, grid, method)
        scale, _ = scale_for_range(-limit, limit, grid)
        found.append(np.asarray(scale[:, None] * nearest(left, scale, grid), np.float32))
        left = left - found[-1]
    return [*found, left]


def write_terms(graph: ir.Graph, names: Names, layers: Sequence[Layer], terms: Sequence[Floats], folder: Path) -> None:
    """Add a layer for each of `terms`, in the shape of the weight, beside all layers that read the weight."""
    weight = layers[0].require_weight()
    first = Builder(graph, names, before=layers[0].node)
    values = []
    for k, term in enumerate(terms):
        stem = f"{name_of(weight)}_term_{k + 1}"
        values.append(first.constant(stem, store.kept(term, stem, folder)))
    for layer in layers:
        for k, value in enumerate(values):
            node = layer.node
            build = Builder(graph, names, after=layer.bias_add or node)
            attributes = {name: a.value for name, a in node.attributes.items()}
            stem = f"{name_of(node.outputs[0])}_term_{k + 1}"
            read: list[ir.Value | None] = [node.inputs[0], value]
            if is_op(node, "Gemm"):  # onnxruntime's QGemm has scales for each output channel with a bias only
                rows = int(shape_of(value).numpy()[layer.require_weight_axis()])
                read.append(build.constant(f"{stem}_bias", np.zeros(rows, np.float32)))
            name = names.unique(f"{layer.name}_term_{k + 1}")
            out = build.op(node.op_type, read, stem, like=node.outputs[0], attributes=attributes, name=name)
            producer(out).metadata_props.update(node.metadata_props)
            add_beside(graph, names, layer, build, out)
