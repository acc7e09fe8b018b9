"""Ray itself, which only a command with --cluster imports."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from mezzotint.runtime.errors import InputError


def ray_library() -> Any:
    """Return the module `ray`. Raises InputError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a run is sent to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default of later versions, and no warning
    try:
        return import_module("ray")
    except ImportError as error:
        raise InputError(
            f"a cluster needs Ray, which cannot be imported: {error}",
            where="--cluster",
            hint="pip install 'mezzotint[cluster]'",
        ) from error


def pinned(node: str) -> Any:
    """Return the strategy that lets a task run on this node and nowhere else."""
    strategies = import_module("ray.util.scheduling_strategies")
    return strategies.NodeAffinitySchedulingStrategy(node, soft=False)
