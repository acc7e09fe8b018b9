"""OpenVINO's own times of the nodes of a call, as the breakdown that trace.py makes of onnxruntime's profile."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np

from mezzotint.runtime.providers.openvino import OpenVinoNetwork

from .trace import FLOAT_GROUP, INTEGER_GROUP, OTHER, Breakdown, Operation

_LAYERS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "GroupConvolution")
_INTEGER = ("_I8", "_U8")  # how a primitive ends that computes in integers
_GROUPS = {
    "layout": "Reorder Transpose Reshape Concat Concatenation Split Gather Pad Interpolate StridedSlice Slice Convert",
    "quantize and dequantize": "FakeQuantize",
    "norms": "MVN RMS GroupNormalization NormalizeL2",
    "elementwise": "Subgraph Eltwise Add Subtract Multiply Divide MulAdd Clamp Swish Gelu PowerStatic Power Math Round",
    "attention softmax": "Softmax ScaledDotProductAttention MHA",
}
_GROUP_OF = {kind: group for group, kinds in _GROUPS.items() for kind in kinds.split()}


def trace_openvino(network: OpenVinoNetwork, call: Callable[[], Any], calls: int) -> Breakdown:
    """Call a network that was opened with PERF_COUNT=YES, and sum up the times of its nodes: medians over the calls.

    The first call warms up. The operations are OpenVINO's types of nodes.
    """
    call()
    spent: defaultdict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * calls)
    by_name: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * calls)
    count: Counter[tuple[str, str]] = Counter()
    whole = []
    for i in range(calls):
        start = time.perf_counter()
        call()
        whole.append(time.perf_counter() - start)
        for node in network.node_times():
            key = node.kind, group_of_node(node.kind, node.primitive)
            spent[key][i] += node.seconds
            by_name[node.name][i] += node.seconds
            count[key] += 1
    operations = [
        Operation(kind, group, round(count[kind, group] / calls), float(np.median(times)))
        for (kind, group), times in spent.items()
    ]
    ordered = tuple(sorted(operations, key=lambda o: (-o.seconds, o.op, o.group)))
    nodes = {name: float(np.median(times)) for name, times in by_name.items()}
    return Breakdown(ordered, calls, float(np.median(whole)), nodes)


def group_of_node(kind: str, primitive: str) -> str:
    """Return the group of trace.py for a type of node and the primitive that OpenVINO chose."""
    if kind.startswith(_LAYERS):
        return INTEGER_GROUP if primitive.endswith(_INTEGER) else FLOAT_GROUP
    return _GROUP_OF.get(kind, OTHER)
