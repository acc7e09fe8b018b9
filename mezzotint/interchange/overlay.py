"""Facts about each node of a bundle, as node data that Google's Model Explorer shows in its drawing.

    model-explorer BUNDLE/unet/model.onnx --node_data_paths=FILE.json --extensions=model_explorer_onnx

A file is {graph: {"name", "results": {node: {"value", "bgColor"}}, "gradient" | nothing}}: the classes ModelNodeData,
GraphNodeData and NodeDataResult of ai-edge-model-explorer 0.1.34, written by hand. The adapter for ONNX
(model-explorer-onnx) identifies graphs and nodes by their names in the file.

    precision  words: the format of a layer's weights, float, or island; for other nodes the type of their output
    kernel     words: the kernel of a layer, as found by the compiler's audit
    scale      numbers: the widest scale of a quantized value over timesteps and channels, at the node that rounds it
    time       numbers: milliseconds in one call, by onnxruntime's profiler
    cost       numbers: the share of all layers' costs at the output, of `mezzotint debug --json`

Each word has a colour, numbers a gradient from the smallest to the largest. onnxruntime fuses nodes and names the
result after one of them: times are those of the nodes whose names it kept, and `unknown` has the share that is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import read_json

What = Literal["precision", "kernel", "scale", "time", "cost"]
Value = str | float
OVERLAY_CALLS = 8
_GRADIENT = ({"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#d9480f"})
_COLOURS = ("#a5d8ff", "#b2f2bb", "#ffec99", "#d0bfff", "#99e9f2", "#fcc2d7", "#eebefa", "#c0eb75")
_FLOAT, _ISLAND, _DATA = "#ffc9c9", "#ffd8a8", "#f1f3f5"
_STORED = {"INT8": "int8 data", "UINT8": "uint8 data", "FLOAT": "float data", "FLOAT16": "float16 data"}


@dataclass(frozen=True)
class Overlay:
    """Node data as JSON. `nodes` of `of` nodes have a value; `unknown` describes the rest."""

    data: dict[str, Any]
    nodes: int
    of: int
    unknown: str = ""


def make_overlay(bundle: Bundle, what: What, *, debug: Path | None = None, threads: int | None = None) -> Overlay:
    """Return the node data of a bundle's (first) network. `debug` is the output of `mezzotint debug --json` for `cost`.

    Raises InputError for an unknown overlay, for `cost` without such a file, and for a file of another bundle.
    """
    if what not in get_args(What):
        raise InputError(
            f"no overlay is called {what!r}", where="--what", hint=f"use one of {', '.join(get_args(What))}"
        )
    from mezzotint.compiler.graph.model_file import read_model

    graph = read_model(bundle.model_path).graph
    unknown = ""
    values: dict[str, Value]
    if what == "precision":
        values = _precisions(bundle, graph)
    elif what == "kernel":
        values = {name: layer.kernel for name, layer in bundle.manifest.kernels.layers.items()}
    elif what == "scale":
        values = _scales(bundle, graph)
    elif what == "time":
        values, unknown = _times(bundle, graph, threads)
    else:
        values = _costs(debug)
    known = {node.name for node in graph if node.name}
    kept = {name: value for name, value in values.items() if name in known}
    if not kept:
        raise InputError(
            f"no node of this network has a known {what}",
            where=str(debug or bundle.path),
            hint="the file may be of another bundle" if debug else "`mezzotint inspect` prints the known facts",
        )
    data: dict[str, Any] = {"name": f"mezzotint: {what}", "results": _results(bundle, kept)}
    if not isinstance(next(iter(kept.values())), str):
        data["gradient"] = list(_GRADIENT)
    return Overlay({graph.name or "": data}, len(kept), len(known), unknown)


def _results(bundle: Bundle, values: Mapping[str, Value]) -> dict[str, dict[str, Any]]:
    """Return the values with colours: reserved ones for layers in float, and the palette in turn for other words."""
    words = sorted({value for value in values.values() if isinstance(value, str)})
    layers = bundle.manifest.kernels.layers
    floating = {str(values[n]) for n, layer in layers.items() if n in values and not layer.integer}
    colours = {}
    for word in words:
        if word in _STORED.values():
            colours[word] = _DATA
        elif word in floating:
            colours[word] = _ISLAND if word.startswith("island") else _FLOAT
        else:
            colours[word] = _COLOURS[len([c for c in colours.values() if c in _COLOURS]) % len(_COLOURS)]
    return {
        name: {"value": value, "bgColor": colours[value]} if isinstance(value, str) else {"value": float(value)}
        for name, value in values.items()
    }


def _precisions(bundle: Bundle, graph: Any) -> dict[str, Value]:
    """Return the weight format of layers, and for other nodes the type of their output where the file has it."""
    manifest = bundle.manifest
    formats = {  # of weights: activations are unsigned
        q.value: (
            "mixed widths" if q.row_bits else f"{q.levels} levels" if q.levels else "vectors" if q.vectors else q.format
        )
        for q in manifest.quantizers
        if not q.format.startswith("u")
    }
    words: dict[str, Value] = {}
    for node in graph:
        dtype = node.outputs[0].dtype
        if node.name and dtype is not None and dtype.name in _STORED:
            words[node.name] = _STORED[dtype.name]
    weights = _weights(graph, formats)
    for name, layer in manifest.kernels.layers.items():
        if layer.integer:
            words[name] = weights.get(name, "integer")
        else:
            why = layer.why
            words[name] = why.partition(":")[0] if why.startswith("island") else "float"
    return words


def _weights(graph: Any, formats: Mapping[str, str]) -> dict[str, str]:
    """Return the format of each layer's weight: the lowered graph names it after the quantizer's site."""
    formats_of: dict[str, str] = {}
    for node in graph:
        for value in node.inputs:
            source = value
            while source is not None and source.producer() is not None and not source.is_initializer():
                above = source.producer()
                # Pass the nodes that unpack or dequantize a constant: all their inputs are constants.
                if not all(v is None or v.is_initializer() or _constant(v) for v in above.inputs):
                    break
                source = above.inputs[0]
            name = "" if source is None or not source.is_initializer() else str(source.name)
            site = max((s for s in formats if name == s or name.startswith(f"{s}_")), key=len, default=None)
            if site is not None and node.name:
                formats_of.setdefault(node.name, formats[site])
    return formats_of


def _constant(value: Any) -> bool:
    producer = value.producer()
    return producer is not None and all(v is None or v.is_initializer() or _constant(v) for v in producer.inputs)


def _scales(bundle: Bundle, graph: Any) -> dict[str, Value]:
    """Return the widest scale of each QuantizeLinear, and of each integer layer with a quantized output."""
    widest = {}
    for quantizer in bundle.manifest.quantizers:
        scale = quantizer.scale
        widest[quantizer.value] = max(scale) if isinstance(scale, tuple) else scale
    scales: dict[str, Value] = {}
    for node in graph:
        if node.op_type == "QuantizeLinear":
            site = node.inputs[0].name
        else:
            site = (node.outputs[0].name or "").removesuffix("_integer")
            if node.op_type not in ("QLinearConv", "Conv"):
                continue
        if site in widest and node.name:
            scales[node.name] = widest[site]
    return scales


def _times(bundle: Bundle, graph: Any, threads: int | None) -> tuple[dict[str, Value], str]:
    """Return the milliseconds of each node, medians over the calls, and a note on the time of other nodes."""
    from ..bench.bench import make_conditions, profile
    from ..bench.trace import node_seconds

    net = bundle.denoiser(threads)
    batch = net.fixed_batch or 1
    rows = {name: array for name, (array, _) in make_conditions(net, bundle, batch).items()}
    spent = node_seconds(profile(bundle, batch, rows, threads, OVERLAY_CALLS))
    total, milliseconds = sum(spent.values()), dict[str, Value]()
    for node in graph:
        # onnxruntime names some nodes after their outputs.
        seconds = [spent.pop(name) for name in {node.name, *(v.name for v in node.outputs)} if name in spent]
        if seconds and node.name:
            milliseconds[node.name] = sum(seconds) * 1e3
    return milliseconds, f"{sum(spent.values()) / total:.1%} of the time belongs to nodes that onnxruntime added"


def _costs(file: Path | None) -> dict[str, Value]:
    if file is None:
        raise InputError(
            "the cost of a layer must be measured first",
            where="--what cost",
            hint="`mezzotint debug BUNDLE --reference FLOAT.onnx --json > debug.json`, then --layers debug.json",
        )
    data = read_json(file, "the output of `mezzotint debug --json`", InputError)
    try:
        return {str(row["layer"]): float(row["share"]) for row in data["layers"]}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"this is not the output of `mezzotint debug --json`: {type(error).__name__} {error}",
            where=str(file),
            hint="write it again with --json",
        ) from error
