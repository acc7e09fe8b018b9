"""The conditions of a page: rows to choose from, in the form in which its networks take them.

All images of a run have the chosen row. Under guidance a call has two halves, the unconditional one first, as in
runtime/sampling/guidance.py.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.guidance import Conditions, checked_rows, doubled_conditions
from mezzotint.runtime.session import Denoiser

from .networks import TIME_TYPES

MOST_CHOICES = 1000
MOST_CONDITION_BYTES = 16_000_000
"""The rows are in the page itself, as text that is a third longer."""


def conditions_json(
    bundle: Bundle, given: Conditions, unconditional: Conditions, networks: Sequence[Denoiser]
) -> dict[str, Any] | None:
    """Return `{"choices": [label, ...], "inputs": [...]}`, or None for a bundle without conditions.

    An input has `name`, `type`, `size` (of one row), `rows` (base64) and `shared`, the rank of an input that has one
    row for all images, else null; under guidance `unconditional` (base64), where it differs. Raises InputError for rows
    that are missing or that a network does not take.
    """
    signature, guided = bundle.signature, bundle.deployment.guided
    where = str(bundle.path)
    rows = checked_rows(given)
    if set(rows) != set(signature.conditions):
        raise InputError(
            f"the network takes the conditions {sorted(signature.conditions)}, and {sorted(rows)} were given",
            where=where,
            hint="--conditions FILE.npz has an array [rows, ...] of each" if signature.conditions else None,
        )
    if unconditional and not guided:
        raise InputError("unconditional rows were given, and the bundle is deployed without guidance", where=where)
    count = max((len(array) for array in rows.values()), default=0)
    uneven = [name for name, array in rows.items() if len(array) not in (1, count)]
    if uneven or count > MOST_CHOICES:
        raise InputError(
            f"{count} rows to choose from" + (f", and {len(rows[uneven[0]])} of {uneven[0]!r}" if uneven else ""),
            where=where,
            hint=f"give each condition one row, or as many as there are choices, at most {MOST_CHOICES}",
        )
    rows = {name: np.repeat(array, count // len(array), axis=0) for name, array in rows.items()}
    other = checked_rows(unconditional, "unconditional")
    if guided:
        doubled_conditions({name: array[:1] for name, array in rows.items()}, other)
    if sum(array.nbytes for array in rows.values()) > MOST_CONDITION_BYTES:
        raise InputError("the conditions are too large for a page", where=where, hint="offer fewer rows")
    inputs = [_input(name, array, other.get(name), networks, guided) for name, array in rows.items()]
    return {"choices": _labels(rows, count), "inputs": inputs} if inputs else None


def _input(
    name: str,
    rows: npt.NDArray[Any],
    unconditional: npt.NDArray[Any] | None,
    networks: Sequence[Denoiser],
    guided: bool,
) -> dict[str, Any]:
    shared = {_shared(name, rows, network) for network in networks}
    if len(shared) > 1:
        raise InputError(f"the networks take {name!r} in different forms", hint="leave the float model out")
    if guided and shared != {None}:
        raise InputError(f"the network takes one {name!r} for all images, and guidance needs two")
    parts = {"unconditional": _text(unconditional)} if unconditional is not None else {}
    size = list(rows.shape[1:])
    return {"name": name, "type": rows.dtype.name, "size": size, "rows": _text(rows), "shared": shared.pop(), **parts}


def _shared(name: str, rows: npt.NDArray[Any], network: Denoiser) -> int | None:
    """Return the rank of an input of one row, else None. Raises InputError for rows that do not fit it."""
    dtype, shape = network.inputs[name]
    sizes = zip(shape[1:], rows.shape[1:], strict=False)
    fits = rows.ndim == max(len(shape), 1) and all(not isinstance(n, int) or n == own for n, own in sizes)
    if dtype != rows.dtype or not fits or rows.dtype.name not in TIME_TYPES:
        raise InputError(
            f"condition {name!r} has rows of {rows.dtype} {list(rows.shape[1:])}, the input is {dtype} {list(shape)}",
            hint=f"a page can make {', '.join(TIME_TYPES)}",
        )
    return len(shape) if not shape or shape[0] == 1 else None


def _labels(rows: dict[str, npt.NDArray[Any]], count: int) -> list[str]:
    """Return what the page calls each choice: the whole numbers in it, such as a class, else its place."""
    whole = {name: array for name, array in rows.items() if array.ndim == 1 and array.dtype.kind == "i"}
    return [", ".join(f"{name} {array[i]}" for name, array in whole.items()) or f"row {i + 1}" for i in range(count)]


def _text(array: npt.NDArray[Any]) -> str:
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    return base64.b64encode(little.tobytes()).decode("ascii")
