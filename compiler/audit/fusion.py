"""The fusion audit: for each quantized group of an ONNX file its integer kernel in onnxruntime, or why it has none.

The kernel of a group is read from the graph that onnxruntime saves after all its optimizations; it is never predicted.
 The rules of rules.py then give the reason why a group stayed in float, and the fix. Where no rule
explains a group, its verdict is `unknown`.

Some integer kernels compute something else than the file says (measured: a Gemm whose bias has another scale than
x_scale * w_scale, a weight whose scales run along the wrong axis), or refuse to run. Their verdict is not `integer`,
and names the rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx_ir as ir

from mezzotint.runtime.session import running_version

from ..errors import ModelError
from ..graph.nodes import is_op, name_of
from .built import FLOAT_KERNELS, INTEGER_KERNELS, built_graph
from .groups import FUSED_ATTENTION, MATRICES, FusionGroup, groups, is_ort_mover, node_label
from .match import Match, is_integer_kernel, moves_integers
from .rules import NO_KERNEL, first_explanation

ISLAND, UNQUANTIZED, GONE, UNKNOWN = "island", "not-quantized", "gone", "unknown"


@dataclass(frozen=True)
class Verdict:
    """The kernel of one node of a file.

    `name` is the node's name, or that of its first output; `op` is its operation in the file; `kernel` is the operation
    that runs it, "" when no node of the built graph does; `integer` is whether that one computes on, or moves, integers
    as the file says.
    `rule`, `why` and `fix` are empty where it does; for a node that is gone, `why` says what became of it. `built` is
    the first output of the kernel in the built graph, `output` that of the node in the file.
    """

    name: str
    op: str
    kernel: str
    integer: bool
    rule: str = ""
    why: str = ""
    fix: str = ""
    built: str = ""
    output: str = ""

    @property
    def failed(self) -> bool:
        """Return whether integers were possible and intended, and the engine computes in float, or wrong numbers.

        A norm between two integer layers reads and writes quantized data because of its neighbours: no failure.
        """
        return not self.integer and self.rule not in (ISLAND, UNQUANTIZED, GONE, NO_KERNEL)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "op": self.op,
            "kernel": self.kernel,
            "integer": self.integer,
            "rule": self.rule,
            "why": self.why,
            "fix": self.fix,
        }


class LayerCounts(NamedTuple):
    """Convolutions and matrix products that run on integer kernels as the file says, and the others.

    `compile`, `inspect` and `audit` show these two figures. Nodes that the engine computed beforehand count nowhere.
    """

    integer: int
    floating: int


NO_STRAYS = LayerCounts(0, 0)


@dataclass(frozen=True)
class Fusion:
    """The verdicts in the order of the file, on what `engine` of this `version` built.

    `strays` are kernels of the built graph without a node in the file: parts of operations that the engine takes
    apart. `stray_layers` counts the convolutions and matrix products among them.
    """

    verdicts: tuple[Verdict, ...]
    strays: tuple[str, ...]
    version: str
    stray_layers: LayerCounts = NO_STRAYS
    engine: str = "onnxruntime"

    @property
    def failed(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.failed)

    def of(self, name: str) -> Verdict | None:
        """Return the verdict on a node by its name, or None."""
        return next((v for v in self.verdicts if v.name == name), None)

    @property
    def layers(self) -> LayerCounts:
        """Return the counts of convolutions and matrix products: the two of a fused attention, and strays, included."""
        layers = [v for v in self.verdicts if v.kernel and v.op in (*MATRICES, *INTEGER_KERNELS)]
        fused = 2 * sum(v.op in FUSED_ATTENTION for v in self.verdicts)
        return LayerCounts(
            sum(v.integer for v in layers) + self.stray_layers.integer,
            sum(not v.integer for v in layers) + self.stray_layers.floating + fused,
        )

    @property
    def totals(self) -> dict[str, int]:
        rules = Counter(v.rule for v in self.verdicts if not v.integer)
        return {
            "integer": sum(v.integer for v in self.verdicts),
            "not integer": len(self.failed),
            "islands": rules[ISLAND],
            "not quantized": rules[UNQUANTIZED],
            "without integer kernel": rules[NO_KERNEL],
            "gone": rules[GONE],
        }

    def to_json(self) -> dict[str, Any]:
        return {
            self.engine: self.version,
            "layers": {"integer": self.layers.integer, "float": self.layers.floating},
            "totals": self.totals,
            "rules": dict(sorted(Counter(v.rule for v in self.failed).items())),
            "strays": list(self.strays),
            "verdicts": [v.to_json() for v in self.verdicts],
        }


def audit_fusion(
    model: Path, folder: Path, *, threads: int | None = None, islands: Mapping[str, str] | None = None
) -> Fusion:
    """Build a session for an ONNX file and judge each of its quantized groups, and each layer that is in float.

    `folder` takes the built graph for a moment; `islands` gives the reasons why nodes are in float on purpose. Raises
    ModelError for a file that is missing or has functions of its own, InputError for one that onnxruntime refuses,
    OutputError where the folder cannot be written.
    """
    if not model.is_file():
        raise ModelError("no such file", where=str(model), hint="give an .onnx file, or a bundle's folder")
    built = built_graph(model, folder, threads=threads)
    return judge(load_graph(model), built, islands or {})


def load_graph(model: Path) -> ir.Graph:
    """Return the graph of a file. Raises ModelError for functions: onnxruntime renames the nodes inside them."""
    loaded = ir.load(model)
    if loaded.functions:
        raise ModelError(
            f"the file has functions of its own ({next(iter(loaded.functions))[1]!r}), whose nodes onnxruntime renames",
            where=str(model),
            hint="inline them first: onnx.inliner.inline_local_functions",
        )
    return loaded.graph


def judge(file: ir.Graph, built: ir.Graph, islands: Mapping[str, str]) -> Fusion:
    """Return verdicts on the groups of a file's graph, given the graph that onnxruntime built of it."""
    match = Match(file, built)

    def kernel_of(node: ir.Node) -> str:
        kernel = match.of(node)
        return "" if kernel is None else kernel.op_type

    verdicts = tuple(_verdict(group, match, islands) for group in groups(file, kernel_of))
    strays = [node.op_type for node in match.strays]
    counted = LayerCounts(sum(op in INTEGER_KERNELS for op in strays), sum(op in FLOAT_KERNELS for op in strays))
    names = tuple(f"{n.op_type} {node_label(n)}" for n in match.strays)
    return Fusion(verdicts, names, running_version(), counted)


