"""Which quantizers belong to which node of the compiled graph.

The manifest names sites by the values of the float graph. The compiled graph has other values beside those: `conv2d`
becomes `conv2d_integer`, `conv2d_quantized` and so on, and between a layer and the value that it is about may stand a
Reshape or a Transpose. So names are tried without such endings, and a layer looks back over nodes that only move or
rescale their input.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

INPUT, WEIGHT, OUTPUT = "input", "weight", "output"
_ENDING = re.compile(r"_[a-z]+$")
_PARAMETER = re.compile(r"_(scale|zero_point)(_[a-z]+)*$")  # of a quantizer, not what is quantized
_PASSIVE = frozenset(
    {"Reshape", "Transpose", "QuantizeLinear", "DequantizeLinear", "Cast", "Squeeze", "Unsqueeze", "Identity", "Slice"}
)
_STEPS = 6  # that a layer looks back
_ENDINGS = 3  # that a name may have


def quantizers_of(graph: Mapping[str, Any], sites: Sequence[str]) -> list[list[tuple[int, str]]]:
    """For each node of the page's graph [(row of the manifest's quantizers, input, weight or output), ...]."""
    values, nodes = graph["values"], graph["nodes"]
    views: defaultdict[str, list[int]] = defaultdict(list)
    plain: dict[str, int] = {}
    for row, site in enumerate(sites):
        value, _, consumer = site.partition(" -> ")
        if consumer:
            views[consumer].append(row)
        plain.setdefault(value, row)
    constants = _constants(graph)
    found = []
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
        found.append(sorted(rows.items(), key=lambda item: (order.index(item[1]), item[0])))
    return found


def _names(value: str) -> Iterator[str]:
    """The value's name, and what it may have been called before."""
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
    """Values that no input of the graph has a part in: weights, and weights that were dequantized."""
    found = {v for v, (_, _, maker) in enumerate(graph["values"]) if maker < 0} - set(graph["inputs"])
    for node in graph["nodes"]:
        if found.issuperset(value for value in node["in"] if value >= 0):
            found.update(node["out"])
    return found


def _behind(
    value: int, graph: Mapping[str, Any], plain: Mapping[str, int], constants: set[int]
) -> Iterator[tuple[int, str]]:
    """What quantizes a layer's input: the nearest value behind it that has a quantizer."""
    for _ in range(_STEPS):
        name, _, maker = graph["values"][value]
        if row := list(_row(name, plain)):
            yield row[0], WEIGHT if value in constants else INPUT
            return
        if maker < 0 or graph["nodes"][maker]["op"] not in _PASSIVE:
            return
        value = graph["nodes"][maker]["in"][0]
