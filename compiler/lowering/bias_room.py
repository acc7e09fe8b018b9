"""Room for biases: the scale of a weight is raised where its layer's bias would not fit into int32.

An integer kernel adds round(b / (x_scale w_scale)) to its sum, both int32. An output channel whose weights are nearly
or exactly zero has a tiny w_scale, and its bias passes 2^31. Nothing keeps such a layer in float: onnxruntime makes the
bias int32 itself, and the integers wrap around (measured on 1.31.1: 0.7 dB, without a warning). So

    w_scale[c] = max(w_scale[c], max_t |b_t[c]| / (x_scale_t LIMIT))        LIMIT = 2^30; the sum has the other half

The weights of the channel become coarser, by at most half a step each. n of them change its output by less than
n 255 |b| / 2^31, a thousandth of the bias for 10,000 weights, and far less than one step of a quantizer whose range
contains the bias. Another layer that reads the same weight keeps its own scale.

The bound assumes that x_scale is the same for all timesteps. A row far quieter than the loudest one (256 times) would
raise the scale at the loud rows' cost: such a layer is refused, and insert_qdq leaves it in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Doubles, Floats

from ..core.program import Plan, Program, Site
from ..errors import PassError
from ..graph.nodes import Builder, Names, consumers, is_constant, name_of, numpy_of, replace_use
from ..graph.ops import Layer
from ..graph.require import inputs, producer
from .quantized import AccumulatorBias, IntegerLayer, accumulator_bias, integer_layer

BIAS_LIMIT = 2**30
QUIETEST = 1 / 256  # of the loudest row of an input's scales
_ROUNDING = 1 + 1e-5  # float32 scales are rounded up


@dataclass(frozen=True)
class Room:
    """What `make_room` did: the raised scales of weights, and why a bias cannot fit, by the names of layers."""

    raised: Mapping[str, Floats]
    refused: Mapping[str, str]

    def raise_scales(self, plan: Plan, every_layer: Sequence[Layer]) -> Plan:
        """Return the plan with the scales of weights that were raised for the biases of their layers."""
        quantizers = dict(plan.quantizers)
        for layer in every_layer:
            if layer.name in self.raised and layer.weight is not None:
                value, own = name_of(layer.weight), Site(name_of(layer.weight), layer.name)
                shared = sum(other.weight is layer.weight for other in every_layer) > 1
                site = own if shared or own in quantizers else Site(value)
                old = quantizers.get(own) or quantizers[Site(value)]
                quantizers[site] = old.raised(self.raised[layer.name])
        return replace(plan, quantizers=quantizers)


def make_room(program: Program, graph: ir.Graph) -> Room:
    """Raise the scales of weights in a graph that insert_qdq wrote until every bias fits; edits the graph.

    `program` gives the rows of its tables. Layers that are refused keep their scales.
    """
    biases = [
        (layer, bias)
        for layer in (integer_layer(node) for node in graph)
        if layer is not None and (bias := accumulator_bias(program, layer)) is not None
    ]
    raised: dict[str, Floats] = {}
    refused: dict[str, str] = {}
    for layer, bias in biases:
        old = numpy_of(inputs(layer.w, 2)[1])
        need = _least_scale(bias)
        need = need if old.ndim else need.max()
        with np.errstate(over="ignore"):
            new = np.where(need > old, need * _ROUNDING, old).astype(np.float32)
        if not _fits(bias, new) or (is_constant(layer.w.inputs[0]) and not _fits(bias, old)):
            refused[_name(layer)] = "its bias does not fit into int32: its input is far quieter at some steps"
        elif not np.array_equal(new, old):
            _raise_scale(graph, layer, new)
            raised[_name(layer)] = new
    return Room(raised, refused)


def with_room(program: Program) -> Program:
    """Return a quantized program whose biases fit, or the program itself where all fit already.

    insert_qdq makes room; passes behind it may have changed biases and scales. Raises PassError for a bias that cannot
    fit.
    """
    model = program.model.clone()
    room = make_room(program, model.graph)
    for name, reason in room.refused.items():
        raise PassError(
            reason, where=name, hint=f"keep it in float: --set insert_qdq.islands, with {name!r} among them"
        )
    return program.with_model(model) if room.raised else program


def _least_scale(bias: AccumulatorBias) -> Doubles:
    """Return the smallest weight scale `[C]` with which a bias fits, quiet rows apart."""
    x_scale = np.maximum(bias.x_scale, bias.x_scale.max() * QUIETEST)
    least: Doubles = np.max(np.abs(bias.values) / (x_scale * BIAS_LIMIT), axis=0)
    return least


def _fits(bias: AccumulatorBias, w_scale: Floats) -> bool:
    steps = bias.x_scale * w_scale.astype(np.float64)
    return bool(np.all(np.isfinite(w_scale)) and np.all(np.abs(bias.values) <= steps * BIAS_LIMIT))


def _name(layer: IntegerLayer) -> str:
    """Return the name that `Layer.name` of compiler/graph/ops.py has."""
    return layer.node.name or name_of(layer.node.outputs[0])


def _raise_scale(graph: ir.Graph, layer: IntegerLayer, scale: Floats) -> None:
    """Write another scale into the quantizers of a weight. Where other layers read them, write a pair for this one."""
    pair = _pair(layer.w)
    names, stem = Names(graph), name_of(inputs(pair[0], 1)[0])
    build = Builder(graph, names, before=layer.node)
    old, value = inputs(layer.w, 2)[1], build.constant(f"{stem}_raised_scale", scale)
    if all(len(consumers(node.outputs[0])) == 1 for node in pair):
        for node in (pair[0], pair[-1]):
            node.replace_input_with(1, value)
        if not old.uses():
            graph.initializers.pop(name_of(old), None)
        return
    out = inputs(pair[0], 1)[0]
    for node in pair:
        rest = [value, *node.inputs[2:]] if node.op_type != "Clip" else node.inputs[1:]
        attributes = {name: a.value for name, a in node.attributes.items()}
        like = node.outputs[0]
        out = build.op(node.op_type, [out, *rest], f"{stem}_raised", like=like, attributes=attributes)
    replace_use(layer.node, layer.w.outputs[0], out)


def _pair(dequantize: ir.Node) -> list[ir.Node]:
    """Return the QuantizeLinear of a weight, the Clip of a narrow format, and the DequantizeLinear."""
    nodes = [dequantize]
    while nodes[0].op_type != "QuantizeLinear":
        nodes.insert(0, producer(inputs(nodes[0], 1)[0]))
    return nodes
