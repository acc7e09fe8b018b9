"""A violation of TensorRT's rules, and the node that it is about."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import onnx_ir as ir

from .groups import node_label

ViolationKind = Literal["illegal", "placement"]


@dataclass(frozen=True)
class Violation:
    """One rule that one node breaks: the reason and the fix. A violation of the whole file has an empty name."""

    name: str
    op: str
    rule: str
    why: str
    fix: str
    kind: ViolationKind = "illegal"

    def to_json(self) -> dict[str, str]:
        return asdict(self)


class Fault(NamedTuple):
    """A violation at a node of the graph."""

    at: ir.Node
    violation: Violation


def fault(node: ir.Node, rule: str, why: str, fix: str, kind: ViolationKind = "illegal") -> Fault:
    """Return a violation at a node, which is named as the file names it."""
    return Fault(node, Violation(node_label(node), node.op_type, rule, why, fix, kind))
