"""The audit of OpenVINO: for each quantized layer of an ONNX file its kernel on the CPU, or why it is in float.

What runs is read from the graph that OpenVINO compiles, and is never predicted. The rules of openvino_rules.py then
give the reason why a layer stayed in float, and the fix; where no rule explains one, its verdict is `unknown`.
Only convolutions and matrix products are judged: OpenVINO computes sums and activations with the layer in front of
them. Some operations on integers (QLinearConv) it computes wrong, or not at all: their verdict names the rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from mezzotint.runtime.errors import InputError

from ..errors import ModelError
from ..graph.nodes import name_of
from .fusion import GONE, ISLAND, UNKNOWN, UNQUANTIZED, Fusion, LayerCounts, Verdict, load_graph, with_reason
from .groups import FusionGroup, groups
from .openvino_built import CompiledGraph, CompiledLayer, compiled_graph
from .openvino_match import LayerMatch, runs_on_integers
from .openvino_rules import fake_quantizer, why_float

MEASURED_OPENVINO = "2026.4.1"
"""The version that the rules were measured on."""


def audit_openvino(model: Path, *, threads: int | None = None, islands: Mapping[str, str] | None = None) -> Fusion:
    """Compile an ONNX file with OpenVINO and judge each of its convolutions and matrix products.

    `islands` gives the reasons why nodes are in float on purpose. Raises ModelError for a file that is missing, has
    functions of its own or layers of one name, InputError where OpenVINO is not installed, or refuses the file; its
    hint is then the first rule that the file breaks.
    """
    if not model.is_file():
        raise ModelError("no such file", where=str(model), hint="give an .onnx file, or a bundle's folder")
    file = load_graph(model)
    _check_names(file, model)
    try:
        compiled = compiled_graph(model, threads=threads)
    except InputError as error:
        if error.hint is None:
            error.hint = _first_fix(file)
        raise
    return judge_compiled(file, compiled, islands or {})


def _check_names(file: ir.Graph, model: Path) -> None:
    """Raise ModelError where two layers have one name: OpenVINO's graph tells its layers apart by their names only."""
    names = Counter(group.node.name for group in _layers(file) if group.node.name)
    name, count = next(iter(names.most_common(1)), ("", 0))
    if count > 1:
        raise ModelError(
            f"{count} layers are called {name!r}, and OpenVINO's graph tells layers apart by their names only",
            where=str(model),
            hint="give each node a name of its own, or none",
        )


def judge_compiled(file: ir.Graph, compiled: CompiledGraph, islands: Mapping[str, str]) -> Fusion:
    """Return verdicts on the layers of a file's graph, given the graph that OpenVINO compiled of it."""
    match = LayerMatch(file, compiled.layers)
    verdicts = tuple(_verdict(group, match.of(group.node), compiled.version, islands) for group in _layers(file))
    names = tuple(f"{layer.layer} {layer.names[0]}" for layer in match.strays)
    integer = sum(layer.integer for layer in match.strays)
    return Fusion(verdicts, names, compiled.version, LayerCounts(integer, len(names) - integer), "openvino")


def _layers(file: ir.Graph) -> list[FusionGroup]:
    return [group for group in groups(file, lambda _: "") if group.matrix or group.written]


def _verdict(group: FusionGroup, layer: CompiledLayer | None, version: str, islands: Mapping[str, str]) -> Verdict:
    verdict = Verdict(group.name, group.node.op_type, "", False, output=name_of(group.node.outputs[0]))
    if layer is None:
        return with_reason(verdict, (GONE, "no layer runs it: it was computed beforehand, or merged with another", ""))
    kernel = f"{layer.layer} {layer.primitive}".strip()
    verdict = replace(verdict, kernel=kernel, built=layer.names[0])
    if runs_on_integers(layer, group.node):
        return replace(verdict, integer=True)
    if verdict.name in islands:
        return with_reason(verdict, (ISLAND, islands[verdict.name], "none is needed: it is in float on purpose"))
    if not group.meant and not any(fake_quantizer(origin) for origin in group.data):
        return with_reason(verdict, _not_quantized(group))
    return with_reason(verdict, why_float(group) or _unexplained(kernel, version))


def _not_quantized(group: FusionGroup) -> tuple[str, str, str]:
    loose = next((name_of(s.value) for s in group.data if s.dequantizer is None), "")
    return (
        UNQUANTIZED,
        f"it is float in the file: {loose!r} is not quantized",
        "to run it on integers, quantize its activations and weights",
    )


def _unexplained(kernel: str, version: str) -> tuple[str, str, str]:
    return (
        UNKNOWN,
        f"no rule explains why OpenVINO {version.partition('-')[0]} runs it as {kernel}: the rules were measured on "
        f"{MEASURED_OPENVINO}",
        "compare it with a layer that runs on integers, and report it",
    )


def _first_fix(file: ir.Graph) -> str | None:
    """Return the first rule that a file breaks, operations on integers first: OpenVINO's errors name inner nodes."""
    broken = [(group, reason) for group in _layers(file) if group.meant and (reason := why_float(group))]
    if not broken:
        return None
    group, (rule, why, fix) = min(broken, key=lambda pair: not pair[0].written)
    others = len(broken) - 1
    return f"{group.name}: {why} ({rule}; {others} more layers break rules). {fix}"
