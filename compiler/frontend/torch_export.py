"""The export of a torch module: torch.export (an FX graph), then ONNX by the dynamo exporter."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir
import torch

from ..errors import ModelError
from ..graph.nodes import name_of
from ..graph.require import required
from .torch_example import Example, PositionalModel, quiet_exporter

OPSET = 21
OUTPUT = "out_sample"
_MOST_TOKENS = 1 << 14  # the range of lengths that torch proves an export for
_Axes = dict[str, dict[int, Any]]


def export_network(denoiser: PositionalModel, example: Example) -> tuple[ir.Model, str, list[str]]:
    """Return the ONNX model, the FX graph as text, and the parameters that the call does not read."""
    exported = _export_fx(denoiser, example)
    with quiet_exporter():
        program = torch.onnx.export(
            exported,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
            input_names=list(example.tensors),
            output_names=[OUTPUT],
        )
    model = required(program, "the ONNX program", "torch.onnx.export").model
    _name_lengths(model, example)
    return model, _readable(exported), _unread_parameters(exported, denoiser.model)


def _export_fx(denoiser: PositionalModel, example: Example) -> torch.export.ExportedProgram:
    """Export with open lengths, height and width or, where the model's arithmetic forbids that, the example's."""
    batch = torch.export.Dim("batch", max=63)
    height, width = torch.export.Dim("height", min=1, max=512), torch.export.Dim("width", min=1, max=512)
    sides = {
        name: {axis: factor * side for (axis, factor), side in zip(axes.items(), (height, width), strict=True)}
        for name, axes in example.spatial().items()
    }
    lengths = _open_lengths(example)
    tensors = tuple(example.tensors.values())
    error: Exception | None = None
    tried: list[_Axes] = []
    for length, side in ((lengths, sides), ({}, sides), (lengths, {}), ({}, {})):
        axes = {name: {**length.get(name, {}), **side.get(name, {})} for name in example.tensors}
        if axes in tried:
            continue
        tried.append(axes)
        shapes = tuple({0: batch, **axes[name]} for name in example.tensors)
        try:
            return torch.export.export(denoiser, tensors, dynamic_shapes=(shapes,), strict=False)
        except Exception as problem:  # torch.export reports failing guards by many kinds of errors
            error = problem
    raise ModelError(f"torch.export cannot trace the model: {str(error).splitlines()[0]}") from error


def _open_lengths(example: Example) -> _Axes:
    """Return the open length of each condition that has one, by the axis behind the batch."""
    named: dict[str, Any] = {}
    found: _Axes = {}
    for name, (length, more) in example.known.open_lengths.items():
        dim = named.setdefault(length, torch.export.Dim(length, min=1, max=_MOST_TOKENS))
        found[name] = {1: dim + more if more else dim}
    return found


def _name_lengths(model: ir.Model, example: Example) -> None:
    """Give open lengths their names, also where other dimensions are computed from them: torch calls them s0, s1."""
    inputs = {name_of(value): value for value in model.graph.inputs}
    names = {}
    for name, (length, more) in example.known.open_lengths.items():
        size = None if (value := inputs.get(name)) is None or value.shape is None else value.shape[1]
        if not more and isinstance(size, ir.SymbolicDim) and size.value is not None:
            names[size.value] = length
    if not names:
        return
    symbols = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, symbols, names) for size in value.shape])


def _renamed(size: int | ir.SymbolicDim, symbols: re.Pattern[str], names: dict[str, str]) -> int | str | None:
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return symbols.sub(lambda found: names[found[0]], size.value)


def _readable(exported: torch.export.ExportedProgram) -> str:
    """Return the FX graph as code, without the comments, which contain paths of this machine."""
    code = exported.graph_module.print_readable(print_output=False)
    return "\n".join(line.rstrip() for line in code.splitlines() if not line.lstrip().startswith("#")) + "\n"


def _unread_parameters(exported: torch.export.ExportedProgram, model: torch.nn.Module) -> list[str]:
    """Return the parameters of the model that the exported call does not read, by name."""
    signature = exported.graph_signature
    waiting = [node for node in exported.graph.nodes if node.op == "output" or _changes_its_input(node)]
    used: set[str] = set()
    while waiting:  # a layer may be called whose result nothing reads
        node = waiting.pop()
        if node.name not in used:
            used.add(node.name)
            waiting += node.all_input_nodes
    reached = {target for name, target in signature.inputs_to_parameters.items() if name in used}
    return [name for name, _ in model.named_parameters() if f"model.{name}" not in reached]


def _changes_its_input(node: torch.fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)
