"""Bounds of a model file, checked before anything runs it. A variable of the environment raises each."""

from __future__ import annotations

import os

from ..errors import ModelError

LIMITS = {
    "nodes": 50_000,  # with the nodes of functions and branches, each as often as it is written or called
    "operations": 1_000_000,  # of one call of the network: nodes, with the turns of loops
    "depth": 16,  # of subgraphs and functions in each other
    "rank": 32,
    "values": 1 << 31,  # numbers in one tensor
    "constants": 1 << 26,  # numbers in one tensor that is computed from constants alone
}


def variable(name: str) -> str:
    """Return the variable of the environment for a limit, such as MEZZOTINT_MAX_NODES."""
    return f"MEZZOTINT_MAX_{name.upper()}"


def limit(name: str) -> int:
    """Return a limit: that of the environment, or of LIMITS. Raises ModelError for one that is not a number."""
    text = os.environ.get(variable(name), "")
    if not text:
        return LIMITS[name]
    if not text.isdecimal() or len(text) > 18 or int(text) < 1:
        raise ModelError(
            f"the limit {text[:40]!r} is not a positive integer", where=f"the environment variable {variable(name)}"
        )
    return int(text)


def check_limit(name: str, size: int, what: str, where: str) -> None:
    """Raise ModelError where `size` is above a limit. `what` says what has that size."""
    most = limit(name)
    if size > most:
        raise ModelError(
            f"{what}: {_short(size)}, and the limit is {most}",
            where=where,
            hint=f"check that the file is what you expect; {variable(name)} in the environment raises the limit",
        )


def _short(size: int) -> str:
    return str(size) if size < 10**18 else "more than 10^18"
