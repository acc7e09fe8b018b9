"""Conditions that another network computes at each call of a denoiser, such as the residuals of a ControlNet.

The rows of a batch stay as they are from call to call. A `ConditionNetwork` reads some of them, the sample and the
timestep, and gives the conditions that change:

    conditions of a call = rows without those of the network's own + compute(sample, timestep, its rows)

Under guidance it is called like the denoiser: with both halves, the unconditional one first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..signature import Images, Timestep

Conditions = Mapping[str, npt.NDArray[Any]]
"""Rows `[rows, ...]` of conditions, by name."""
Network = Callable[..., Images]
"""`network(x, timestep, **conditions) -> output`."""
Compute = Callable[[Images, Timestep, Conditions], Conditions]
"""`(sample float32 [B, ...], training timestep, rows [B, ...] by name) -> conditions [B, ...] by name`."""


@dataclass(frozen=True)
class OpenedFolder:
    """Where another process opens the same network: a component's folder, and what multiplies the outputs."""

    folder: Path
    scale: float


@dataclass(frozen=True, eq=False)
class ConditionNetwork:
    """A network that computes conditions of a denoiser.

    compute   the network
    outputs   the denoiser's conditions that it gives
    shared    the denoiser's conditions that it reads, too
    own       fixed conditions that it alone reads
    rows      arrays `[rows, ...]` of `own`, which images take in turn; a caller may give others
    digest    what tells it from other networks: caches and the settings of runs keep it
    opened_from   the folder that it was opened from; None for a function of this process

    The last call is kept, because two networks that are compared are called with the same sample one after the other.
    """

    compute: Compute
    outputs: tuple[str, ...]
    shared: tuple[str, ...] = ()
    own: tuple[str, ...] = ()
    rows: Conditions = field(default_factory=dict)
    digest: str = ""
    opened_from: OpenedFolder | None = None
    _last: list[tuple[Images, Timestep, Conditions, Conditions]] = field(default_factory=list, init=False, repr=False)

    def with_rows(self, rows: Conditions) -> ConditionNetwork:
        """Return the same network with other rows of its own conditions."""
        return replace(self, rows={**self.rows, **rows})

    def all_rows(self, conditions: Conditions) -> Conditions:
        """Return a caller's conditions with the rows of the network. Raises InputError for some that are missing or
        computed."""
        if computed := sorted(set(self.outputs) & set(conditions)):
            raise InputError(
                f"the condition {computed[0]!r} is given, and a network computes it at each call",
                hint=f"leave it out; the network reads {', '.join((*self.shared, *self.own)) or 'no rows'}",
            )
        rows = {**self.rows, **conditions}
        if missing := [name for name in self.own if name not in rows]:
            raise InputError(
                f"the network that computes {self.outputs[0]!r} reads {missing[0]!r}, of which there are no rows",
                hint=f"give an array [rows, ...] of that name beside the other conditions: {', '.join(self.own)}",
            )
        return rows

    def at(self, x: Images, t: Timestep, rows: Conditions) -> Conditions:
        """Return the denoiser's conditions of one call, for `x` `[B, ...]` at a timestep and rows `[B, ...]`.

        Raises InputError for rows that are missing, and for what the network should not give.
        """
        read = (*self.shared, *self.own)
        if missing := [name for name in read if name not in rows]:
            raise InputError(f"the network that computes {self.outputs[0]!r} reads {missing[0]!r}, which is missing")
        found = self._computed(x, t, {name: rows[name] for name in read})
        return {**{name: array for name, array in rows.items() if name not in self.own}, **found}

    def _computed(self, x: Images, t: Timestep, rows: Conditions) -> Conditions:
        for seen, time, given, kept in self._last:
            same = time == t and all(given[name] is array for name, array in rows.items())
            if same and np.array_equal(seen, x):
                return kept
        self._last.clear()  # before the call, which needs the memory
        found = {name: np.asarray(array) for name, array in self.compute(x, t, rows).items()}
        if set(found) != set(self.outputs):
            raise InputError(
                f"the network gave the conditions {', '.join(sorted(found)) or 'none'}",
                hint=f"it was to compute {', '.join(self.outputs)}",
            )
        for name, array in found.items():
            if array.ndim < 1 or len(array) != len(x):
                raise InputError(f"the computed condition {name!r} has shape {list(array.shape)} for {len(x)} samples")
        self._last[:] = [(x.copy(), t, rows, found)]
        return found

    def feeding(self, network: Network) -> Network:
        """Return a denoiser that is called with rows, and calls `network` with the conditions of the call."""
        return lambda x, t, **rows: network(x, t, **self.at(x, t, rows))


def call_conditions(network: ConditionNetwork | None, x: Images, t: Timestep, rows: Conditions) -> Conditions:
    """Return the conditions of one call: `network.at`, or the rows where nothing is computed."""
    return rows if network is None else network.at(x, t, rows)