def _verdict(group: FusionGroup, match: Match, islands: Mapping[str, str]) -> Verdict:
    kernel = match.of(group.node)
    verdict = Verdict(group.name, group.node.op_type, "", False, output=name_of(group.node.outputs[0]))
    if kernel is None:
        return _gone(group, match, verdict)
    verdict = replace(verdict, kernel=kernel.op_type, built=name_of(kernel.outputs[0]))
    if is_integer_kernel(kernel) or (is_ort_mover(group.node) and moves_integers(kernel)):
        explanation = first_explanation(group, broken=True)
        return with_reason(verdict, explanation) if explanation else replace(verdict, integer=True)
    if verdict.name in islands:
        return with_reason(verdict, (ISLAND, islands[verdict.name], "none is needed: it is in float on purpose"))
    if not group.meant:
        return with_reason(verdict, _unquantized(group))
    return with_reason(verdict, first_explanation(group) or _unknown(verdict))


def with_reason(verdict: Verdict, explanation: tuple[str, str, str]) -> Verdict:
    """Return the verdict with (rule, reason, fix)."""
    rule, why, fix = explanation
    return replace(verdict, rule=rule, why=why, fix=fix)


def _unknown(verdict: Verdict) -> tuple[str, str, str]:
    return (
        UNKNOWN,
        f"no rule explains why onnxruntime {running_version()} runs it as {verdict.kernel}: "
        "the rules were measured on 1.31.1",
        "compare it with a group that is fused, and report it",
    )


def _unquantized(group: FusionGroup) -> tuple[str, str, str]:
    if group.node.op_type in FUSED_ATTENTION:
        return (
            UNQUANTIZED,
            "it computes a whole attention in float, row by row, without storing the scores of all tokens",
            "to have two integer products, which store them, give fuse_attention.tokens more tokens",
        )
    loose = next((name_of(s.value) for s in group.data if s.dequantizer is None), "")
    return (
        UNQUANTIZED,
        f"it is float in the file: {loose!r} is not quantized",
        "to run it on integers, quantize its activations and weights, and a convolution's output",
    )


def _gone(group: FusionGroup, match: Match, verdict: Verdict) -> Verdict:
    """Return the verdict on a node without a kernel: a mover merged into a neighbour, or a node computed beforehand."""
    makers = [match.makes(q.outputs[0]) for q, _ in group.readers.quantizers]
    if is_ort_mover(group.node) and not any(is_op(maker, "QuantizeLinear") for maker in makers):
        return replace(verdict, integer=True, why="it is gone with the quantizers around it")
    if is_ort_mover(group.node) and (explanation := first_explanation(group)):
        return with_reason(verdict, explanation)
    return with_reason(verdict, (GONE, "no node runs it: it was computed beforehand, or merged with another", ""))
