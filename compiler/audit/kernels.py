"""The layers that onnxruntime runs on integer kernels, read from the graph that it built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mezzotint.runtime.bundle.manifest_entries import Kernels, LayerKernel
from mezzotint.runtime.targets import ONNXRUNTIME, Target

from ..graph.nodes import counts
from ..graph.ops import Layer
from .built import FLOAT_KERNELS, INTEGER_KERNELS, built_graph
from .fusion import Fusion, Verdict, judge, load_graph

__all__ = ["FLOAT_KERNELS", "INTEGER_KERNELS", "KernelAudit", "audit_kernels"]


@dataclass(frozen=True)
class KernelAudit:
    """Counts of kernels by operation, and verdicts. A layer without a node in the file has None."""

    operations: Mapping[str, int]
    layers: Mapping[str, Verdict | None]
    fusion: Fusion

    @property
    def integer(self) -> int:
        """Return the number of layers on integer kernels, as `audit` counts them."""
        return self.fusion.layers.integer

    @property
    def floating(self) -> int:
        """Return the number of layers in float, as `audit` counts them."""
        return self.fusion.layers.floating

    def entry(self, islands: Mapping[str, str], target: Target = ONNXRUNTIME) -> Kernels:
        """Return the manifest's `kernels`. `islands` gives the reasons why layers are in float on purpose.

        In the form for another `target` there are layers that onnxruntime's CPU provider runs in float for that.
        """
        rows = {}
        for name, verdict in self.layers.items():
            kernel = "" if verdict is None else verdict.kernel
            integer = verdict is not None and verdict.integer and kernel in INTEGER_KERNELS
            why = "" if integer else islands.get(name) or (_why(verdict) if target == ONNXRUNTIME else _other(target))
            rows[name] = LayerKernel(kernel or "unknown", integer, why)
        for name, why in islands.items():  # matrix products that are no layers cannot be quantized at all
            verdict = self.fusion.of(name)
            kernel = verdict.kernel if verdict is not None and verdict.kernel else "float"
            rows.setdefault(name, LayerKernel(kernel, False, why))
        return Kernels(self.integer, self.floating, dict(sorted(self.operations.items())), rows)


def _other(target: Target) -> str:
    return f"onnxruntime's CPU provider runs it in float: its output is not quantized, in the form for {target}"


def _why(verdict: Verdict | None) -> str:
    if verdict is None:
        return "the file has no such node any more"
    return f"{verdict.why} ({verdict.fix})" if verdict.failed else verdict.why


def audit_kernels(model: Path, layers: list[Layer], folder: Path, *, threads: int | None = None) -> KernelAudit:
    """Build a session for a model file and return the kernels of its graph. Files that onnxruntime saves are removed.

    `layers` may be those of the float graph: a lowering keeps their names, or those of their outputs.
    """
    built = built_graph(model, folder, threads=threads)
    file = load_graph(model)
    fusion = judge(file, built, {})
    by_name = {verdict.name: verdict for verdict in fusion.verdicts}
    by_output = {verdict.output: verdict for verdict in fusion.verdicts}
    verdicts = {}
    for layer in layers:
        outputs = (layer.node.outputs[0].name or "", layer.output.name or "")
        verdicts[layer.name] = by_name.get(layer.name) or next((by_output[o] for o in outputs if o in by_output), None)
    return KernelAudit(dict(counts(built)), verdicts, fusion)
