"""Whether TensorRT and TensorRT-RTX read an ONNX file as it is meant: its rules, checked without the hardware.

Nothing is run: an engine can only be built beside a GPU. The rules are those of the importer (onnx-tensorrt) and of
NVIDIA's pages on quantized types and on where quantizers belong. A violation is one of two kinds:

* `illegal`: the importer or the builder refuses the file, or computes something else than ONNX says.
* `placement`: the file is read, and a layer has more conversions, or fewer fused operations, than it could have.

A file without violations may still be refused by a version of TensorRT for a reason that no rule here knows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from ..errors import ModelError
from .fusion import LayerCounts
from .groups import groups
from .tensorrt_graph import foreign_operations, integer_operations, opsets, placements
from .tensorrt_quantizers import quantizer_faults
from .tensorrt_violation import Violation

TensorRtEngine = Literal["tensorrt", "nv_tensorrt_rtx"]


@dataclass(frozen=True)
class Legality:
    """The violations of a file in the order of its nodes, those of the whole file first.

    `layers` counts the convolutions and matrix products whose factors are all quantized, and the others.
    """

    violations: tuple[Violation, ...]
    layers: LayerCounts
    quantizers: int
    engine: TensorRtEngine = "tensorrt"

    @property
    def illegal(self) -> tuple[Violation, ...]:
        return tuple(v for v in self.violations if v.kind == "illegal")

    @property
    def failed(self) -> tuple[Violation, ...]:
        """Return what `audit --strict` refuses: every violation."""
        return self.violations

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "checked": "rules",
            "run": False,
            "legal": not self.illegal,
            "layers": {"quantized": self.layers.integer, "float": self.layers.floating},
            "quantizers": self.quantizers,
            "rules": dict(sorted(Counter(v.rule for v in self.violations).items())),
            "violations": [v.to_json() for v in self.violations],
        }


def check_tensorrt(model: Path, engine: TensorRtEngine = "tensorrt") -> Legality:
    """Check an ONNX file against the rules. Raises ModelError for a file that is missing."""
    if not model.is_file():
        raise ModelError("no such file", where=str(model), hint="give an .onnx file, or a bundle's folder")
    return check_graph(ir.load(model).graph, engine)


def check_graph(graph: ir.Graph, engine: TensorRtEngine = "tensorrt") -> Legality:
    """Check a graph against the rules."""
    nodes = list(graph.all_nodes())
    layers = [group for group in groups(graph, lambda _: "") if group.matrix]
    quantized = sum(all(origin.dequantizer is not None for origin in group.data) for group in layers)
    rest = (foreign_operations(nodes), integer_operations(nodes), quantizer_faults(nodes, layers), placements(nodes))
    order = {node: i for i, node in enumerate(nodes)}
    found = sorted((fault for part in rest for fault in part), key=lambda fault: order[fault.at])
    quantizers = sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in nodes)
    violations = (*opsets(graph), *(fault.violation for fault in found))
    return Legality(violations, LayerCounts(quantized, len(layers) - quantized), quantizers, engine)
