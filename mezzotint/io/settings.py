"""Values of the command line as data: --set, --input, --output, --size, --cost, and condition files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.errors import ConditionError, RecipeError, SignatureError
from mezzotint.compiler.yaml_text import parse_yaml
from mezzotint.runtime.bounds import MOST_LENGTH, MOST_SIDE
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import MOST_RANK, PREDICTIONS, TIMESTEP_UNITS, Prediction, TimestepUnit
from mezzotint.runtime.visible import visible

from .npz import read_npz

if TYPE_CHECKING:
    from mezzotint.runtime.engine import Engine


_NUMBERS = re.compile(r"(\w+)=([-+]?\d[\d.e+-]{0,30}(?:,[-+]?\d[\d.e+-]{0,30})*)")


def parse_settings(items: list[str]) -> dict[str, Any]:
    """Return settings of `pass.option=value` items. Values are YAML: numbers, true or false, [lists], text."""
    settings: dict[str, Any] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or "." not in key:
            raise RecipeError(f"not a setting: {item!r}", where="--set", hint="the form is pass.option=value")
        try:
            settings[key] = parse_yaml(value)
        except ValueError as error:
            raise RecipeError(
                f"not a value: {visible(value, 60)!r}: {error}", where=f"--set {key}", hint="write it as in YAML"
            ) from error
    return settings


def parse_roles(items: list[str]) -> dict[str, str]:
    """Return roles of `sample=x`, `timestep=t` items."""
    roles: dict[str, str] = {}
    for item in items:
        role, equals, name = item.partition("=")
        if not equals or not name:
            raise SignatureError(f"not a role: {item!r}", where="--input", hint="the form is --input timestep=NAME")
        roles[role] = name
    return roles


def parse_output(
    text: str | None, prediction: str | None, option: str = "--output"
) -> tuple[str | None, Prediction | None]:
    """Return (output name, prediction) of `epsilon=NAME` (or `v_prediction=`, `sample=`). `prediction` has priority.

    The front end checks the prediction's name.
    """
    if text is None:
        return None, cast("Prediction | None", prediction)
    role, equals, name = text.partition("=")
    if not equals or not name or role not in PREDICTIONS:
        place = "the bundle's folder is -o FOLDER" if option == "--output" else "the file to write is -o FILE"
        raise SignatureError(
            f"not an output: {text!r}",
            where=option,
            hint=f"the form is {option} epsilon=NAME ({', '.join(PREDICTIONS)}); {place}",
        )
    return name, cast("Prediction | None", prediction or (role if role != "epsilon" else None))


def parse_unit(text: str | None) -> TimestepUnit | None:
    """Return the unit of a network's timestep."""
    if text is not None and text not in TIMESTEP_UNITS:
        raise SignatureError(
            f"not a unit of timesteps: {text!r}",
            where="--timestep-unit",
            hint=f"use one of {', '.join(TIMESTEP_UNITS)}",
        )
    return cast("TimestepUnit | None", text)


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """Return the numbers of `HEIGHTxWIDTH`, or of the sizes of another sample: `LENGTH`, `FRAMESxHEIGHTxWIDTH`."""
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text):
        raise SignatureError(f"not a size: {text!r}", where="--size", hint="the form is 32x32")
    sides = text.split("x")
    if len(sides) >= MOST_RANK:
        raise SignatureError(f"not a size: {text!r}", where="--size", hint=f"the limit is {MOST_RANK - 1} numbers")
    most = MOST_SIDE if len(sides) > 1 else MOST_LENGTH
    if max(len(side) for side in sides) > len(str(most)) or max(map(int, sides)) > most:
        raise SignatureError(f"not a size: {text!r}", where="--size", hint=f"the limit of a side is {most}")
    return tuple(map(int, sides))


def parse_bundles(items: list[str]) -> list[str] | dict[str, str]:
    """Return the folders, or the folders by name where each is given as `NAME=FOLDER`."""
    named = {item: item.partition("=") for item in items if "=" in item and not Path(item).exists()}
    if not named:
        return items
    names = [name for name, _, _ in named.values()]
    if len(named) != len(items) or len(set(names)) != len(names):
        raise InputError(
            "some bundles have no name of their own", where=" ".join(items), hint="the form is NAME=FOLDER for each"
        )
    return {name: folder for name, _, folder in named.values()}


def parse_costs(items: list[str]) -> dict[str, float]:
    """Return costs by name of `NAME=NUMBER` items."""
    costs: dict[str, float] = {}
    for item in items:
        name, _, number = item.partition("=")
        try:
            costs[name] = float(number)
            if not math.isfinite(costs[name]):
                raise ValueError(number)
        except ValueError as error:
            raise InputError(f"not a cost: {item!r}", where="--cost", hint="the form is --cost NAME=0.5") from error
    return costs


def parse_engine(provider: str, options: list[str] | None, precision: str | None) -> Engine:
    """Return the engine of --provider, `KEY=VALUE` items, and --precision. Raises EngineError."""
    from mezzotint.runtime.errors import EngineError
    from mezzotint.runtime.providers.names import find_engine

    pairs: dict[str, str] = {}
    for item in options or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise EngineError(
                f"not an option: {visible(item, 60)!r}", where="--provider-option", hint="the form is KEY=VALUE"
            )
        if key in pairs:
            raise EngineError(f"{visible(key, 60)} is given twice", where="--provider-option", hint="give it once")
        pairs[key] = value
    return find_engine(provider, pairs, precision)  # type: ignore[arg-type]  # it refuses other precisions


def load_condition_files(*paths: Path | None) -> list[dict[str, npt.NDArray[Any]]]:
    """Return the arrays of each .npz file by name, none for an absent file. Raises ConditionError."""
    return [{} if path is None else load_conditions(path) for path in paths]


def load_conditions(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an .npz file by name, or that of `NAME=1,2,3`, one number a row. Raises ConditionError.

    Whole numbers are int64, as class labels are, others float32. Pickled objects are refused.
    """
    if (match := _NUMBERS.fullmatch(str(path))) is not None and not path.exists():
        numbers = match[2].split(",")
        try:
            return {match[1]: np.array([int(n) for n in numbers], np.int64)}
        except (ValueError, OverflowError):
            return {match[1]: np.array([float(n) for n in numbers], np.float32)}
    return read_npz(
        path, "the conditions", ConditionError, hint="write them with numpy.savez(FILE, name=array), or give NAME=1,2,3"
    )
