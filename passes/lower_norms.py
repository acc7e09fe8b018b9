"""lower_norms: GroupNormalization in the form that onnxruntime's CPU provider runs best.

GroupNormalization has no kernel there and is expanded into some 25 primitive nodes. Written as

    y = InstanceNormalization(x as [batch, groups, rest]) as x's shape * gamma + beta

it is one normalization kernel and two elementwise ones. (LayerNormalization instead, and BatchNormalization as the
affine part, were measured: no faster in a whole UNet.) Up to opset 20 gamma and beta are given per group, from
opset 21 per channel; both are expanded to [channels, 1, ...].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from ..compiler.graph import Builder, Names, is_constant, is_op, known_ints, name_of, remove_dead, replace_value
from ..compiler.pipeline import Context, GraphPass
from ..compiler.program import Program, numpy_of


@dataclass(frozen=True)
class LowerNorms(GraphPass):
    """Rewrites every GroupNormalization whose gamma and beta are constant."""

    tolerance: ClassVar[float | None] = 1e-4  # sums in another order

    def run(self, program: Program, context: Context) -> Program:
        graph = program.graph
        names = Names(graph)
        found = [n for n in graph if is_op(n, "GroupNormalization") and is_constant(n.inputs[1])]
        lowered = sum(_lower(graph, names, node) for node in found)
        remove_dead(graph)
        return program.noted(f"{lowered} GroupNormalization lowered")


def _lower(graph: ir.Graph, names: Names, node: ir.Node) -> bool:
    x, gamma, beta = node.inputs[0], node.inputs[1], node.inputs[2]
    out = node.outputs[0]
    if x is None or gamma is None or beta is None or x.shape is None or not is_constant(beta):
        return False
    channels = known_ints(x.shape, [1])
    if channels is None:
        return False
    groups = node.attributes["num_groups"].as_int()
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    rank = len(x.shape)
    build = Builder(graph, names, node)
    stem = name_of(out)

    flat = build.op(
        "Reshape",
        [x, build.constant(f"{stem}_groups", np.array([0, groups, -1], np.int64))],
        f"{stem}_grouped",
        dtype=x.dtype,
        shape=[x.shape[0], groups, None],
    )
    normal = build.op(
        "InstanceNormalization",
        [
            flat,
            build.constant(f"{stem}_ones", np.ones(groups, np.float32)),
            build.constant(f"{stem}_zeros", np.zeros(groups, np.float32)),
        ],
        f"{stem}_normal",
        like=flat,
        attributes={"epsilon": epsilon},
    )
    back = build.op("Reshape", [normal, _shape_of(build, x, stem)], f"{stem}_shaped", like=x)
    scaled = build.op("Mul", [back, _per_channel(build, gamma, channels[0], rank)], f"{stem}_scaled", like=x)
    shifted = build.op("Add", [scaled, _per_channel(build, beta, channels[0], rank)], f"{stem}_shifted", like=x)
    replace_value(out, shifted)
    graph.remove(node, safe=True)
    return True


def _shape_of(build: Builder, x: ir.Value, stem: str) -> ir.Value:
    """A constant shape with the batch copied (0) where the other sizes are known, else the shape of x."""
    assert x.shape is not None
    sizes = known_ints(x.shape, range(1, len(x.shape)))
    if sizes is not None:
        return build.constant(f"{stem}_shape", np.array([0, *sizes], np.int64))
    return build.op("Shape", [x], f"{stem}_shape", dtype=ir.DataType.INT64, shape=[len(x.shape)])


def _per_channel(build: Builder, value: ir.Value, channels: int, rank: int) -> ir.Value:
    array = numpy_of(value).astype(np.float32)
    repeated = np.repeat(array, channels // len(array))
    return build.constant(f"{name_of(value)}_per_channel", repeated.reshape([channels, *[1] * (rank - 2)]))
