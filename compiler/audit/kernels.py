"""Which layers onnxruntime really runs on integer kernels, read from the graph that it built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..graph.nodes import counts
from ..graph.ops import Layer
from .built import FLOAT_KERNELS, INTEGER_KERNELS, built_graph
from .fusion import Fusion, Verdict, judge, load_graph

__all__ = ["FLOAT_KERNELS", "INTEGER_KERNELS", "Audit", "audit"]


@dataclass(frozen=True)
class Audit:
    """Kernels by operation; the verdict on each layer (None where the file has no such node any more); and on all."""

    operations: Mapping[str, int]
    layers: Mapping[str, Verdict | None]
    fusion: Fusion

    @property
    def integer(self) -> int:
        return sum(n for op, n in self.operations.items() if op.rpartition(".")[2] in INTEGER_KERNELS)

    @property
    def floating(self) -> int:
        return sum(n for op, n in self.operations.items() if op.rpartition(".")[2] in FLOAT_KERNELS)

    def to_json(self, islands: Mapping[str, str]) -> dict[str, Any]:
        """`islands` says why a layer is in float on purpose; where onnxruntime left it in float, a rule says why."""
        rows = {}
        for name, verdict in self.layers.items():
            kernel = "" if verdict is None else verdict.kernel
            row: dict[str, Any] = {
                "kernel": kernel or "unknown",
                "integer": verdict is not None and verdict.integer and kernel in INTEGER_KERNELS,
            }
            if not row["integer"]:
                row["why"] = islands.get(name) or _why(verdict)
            rows[name] = row
        for name, why in islands.items():  # what multiplies matrices but is no layer: it could not be quantized at all
            found = self.fusion.of(name)
            kernel = found.kernel if found is not None and found.kernel else "float"
            rows.setdefault(name, {"kernel": kernel, "integer": False, "why": why})
        return {
            "integer": self.integer,
            "float": self.floating,
            "operations": dict(sorted(self.operations.items())),
            "layers": rows,
        }


def _why(verdict: Verdict | None) -> str:
    if verdict is None:
        return "the file has no such node any more"
    return f"{verdict.why} ({verdict.fix})" if verdict.failed else verdict.why


def audit(model: Path, layers: list[Layer], folder: Path, *, threads: int | None = None) -> Audit:
    """Build a session for a model file, and look at the graph that came out (the files are removed again).

    `layers` may be those of the float graph: a lowering keeps their names, or those of their outputs.
    """
    built = built_graph(model, folder, threads=threads)
    file = load_graph(model)
    fusion = judge(file, built, {})
    named = {verdict.name: verdict for verdict in fusion.verdicts}
    made = {verdict.output: verdict for verdict in fusion.verdicts}
    found = {}
    for layer in layers:
        outputs = (layer.node.outputs[0].name or "", layer.output.name or "")
        found[layer.name] = named.get(layer.name) or next((made[o] for o in outputs if o in made), None)
    return Audit(dict(counts(built)), found, fusion)
