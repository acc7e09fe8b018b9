"""lower_norms: rewrite group normalizations into the form that onnxruntime's CPU provider runs fastest.

GroupNormalization has no kernel there and is expanded into about 25 primitive nodes. The form

    y = LayerNormalization(x as [batch, groups, rest]) as x's shape * gamma + beta

is one normalization kernel and two elementwise ones.

1. A GroupNormalization with constant gamma and beta becomes this form. Up to opset 20 gamma and beta are given per
   group, from opset 21 on per channel; both are expanded to `[channels, 1, ...]`.
2. An InstanceNormalization of `[batch, groups, rest]` without scale and shift, which older exporters write for the same
   thing, becomes the LayerNormalization alone. Its own kernel uses one thread only: on the digits (batch 16, two
   threads) 27 of them take 12.4 ms of a call, and 27 LayerNormalizations 7.1 ms.

With gamma and beta inside the LayerNormalization, one value for each element, the kernel is four times slower
(measured).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from mezzotint.compiler.core.pipeline import Context, GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import (
    Builder,
    Names,
    is_constant,
    is_op,
    known_ints,
    name_of,
    numpy_of,
    remove_dead,
    replace_value,
)
from mezzotint.compiler.graph.require import inputs, shape_of

LAYER_NORMALIZATION = 17  # the opset that brought it

Sizes = dict[tuple[str, ...], ir.Value]
"""Values that norms over feature maps of equal dimensions share: the shape, and the ones of a LayerNormalization."""


@dataclass(frozen=True)
class LowerNorms(GraphPass):
    """It has no options; the cases are numbered in the module's docstring."""

    tolerance: ClassVar[float | None] = 1e-4  # sums in another order

    def run(self, program: Program, context: Context) -> Program:
        graph = program.graph
        names = Names(graph)
        sizes: Sizes = {}
        lowered, modern = 0, graph.opset_imports.get("", 0) >= LAYER_NORMALIZATION
        for node in list(graph):
            if is_op(node, "GroupNormalization") and is_constant(node.inputs[1]):
                lowered += _lower(graph, names, node, sizes)  # case 1
            elif modern and is_op(node, "InstanceNormalization") and _is_plain(node):
                lowered += _lower_plain(graph, names, node, sizes)  # case 2
        remove_dead(graph)
        return program.noted(f"{lowered} group normalizations lowered")


def _lower(graph: ir.Graph, names: Names, node: ir.Node, sizes: Sizes) -> bool:
    x, gamma, beta = node.inputs[0], node.inputs[1], node.inputs[2]
    out = node.outputs[0]
    if x is None or gamma is None or beta is None or x.shape is None or not is_constant(beta):
        return False
    channels = known_ints(x.shape, [1])
    if channels is None:
        return False
    groups = node.attributes["num_groups"].as_int()
    rank = len(x.shape)
    build = Builder(graph, names, node)
    stem = name_of(out)

    known = known_ints(x.shape, range(1, rank))
    rest = None if known is None else int(np.prod(known)) // groups
    flat = build.op(
        "Reshape",
        [x, build.constant(f"{stem}_groups", np.array([0, groups, -1], np.int64))],
        f"{stem}_grouped",
        dtype=x.dtype,
        shape=[x.shape[0], groups, rest],
    )
    dims = _dims(x)
    normal = _normalized(build, flat, _epsilon(node), stem, sizes, (*dims, str(groups)))
    if dims not in sizes:
        sizes[dims] = _shape_of(build, x, stem)
    back = build.op("Reshape", [normal, sizes[dims]], f"{stem}_shaped", like=x)
    scaled = build.op("Mul", [back, _per_channel(build, gamma, channels[0], rank)], f"{stem}_scaled", like=x)
    shifted = build.op("Add", [scaled, _per_channel(build, beta, channels[0], rank)], f"{stem}_shifted", like=x)
    replace_value(out, shifted)
    graph.remove(node, safe=True)
    return True


def _dims(x: ir.Value) -> tuple[str, ...]:
    """Return the dimensions by which norms share a shape; an open dimension without a name is equal to no other."""
    dims = [str(d) if isinstance(d, int) or d.value is not None else f"? of {name_of(x)}" for d in shape_of(x)]
    return tuple(dims)


def _normalized(
    build: Builder, flat: ir.Value, epsilon: float, stem: str, sizes: Sizes, key: tuple[str, ...]
) -> ir.Value:
    """Return x `[batch, groups, rest]` with mean 0 and variance 1 over `rest`; norms of one `key` share their ones."""
    rest = known_ints(flat.shape, [2])
    int64 = ir.DataType.INT64
    key = key if rest is None else ("ones", str(rest[0]))
    if key not in sizes:
        if rest is not None:
            size = build.constant(f"{stem}_rest", np.array(rest))
        else:
            size = build.op("Shape", [flat], f"{stem}_rest", dtype=int64, shape=[1], attributes={"start": 2, "end": 3})
        # A node even where the size is constant: stored ones would take as many numbers as a feature map has pixels.
        one = {"value": ir.tensor(np.ones(1, np.float32))}
        shape = [None] if rest is None else rest
        sizes[key] = build.op("ConstantOfShape", [size], f"{stem}_ones", dtype=flat.dtype, shape=shape, attributes=one)
    return build.op(
        "LayerNormalization",
        [flat, sizes[key]],
        f"{stem}_normal",
        like=flat,
        attributes={"axis": -1, "epsilon": epsilon},
    )


def _is_plain(node: ir.Node) -> bool:
    """Return whether a node is an InstanceNormalization `[batch, groups, rest]` without scale and shift (case 2)."""
    x, scale, shift = inputs(node, 3)
    if x.shape is None or len(x.shape) != 3 or not (is_constant(scale) and is_constant(shift)):
        return False
    return bool((numpy_of(scale) == 1).all() and (numpy_of(shift) == 0).all())


def _lower_plain(graph: ir.Graph, names: Names, node: ir.Node, sizes: Sizes) -> bool:
    (x,), out = inputs(node, 1), node.outputs[0]
    build = Builder(graph, names, node)
    replace_value(out, _normalized(build, x, _epsilon(node), name_of(out), sizes, (*_dims(x), "plain")))
    graph.remove(node, safe=True)
    return True


def _epsilon(node: ir.Node) -> float:
    return node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5


def _shape_of(build: Builder, x: ir.Value, stem: str) -> ir.Value:
    """Return a constant shape with the batch copied (0) where the other sizes are known, else the shape of x."""
    shape = shape_of(x)
    sizes = known_ints(shape, range(1, len(shape)))
    if sizes is not None:
        return build.constant(f"{stem}_shape", np.array([0, *sizes], np.int64))
    return build.op("Shape", [x], f"{stem}_shape", dtype=ir.DataType.INT64, shape=[len(shape)])


def _per_channel(build: Builder, value: ir.Value, channels: int, rank: int) -> ir.Value:
    array = numpy_of(value).astype(np.float32)
    repeated = np.repeat(array, channels // len(array))
    return build.constant(f"{name_of(value)}_per_channel", repeated.reshape([channels, *[1] * (rank - 2)]))
