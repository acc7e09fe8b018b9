"""onnxruntime's own profile of a session, summed by operation, by group of operations and by node."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mezzotint.compiler.audit.kernels import FLOAT_KERNELS, INTEGER_KERNELS
from mezzotint.compiler.errors import OutputError

INTEGER_GROUP = "integer kernels"
FLOAT_GROUP = "float kernels"
OTHER = "other"
_MEMBERS = {
    INTEGER_GROUP: INTEGER_KERNELS | {"ConvInteger"},
    FLOAT_GROUP: FLOAT_KERNELS,
    "layout": "Transpose Reshape ReorderInput ReorderOutput Concat Split Slice Gather Squeeze Unsqueeze Flatten Expand "
    "Identity DepthToSpace SpaceToDepth",
    "quantize and dequantize": "QuantizeLinear DequantizeLinear DynamicQuantizeLinear",
    "norms": "InstanceNormalization LayerNormalization GroupNormalization GroupNorm BatchNormalization "
    "SimplifiedLayerNormalization SkipLayerNormalization SkipGroupNorm RMSNormalization",
    "elementwise": "Add Sub Mul Div Neg Abs Pow Sqrt Exp Log Erf Sin Cos Tanh Sigmoid HardSigmoid Relu LeakyRelu Clip "
    "Min Max Sum Gelu QuickGelu FastGelu BiasGelu Swish Cast Where Equal Reciprocal",
    "attention softmax": "Softmax BiasSoftmax Attention MultiHeadAttention QAttention",
}
_GROUP_OF = {
    op: group for group, ops in _MEMBERS.items() for op in (ops.split() if isinstance(ops, str) else sorted(ops))
}
GROUPS = (*_MEMBERS, OTHER)

_BODIES = frozenset({"If", "Loop", "Scan"})  # the nodes inside are in the trace themselves
_KERNEL = "_kernel_time"
# What onnxruntime appends to the name of a node that it rewrites, or to that of the value that the node makes.
_ADDED = re.compile(r"(_token_\d+|_nchwc|_nhwc|/\w*Fusion/?|/duplicated|_transpose)+$")


@dataclass(frozen=True)
class Operation:
    """One kind of node of the built graph: the number of nodes, and the seconds of all of them in one call."""

    op: str
    group: str
    nodes: int
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """A profile of `calls` calls, with a median of `call_seconds` each, the profiler's own time included.

    `nodes` are the seconds of each node of the built graph, by the name that onnxruntime gave it.
    """

    operations: tuple[Operation, ...]
    calls: int
    call_seconds: float
    nodes: Mapping[str, float] = field(default_factory=dict)

    @property
    def kernel_seconds(self) -> float:
        return sum(o.seconds for o in self.operations)

    @property
    def integer_seconds(self) -> float:
        return sum(o.seconds for o in self.operations if o.group == INTEGER_GROUP)

    @property
    def integer_share(self) -> float:
        """The share of integer convolutions and matmuls in all kernel time, 0 to 1."""
        return self.integer_seconds / self.kernel_seconds if self.kernel_seconds else 0.0

    def named(self, names: Collection[str]) -> tuple[int, float]:
        """Return (nodes, seconds) of the nodes that had one of these names before onnxruntime rewrote them."""
        found = [seconds for name, seconds in node_seconds(self).items() if name in names]
        return len(found), sum(found)

    def groups(self) -> dict[str, tuple[int, float]]:
        """Return (nodes, seconds) of each group that occurs, in the order of GROUPS."""
        members = {group: [o for o in self.operations if o.group == group] for group in GROUPS}
        return {g: (sum(o.nodes for o in ops), sum(o.seconds for o in ops)) for g, ops in members.items() if ops}


def read_trace(path: Path) -> Breakdown:
    """Sum up a trace of onnxruntime's profiler, leaving out its first call. Times are medians over the calls.

    Raises OutputError where the trace is missing, cut off, or shows no second call.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        calls = sorted((e["ts"], e["dur"]) for e in events if e.get("name") == "model_run")[1:]
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
        timed = [(e["ts"], e["dur"], e["args"]["op_name"], e["name"].removesuffix(_KERNEL)) for e in nodes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_trace(path, f"{type(error).__name__} {error}") from error
    spent: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(calls))  # microseconds of each call
    by_node: defaultdict[str, list[float]] = defaultdict(lambda: [0.0] * len(calls))
    count: Counter[str] = Counter()
    for start, duration, op, name in timed:
        call = next((i for i, (begin, length) in enumerate(calls) if begin <= start <= begin + length), None)
        if call is None or op in _BODIES:
            continue
        spent[op][call] += duration
        by_node[name][call] += duration
        count[op] += 1
    if not count:
        raise _no_trace(path, "it shows no call")
    operations = [
        Operation(op, group_of(op), round(count[op] / len(calls)), float(np.median(times)) / 1e6)
        for op, times in spent.items()
    ]
    ordered = tuple(sorted(operations, key=lambda o: (-o.seconds, o.op)))
    names = {name: float(np.median(times)) / 1e6 for name, times in by_node.items()}
    return Breakdown(ordered, len(calls), float(np.median([length for _, length in calls])) / 1e6, names)


def group_of(op: str) -> str:
    """Return the group of an operation; QLinearAdd, QLinearConcat ... are grouped as their float forms."""
    return _GROUP_OF.get(op) or _GROUP_OF.get(op.removeprefix("QLinear"), OTHER)


def _no_trace(path: Path, why: str) -> OutputError:
    return OutputError(
        f"onnxruntime's profile cannot be read: {why}",
        where=str(path),
        hint="free some space in the folder for temporary files (TMPDIR chooses it), or ask for fewer --repeats",
    )


def node_seconds(breakdown: Breakdown) -> dict[str, float]:
    """Return seconds by the name that a node, or its output value, had before onnxruntime rewrote it."""
    spent: defaultdict[str, float] = defaultdict(float)
    for name, seconds in breakdown.nodes.items():
        spent[_ADDED.sub("", name)] += seconds
    return dict(spent)
