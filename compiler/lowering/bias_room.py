"""Room for biases: the scale of a weight is raised where its layer's bias would not fit into int32.

An integer kernel adds round(b / (x_scale w_scale)) to its sum, both int32. An output channel whose weights are nearly
or exactly zero has a tiny w_scale, and its bias passes 2^31. Nothing keeps such a layer in float: onnxruntime makes the
bias int32 itself, and the integers wrap around (measured on 1.31.1: 0.7 dB, without a warning). So

    w_scale[c] = max(w_scale[c], max_t |b_t[c]| / (x_scale_t LIMIT))        LIMIT = 2^30; the sum has the other half

The weights of the channel become coarser, by at most half a step each. n of them change its output by less than
n 255 |b| / 2^31, a thousandth of the bias for 10,000 weights, and far less than one step of a quantizer whose range
contains the bias.

The bound assumes that x_scale is the same for all timesteps. A row far quieter than the loudest one (256 times) would
raise the scale at the loud rows' cost: such a layer is refused, and insert_qdq leaves it in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Doubles, Floats

from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import Builder, Names, consumers, name_of, numpy_of, replace_use
from ..graph.require import inputs
from .quantized import AccumulatorBias, QuantizedLayer, accumulator_bias, quantized_layer

BIAS_LIMIT = 2**30
QUIETEST = 1 / 256  # of the loudest row of an input's scales
_ROUNDING = 1 + 1e-5  # float32 scales are rounded up


@dataclass(frozen=True)
class Room:
    """What `make_room` did: the raised scales of weights, and why a bias cannot fit, by the names of layers."""

    raised: Mapping[str, Floats]
    refused: Mapping[str, str]


def make_room(program: Program, graph: ir.Graph) -> Room:
    """Raise the scales of weights in a graph that insert_qdq wrote until every bias fits; edits the graph.

    `program` gives the rows of its tables. Layers that are refused keep their scales.
    """
    waiting: dict[ir.Value, list[tuple[QuantizedLayer, AccumulatorBias]]] = {}
    for node in graph:
        layer = quantized_layer(node)
        bias = None if layer is None else accumulator_bias(program, layer)
        if layer is not None and bias is not None:
            waiting.setdefault(inputs(layer.w, 2)[1], []).append((layer, bias))
    raised: dict[str, Floats] = {}
    refused: dict[str, str] = {}
    for value, members in waiting.items():
        old = numpy_of(value)
        needs = [_least_scale(bias) for _, bias in members]
        need = np.max(np.stack([np.broadcast_to(n if old.ndim else n.max(), old.shape) for n in needs]), axis=0)
        with np.errstate(over="ignore"):
            new = np.where(need > old, need * _ROUNDING, old).astype(np.float32)
        late = [_name(layer) for layer, bias in members if not _fits(bias, new)]
        if late:
            refused |= dict.fromkeys(late, "its bias does not fit into int32: its input is far quieter at some steps")
        elif not np.array_equal(new, old):
            _replace(graph, value, new, [layer for layer, _ in members])
            raised |= {_name(layer): new for layer, _ in members}
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


def _name(layer: QuantizedLayer) -> str:
    """Return the name that `Layer.name` of compiler/graph/ops.py has."""
    return layer.node.name or name_of(layer.node.outputs[0])


def _replace(graph: ir.Graph, old: ir.Value, scale: Floats, members: list[QuantizedLayer]) -> None:
    """Let the quantizers of a weight read another scale; other readers of the old one keep it."""
    stored = {layer.w.inputs[0] for layer in members}
    sources = {node for value in stored if value is not None and (node := value.producer()) is not None}
    sources |= {node for s in list(sources) if s.op_type == "Clip" and (node := inputs(s, 1)[0].producer()) is not None}
    dequantizers = {node for value in stored if value is not None for node in consumers(value)}
    pairs = [node for node in consumers(old) if node in sources | dequantizers]
    if len(pairs) == len(consumers(old)):
        old.const_value = ir.tensor(scale, name=name_of(old))
        return
    new = Builder(graph, Names(graph), before=pairs[0]).constant(f"{name_of(old)}_raised", scale)
    for node in pairs:
        replace_use(node, old, new)
