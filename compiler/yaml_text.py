"""YAML of recipes and settings, read with bounds: aliases and long numbers can make a small text stand for gigabytes.

The events of the text are counted before any value is made. An alias counts as all that it repeats.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.json_text import LARGEST_INTEGER, read_text

MOST_YAML_BYTES = 1 << 20
MOST_NODES = 20_000
DEEPEST_YAML = 40
LONGEST_NUMBER = 64  # characters
# What PyYAML raises for values that do not fit their tag: `!!int x`, `!!timestamp x`, `2026-99-99`, `? [a]`.
_WRONG_VALUES = (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError)


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """A loader without keys that are there twice, numbers that are not finite, and integers above 64 bits.

    `2:4` is text: YAML 1.1 reads it as minutes and seconds, YAML 1.2 does not.
    """

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        return _TEXT if tag in _NUMBERS and kind is yaml.ScalarNode and ":" in value else tag

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [key for key, number in keys.items() if number > 1]:
            raise ValueError(f"the key {twice[0]!r} is there twice, in the mapping at line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep=deep)

    def construct_yaml_int(self, node: Any) -> Any:
        _check_length(node)
        value: int = super().construct_yaml_int(node)
        if abs(value) >= LARGEST_INTEGER:
            raise ValueError(f"the integer {node.value} has more than 64 bits")
        return value

    def construct_yaml_float(self, node: Any) -> Any:
        _check_length(node)
        value: float = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise ValueError(f"the number {node.value} is not finite")
        return value


_Loader.add_constructor(_NUMBERS[0], _Loader.construct_yaml_int)
_Loader.add_constructor(_NUMBERS[1], _Loader.construct_yaml_float)


def read_yaml(path: Path, what: str, error: type[MezzotintError]) -> Any:
    """Return the data of a YAML file. Raise `error` for a file that is no YAML or that passes a bound."""
    text = read_text(path, what, error, most=MOST_YAML_BYTES)
    try:
        return parse_yaml(text)
    except ValueError as failure:
        raise error(f"{what} is not valid YAML: {failure}", where=str(path)) from failure


def parse_yaml(text: str) -> Any:
    """Return the data of a YAML text. Raise ValueError for what is no YAML, and for what passes a bound."""
    if len(text) > MOST_YAML_BYTES:
        raise ValueError(f"it has more than {MOST_YAML_BYTES} characters")
    try:
        _check_size(text)
        return yaml.load(text, Loader=_Loader)  # a subclass of SafeLoader
    except yaml.YAMLError as failure:
        raise ValueError(str(failure)) from failure
    except _WRONG_VALUES as failure:
        if isinstance(failure, ValueError):
            raise
        raise ValueError(f"a value does not fit its tag ({type(failure).__name__}: {failure})") from failure


def _check_size(text: str) -> None:
    """Raise ValueError for a text that is nested too deep or stands for too many values."""
    sizes: dict[str, int] = {}  # anchor -> the values below it
    open_nodes: list[tuple[str | None, int]] = []  # the anchor of each open list or mapping, and the count before it
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"the alias {event.anchor!r} repeats nothing, or what contains it")
            count += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            event.value.encode()  # raises for half of a surrogate pair
            if event.anchor is not None:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count + 1 - before
        count += isinstance(event, yaml.NodeEvent)
        if len(open_nodes) > DEEPEST_YAML:
            raise ValueError(f"it is nested deeper than {DEEPEST_YAML} levels")
        if count > MOST_NODES:
            raise ValueError(f"it stands for more than {MOST_NODES} values (aliases count as what they repeat)")


def _check_length(node: Any) -> None:
    if len(str(node.value)) > LONGEST_NUMBER:
        raise ValueError(f"the number {str(node.value)[:12]}... has {len(node.value)} characters")
