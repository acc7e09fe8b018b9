"""The fusion audit: for each quantized group of an ONNX file the kernel that onnxruntime built, or why there is none.

Which kernel runs a group is read from the graph that onnxruntime saved after all its optimizations; it is never
predicted. The rules of rules.py then give the reason why a group stayed in float, and the fix. Where no rule
explains a group, its verdict is `unknown`.

An integer kernel that computes something else than the file says (measured: a Gemm whose bias has another scale than
x_scale * w_scale, a weight whose scales run along the wrong axis), or that refuses to run, is no success: its verdict
is not `integer`, and names the rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mezzotint.runtime.session import running_version

from ..errors import ModelError
from ..graph.nodes import is_op, name_of
from .built import built_graph
from .groups import Group, called, groups, is_moving
from .match import Match, is_integer_kernel, moves_integers
from .rules import NO_KERNEL, first_explanation

ISLAND, UNQUANTIZED, GONE, UNKNOWN = "island", "not-quantized", "gone", "unknown"


@dataclass(frozen=True)
class Verdict:
    """What became of one node of a file.

    `name` is its name, or that of its first output; `op` what it is in the file; `kernel` the operation that runs it,
    "" when no node of the built graph does; `integer` whether that computes on, or moves, integers as the file says.
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
        """Whether integers were possible and meant, and onnxruntime computes in float (or nonsense).

        A norm between two integer layers reads and makes quantized data because its neighbours do: no failure.
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


@dataclass(frozen=True)
class Fusion:
    """The verdicts in the order of the file. `strays` are kernels of the built graph that no node of the file explains
    (parts of operations that onnxruntime takes apart)."""

    verdicts: tuple[Verdict, ...]
    strays: tuple[str, ...]
    onnxruntime: str

    @property
    def failed(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.failed)

    def of(self, name: str) -> Verdict | None:
        """The verdict on a node, by its name."""
        return next((v for v in self.verdicts if v.name == name), None)

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
            "onnxruntime": self.onnxruntime,
            "totals": self.totals,
            "rules": dict(sorted(Counter(v.rule for v in self.failed).items())),
            "strays": list(self.strays),
            "verdicts": [v.to_json() for v in self.verdicts],
        }


def audit_fusion(
    model: Path, folder: Path, *, threads: int | None = None, islands: Mapping[str, str] | None = None
) -> Fusion:
    """Build a session for an ONNX file and judge each of its quantized groups, and each layer that is in float.

    `folder` takes the built graph for a moment; `islands` says why nodes are in float on purpose. Raises ModelError for
    a file that is missing or has functions of its own, InputError for one that onnxruntime refuses, OutputError where
    the folder cannot be written.
    """
    if not model.is_file():
        raise ModelError("no such file", where=str(model), hint="give an .onnx file, or a bundle's folder")
    built = built_graph(model, folder, threads=threads)
    return judge(load_graph(model), built, islands or {})


def load_graph(model: Path) -> ir.Graph:
    """The graph of a file whose nodes can be found again in what onnxruntime builds. Raises ModelError."""
    read = ir.load(model)
    if read.functions:
        raise ModelError(
            f"the file has functions of its own ({next(iter(read.functions))[1]!r}), whose nodes onnxruntime renames",
            where=str(model),
            hint="inline them first: onnx.inliner.inline_local_functions",
        )
    return read.graph


def judge(file: ir.Graph, built: ir.Graph, islands: Mapping[str, str]) -> Fusion:
    """Verdicts on the groups of a file's graph, given the graph that onnxruntime built of it."""
    match = Match(file, built)

    def kernel_of(node: ir.Node) -> str:
        kernel = match.of(node)
        return "" if kernel is None else kernel.op_type

    verdicts = tuple(_verdict(group, match, islands) for group in groups(file, kernel_of))
    return Fusion(verdicts, tuple(f"{n.op_type} {called(n)}" for n in match.strays), running_version())


def _verdict(group: Group, match: Match, islands: Mapping[str, str]) -> Verdict:
    kernel = match.of(group.node)
    told = Verdict(group.name, group.node.op_type, "", False, output=name_of(group.node.outputs[0]))
    if kernel is None:
        return _gone(group, match, told)
    told = replace(told, kernel=kernel.op_type, built=name_of(kernel.outputs[0]))
    if is_integer_kernel(kernel) or (is_moving(group.node) and moves_integers(kernel)):
        said = None if group.written else first_explanation(group, broken=True)
        return _with(told, said) if said else replace(told, integer=True)
    if told.name in islands:
        return _with(told, (ISLAND, islands[told.name], "none is needed: it is in float on purpose"))
    if not group.meant:
        return _with(told, _unquantized(group))
    return _with(told, first_explanation(group) or _unknown(told))


def _with(told: Verdict, said: tuple[str, str, str]) -> Verdict:
    return replace(told, rule=said[0], why=said[1], fix=said[2])


def _unknown(told: Verdict) -> tuple[str, str, str]:
    return (
        UNKNOWN,
        f"no rule explains why onnxruntime {running_version()} runs it as {told.kernel}: "
        "the rules were measured on 1.31.1",
        "compare it with a group that is fused, and tell us",
    )


def _unquantized(group: Group) -> tuple[str, str, str]:
    loose = next((name_of(s.value) for s in group.data if s.dequantizer is None), "")
    return (
        UNQUANTIZED,
        f"it is float in the file: {loose!r} is not quantized",
        "quantize its activations and weights, and a convolution's output, if it shall run on integers",
    )


def _gone(group: Group, match: Match, told: Verdict) -> Verdict:
    """A node that nothing runs: a mover that was merged into a neighbour, or what onnxruntime computed beforehand."""
    makers = [match.makes(q.outputs[0]) for q, _ in group.readers.quantizers]
    if is_moving(group.node) and not any(is_op(maker, "QuantizeLinear") for maker in makers):
        return replace(told, integer=True, why="it is gone with the quantizers around it")
    if is_moving(group.node) and (said := first_explanation(group)):
        return _with(told, said)
    return _with(told, (GONE, "no node runs it: it was computed beforehand, or merged with another", ""))
