"""The quantizers of each node of the compiled graph.

The manifest names sites by the values of the float graph. The compiled graph has derived values as well: `conv2d`
becomes `conv2d_integer`, `conv2d_quantized` and so on, and a Reshape or a Transpose may separate a layer from its
quantized input. So names are also tried without such endings, and the search for a layer's input passes over nodes that
only move or rescale it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

INPUT, WEIGHT, OUTPUT = "input", "weight", "output"
_ENDING = re.compile(r"_[a-z]+$")
_PARAMETER = re.compile(r"_(scale|zero_point)(_[a-z]+)*$")  # a parameter of a quantizer, not a quantized value
_PASSIVE = frozenset(
    {"Reshape", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast", "Squeeze", "Unsqueeze", "Identity", "Slice"}
)
_STEPS = 6  # nodes that the search for a layer's input passes over
_ENDINGS = 3  # endings that a name may have


def quantizers_of(graph: Mapping[str, Any], sites: Sequence[str]) -> list[list[tuple[int, str]]]:
    """Return for each node of the page's graph [(row of the manifest's quantizers, input, weight or output), ...]."""
    values, nodes = graph["values"], graph["nodes"]
    views: defaultdict[str, list[int]] = defaultdict(list)
    plain: dict[str, int] = {}
    for row, site in enumerate(sites):
        value, _, consumer = site.partition(" -> ")
        if consumer:
            views[consumer].append(row)
        plain.setdefault(value, row)
    constants = _constants(graph)
    quantizers = []
    for node in nodes:
        rows: dict[int, str] = {}
        for value in node["out"]:
            for row in _row(values[value][0], plain):
                rows[row] = OUTPUT
        inputs = [value for value in node["in"] if value >= 0]
        for value in inputs:
            for row in _row(values[value][0], plain):
                rows.setdefault(row, WEIGHT if value in constants else INPUT)
        layer = graph["kinds"][node["kind"]] in ("integer", "island", "unfused")
        if layer:
            rows = {row: role for value in inputs for row, role in _behind(value, graph, plain, constants)} | rows
        for row in views.get(node["name"], ()):
            outputs = {name for value in node["out"] for name in _names(values[value][0])}
            rows[row] = OUTPUT if sites[row].partition(" -> ")[0] in outputs else INPUT
        order = (INPUT, WEIGHT, OUTPUT)
        quantizers.append(sorted(rows.items(), key=lambda item: (order.index(item[1]), item[0])))
    return quantizers


def _names(value: str) -> Iterator[str]:
    """Yield the value's name, and the names it may be derived from."""
    yield value
    if _PARAMETER.search(value):
        return
    for _ in range(_ENDINGS):
        shorter = _ENDING.sub("", value)
        if shorter == value or not shorter:
            return
        value = shorter
        yield value


def _row(value: str, plain: Mapping[str, int]) -> Iterator[int]:
    yield from (plain[name] for name in [next((n for n in _names(value) if n in plain), "")] if name)


def _constants(graph: Mapping[str, Any]) -> set[int]:
    """Return the values that depend on no input of the graph: weights, and dequantized weights."""
    constants = {v for v, (_, _, maker) in enumerate(graph["values"]) if maker < 0} - set(graph["inputs"])
    for node in graph["nodes"]:
        if constants.issuperset(value for value in node["in"] if value >= 0):
            constants.update(node["out"])
    return constants


def _behind(
    value: int, graph: Mapping[str, Any], plain: Mapping[str, int], constants: set[int]
) -> Iterator[tuple[int, str]]:
    """Yield the quantizer of a layer's input: that of the nearest value before it that has one."""
    for _ in range(_STEPS):
        name, _, maker = graph["values"][value]
        if row := list(_row(name, plain)):
            yield row[0], WEIGHT if value in constants else INPUT
            return
        if maker < 0 or graph["nodes"][maker]["op"] not in _PASSIVE:
            return
        value = graph["nodes"][maker]["in"][0]
