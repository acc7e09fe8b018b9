"""A branch of low rank, written beside its layer.

    linear        Sum(MatMul(x, R) + bias, MatMul(MatMul(x, down^T), up^T))
    convolution   Sum(Conv(x, R, bias), Conv(Conv(x, down), up))            down: the layer's kernel, up: 1x1

The branch reads the layer's own input, in front of its quantizer, and its nodes are marked (graph/ops.py): they are no
layers, so no pass quantizes them. The sum is a Sum, because it joins no two feature maps (compiler/core/islands.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats

from ..graph import weight_store as store
from ..graph.nodes import Builder, Names, consumers, name_of, replace_use
from ..graph.ops import BRANCH, Layer
from ..graph.require import inputs, producer, shape_of
from .residual import Branch

_DEFAULTS = {"strides": 1, "dilations": 1, "pads": 0}  # of each axis; the shape of the kernel is that of the weight


def obstacle(layer: Layer) -> str | None:
    """Return why a layer can have no branch, or None."""
    if layer.kind == "conv" and "group" in layer.node.attributes and layer.node.attributes["group"].as_int() != 1:
        return "its channels are in groups"
    return None


def write_branch(graph: ir.Graph, names: Names, layers: Sequence[Layer], branch: Branch, folder: Path) -> None:
    """Add the branch beside all layers that read one weight; the weight itself stays as it is."""
    weight = layers[0].require_weight()
    conv = layers[0].kind == "conv"
    shape = shape_of(weight).numpy()
    rows = int(shape[0]) if conv else len(branch.up)
    down = branch.down.reshape(branch.rank, *shape[1:]) if conv else branch.down.T
    up = branch.up.reshape(rows, branch.rank, *[1] * (len(shape) - 2)) if conv else branch.up.T
    stem = name_of(weight)
    first = Builder(graph, names, before=layers[0].node)
    parts = [_constant(first, f"{stem}_{end}", array, folder) for end, array in (("down", down), ("up", up))]
    for layer in layers:
        _beside(graph, names, layer, parts, branch.rank)


def add_beside(graph: ir.Graph, names: Names, layer: Layer, build: Builder, other: ir.Value) -> None:
    """Let all readers of a layer's output read its sum with another value, which `build` made."""
    old, readers = layer.output, consumers(layer.output)
    name = name_of(old)
    total = build.op("Sum", [old, other], f"{name}_total", like=old, name=names.unique(f"{layer.name}_total"))
    for node in readers:
        replace_use(node, old, total)
    if old.is_graph_output():
        old.name = names.unique(f"{name}_alone")
        graph.outputs[list(graph.outputs).index(old)] = total
        total.name = name


def _beside(graph: ir.Graph, names: Names, layer: Layer, parts: Sequence[ir.Value], rank: int) -> None:
    node = layer.node
    build = Builder(graph, names, after=layer.bias_add or node)
    out = node.outputs[0]
    kernel = _kernel_of(node) if layer.kind == "conv" else {}
    op = "Conv" if layer.kind == "conv" else "MatMul"
    narrow = None
    if out.shape is not None:
        axis = 1 if layer.kind == "conv" else len(out.shape) - 1
        narrow = [rank if d == axis else n for d, n in enumerate(out.shape)]
    made = inputs(node, 1)[0]  # now: a branch beside the layer in front may have replaced it
    for end, part, attributes, shape in (("down", parts[0], kernel, narrow), ("up", parts[1], {}, out.shape)):
        made = build.op(
            op,
            [made, part],
            f"{layer.name}_branch_{end}",  # of value and node: onnxruntime's own layout names nodes by their outputs
            dtype=out.dtype,
            shape=shape,
            attributes=attributes,
        )
        producer(made).metadata_props[BRANCH] = layer.name
    add_beside(graph, names, layer, build, made)


def _kernel_of(node: ir.Node) -> dict[str, Any]:
    """Return how a convolution moves over its input, without what is so by default."""
    chosen = {name: node.attributes[name].value for name in (*_DEFAULTS, "auto_pad") if name in node.attributes}
    return {name: value for name, value in chosen.items() if not _is_default(name, value)}


def _is_default(name: str, value: Any) -> bool:
    return value == "NOTSET" if name == "auto_pad" else all(number == _DEFAULTS[name] for number in value)


def _constant(build: Builder, preferred: str, array: Floats, folder: Path) -> ir.Value:
    values = np.ascontiguousarray(array, dtype=np.float32)
    return build.constant(preferred, store.kept(values, preferred, folder))
