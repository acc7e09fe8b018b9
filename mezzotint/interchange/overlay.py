"""What is known of each node of a bundle, as node data that Google's Model Explorer lays over its drawing.

    model-explorer BUNDLE/unet/model.onnx --node_data_paths=FILE.json --extensions=model_explorer_onnx

A file is {graph: {"name", "results": {node: {"value", "bgColor"}}, "gradient" | nothing}}: the classes ModelNodeData,
GraphNodeData and NodeDataResult of ai-edge-model-explorer 0.1.34, written by hand. The adapter for ONNX
(model-explorer-onnx) calls a graph by the graph's name in the file, and a node by the node's.

    precision  words: the format of a layer's weights, or that it is in float or an island; of the rest, what it makes
    kernel     words: what onnxruntime made of a layer, as the compiler's audit found it
    scale      numbers: the widest scale of a quantized value over timesteps and channels, at who makes its integers
    time       numbers: milliseconds in one call, by onnxruntime's profiler
    cost       numbers: the part of all layers' costs at the output, of `mezzotint debug --json`

Words have a colour each, numbers a gradient between the smallest and the largest. onnxruntime fuses nodes and names the
result after one of them: times are of the nodes whose names it kept, and `unknown` tells how much is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError

What = Literal["precision", "kernel", "scale", "time", "cost"]
Value = str | float
OVERLAY_CALLS = 8
_GRADIENT = ({"stop": 0, "bgColor": "#ffffff"}, {"stop": 1, "bgColor": "#d9480f"})
_COLOURS = ("#a5d8ff", "#b2f2bb", "#ffec99", "#d0bfff", "#99e9f2", "#fcc2d7", "#eebefa", "#c0eb75")
_FLOAT, _ISLAND, _DATA = "#ffc9c9", "#ffd8a8", "#f1f3f5"
_STORED = {"INT8": "int8 data", "UINT8": "uint8 data", "FLOAT": "float data", "FLOAT16": "float16 data"}


@dataclass(frozen=True)
class Overlay:
    """`data` is the file; `nodes` how many nodes have a value, `of` how many there are; `unknown` what is missing."""

    data: dict[str, Any]
    nodes: int
    of: int
    unknown: str = ""


def make_overlay(bundle: Bundle, what: What, *, debug: Path | None = None, threads: int | None = None) -> Overlay:
    """The node data of a bundle's (first) network. `debug` is the output of `mezzotint debug --json`, for `cost`.

    Raises InputError for what is not known, for `cost` without such a file, and for a file of another bundle.
    """
    if what not in get_args(What):
        raise InputError(
            f"no overlay is called {what!r}", where="--what", hint=f"use one of {', '.join(get_args(What))}"
        )
    import onnx_ir as ir

    graph = ir.load(bundle.model_path).graph
    unknown = ""
    values: dict[str, Value]
    if what == "precision":
        values = _precisions(bundle, graph)
    elif what == "kernel":
        values = {name: row["kernel"] for name, row in bundle.manifest["kernels"]["layers"].items()}
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
            f"nothing is known of the {what} of any node of this network",
            where=str(debug or bundle.path),
            hint="is the file of another bundle?" if debug else "`mezzotint inspect` says what is known",
        )
    data: dict[str, Any] = {"name": f"mezzotint: {what}", "results": _results(bundle, kept)}
    if not isinstance(next(iter(kept.values())), str):
        data["gradient"] = list(_GRADIENT)
    return Overlay({graph.name or "": data}, len(kept), len(known), unknown)


def _results(bundle: Bundle, values: Mapping[str, Value]) -> dict[str, dict[str, Any]]:
    """Words with their colours: layers in float stand out, the rest takes turns."""
    words = sorted({value for value in values.values() if isinstance(value, str)})
    layers = bundle.manifest["kernels"]["layers"]
    floating = {str(values[n]) for n, row in layers.items() if n in values and not row["integer"]}
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
    """Layers by the width of their weights; everything else by the type of what it makes, where the file says it."""
    manifest = bundle.manifest
    formats = {  # of weights: activations are unsigned
        q["site"].partition(" -> ")[0]: ("mixed widths" if q.get("row_bits") else str(q["format"]))
        for q in manifest["quantizers"]
        if not str(q["format"]).startswith("u")
    }
    found: dict[str, Value] = {}
    for node in graph:
        dtype = node.outputs[0].dtype
        if node.name and dtype is not None and dtype.name in _STORED:
            found[node.name] = _STORED[dtype.name]
    weights = _weights(graph, formats)
    for name, row in manifest["kernels"]["layers"].items():
        if row["integer"]:
            found[name] = weights.get(name, "integer")
        else:
            why = str(row.get("why", ""))
            found[name] = why.partition(":")[0] if why.startswith("island") else "float"
    return found


def _weights(graph: Any, formats: Mapping[str, str]) -> dict[str, str]:
    """The format of each layer's weight: the lowered graph names it after the quantizer's site."""
    found: dict[str, str] = {}
    for node in graph:
        for value in node.inputs:
            seen = value
            while seen is not None and seen.producer() is not None and not seen.is_initializer():
                above = seen.producer()
                # Past what reads a packed or dequantized constant: all its inputs are constants.
                if not all(v is None or v.is_initializer() or _constant(v) for v in above.inputs):
                    break
                seen = above.inputs[0]
            name = "" if seen is None or not seen.is_initializer() else str(seen.name)
            site = max((s for s in formats if name == s or name.startswith(f"{s}_")), key=len, default=None)
            if site is not None and node.name:
                found.setdefault(node.name, formats[site])
    return found


def _constant(value: Any) -> bool:
    producer = value.producer()
    return producer is not None and all(v is None or v.is_initializer() or _constant(v) for v in producer.inputs)


def _scales(bundle: Bundle, graph: Any) -> dict[str, Value]:
    """At the QuantizeLinear that reads a value, or the integer layer that makes one."""
    widest = {}
    for quantizer in bundle.manifest["quantizers"]:
        scale = quantizer["scale"]
        widest[quantizer["site"].partition(" -> ")[0]] = max(scale) if isinstance(scale, list) else scale
    found: dict[str, Value] = {}
    for node in graph:
        if node.op_type == "QuantizeLinear":
            site = node.inputs[0].name
        else:
            site = (node.outputs[0].name or "").removesuffix("_integer")
            if node.op_type not in ("QLinearConv", "Conv"):
                continue
        if site in widest and node.name:
            found[node.name] = widest[site]
    return found


def _times(bundle: Bundle, graph: Any, threads: int | None) -> tuple[dict[str, Value], str]:
    """Milliseconds by node, medians over the calls, and the part of the time that belongs to no node of the file."""
    from ..bench.bench import make_conditions, profile
    from ..bench.trace import node_seconds

    net = bundle.denoiser(threads)
    batch = net.fixed_batch or 1
    rows = {name: array for name, (array, _) in make_conditions(net, bundle, batch).items()}
    spent = node_seconds(profile(bundle, batch, rows, threads, OVERLAY_CALLS))
    total, found = sum(spent.values()), dict[str, Value]()
    for node in graph:
        # onnxruntime calls some nodes like what they make.
        times = [spent.pop(name) for name in {node.name, *(v.name for v in node.outputs)} if name in spent]
        if times and node.name:
            found[node.name] = sum(times) * 1e3
    return found, f"{sum(spent.values()) / total:.1%} of the time belongs to nodes that onnxruntime made by itself"


def _costs(file: Path | None) -> dict[str, Value]:
    if file is None:
        raise InputError(
            "the cost of a layer has to be measured first",
            where="--what cost",
            hint="`mezzotint debug BUNDLE --reference FLOAT.onnx --json > debug.json`, then --layers debug.json",
        )
    try:
        layers = json.loads(file.read_text(encoding="utf-8"))["layers"]
        return {str(row["layer"]): float(row["share"]) for row in layers}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"this is not what `mezzotint debug --json` prints: {type(error).__name__} {error}",
            where=str(file),
            hint="write it again with --json",
        ) from error
