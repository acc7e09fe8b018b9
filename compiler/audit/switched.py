"""The graph of side_by_side.py as a network whose layers are quantized one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.session import Level
from mezzotint.runtime.signature import Images, Signature, Timestep

from ..core.execute import Executor, NetworkSession, feeds
from ..core.pipeline import Context
from .side_by_side import PairedLayer, SideBySide
from .suggestions import Facts

JOINT_LEVEL: Level = "basic"
"""Fusion on a tapped quantized graph might select kernels that the bundle does not use."""


class SwitchedNetwork:
    """The session of the joint graph, a context manager.

    `switched` are the layers to quantize in the next call, `values` the taps of the last one.
    """

    def __init__(self, groups: Mapping[str, PairedLayer], signature: Signature, session: NetworkSession) -> None:
        self.groups, self._signature, self._session = groups, signature, session
        self.taps = {name: group.taps for name, group in groups.items()}
        self.switched: Sequence[str] = ()
        self.values: dict[str, npt.NDArray[Any]] = {}

    @classmethod
    def of(cls, compared: SideBySide, signature: Signature, context: Context) -> SwitchedNetwork:
        """Open the joint graph."""
        taps = joint_taps(compared)
        executor = Executor(compared.model, context.folder, taps=taps, threads=context.threads, level=JOINT_LEVEL)
        return cls(compared.layers, signature, executor)

    def __call__(self, x: Images, t: Timestep, **conditions: npt.NDArray[Any]) -> Images:
        inputs = feeds(self._session.inputs, self._signature, x, t, conditions)
        inputs |= {self.groups[name].switch: np.array(True) for name in self.switched}
        self.values = self._session.run(inputs)
        return np.asarray(self.values[self._signature.output], np.float32)

    def note(self, facts: Mapping[str, Facts], call: int) -> None:
        """Add the measurements of every layer in the call that just ran."""
        for name, group in self.groups.items():
            measured = {fact: float(np.max(self.values[tap])) for fact, tap in group.measurements.items()}
            parts = [float(self.values[high] - self.values[low]) for low, high in group.parts]
            facts[name].add(call, measured, parts, self._outlier(group))

    def _outlier(self, group: PairedLayer) -> float:
        """Return the largest channel of a layer's input over the median of its channels that are not empty."""
        channels = np.zeros(1) if group.channels is None else self.values[group.channels]
        used = channels[channels > 0]
        return float(used.max() / np.median(used)) if used.size else 1.0

    def quantized(self, names: Sequence[str], call: Callable[[], Images]) -> Images:
        """Return what `call` returns while the named layers are quantized."""
        self.switched = names
        try:
            return call()
        finally:
            self.switched = ()

    def __enter__(self) -> SwitchedNetwork:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()


def joint_taps(compared: SideBySide) -> list[str]:
    """Return the values of the joint graph that its measurements read."""
    return list(dict.fromkeys(tap for group in compared.layers.values() for tap in group.taps))
