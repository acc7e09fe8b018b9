"""Runs a graph on onnxruntime with taps on any value. The numbers are those that users get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.session import Level, open_session
from mezzotint.runtime.signature import Signature, Timestep

from ..graph import weight_store as store
from ..graph.nodes import name_of, remove_dead

Feeds = Mapping[str, AnyArray]
"""Arrays by the names of graph inputs."""


class Executor:
    """A session on a graph whose chosen values are outputs as well. A context manager: it writes files.

    `taps` are names of values to return beside the graph's outputs. `level` is onnxruntime's optimization level;
    taps make onnxruntime keep the tapped values, so a tapped quantized graph may fuse less than the untapped one.
    `spinning` is that of `open_session`: without it the cores are free for a Collector. With `only_taps` the outputs,
    and all that nobody needs for the taps, are left out: the prefix of a graph up to them. A quantized one must not be
    fused then (level "basic"): what has lost a reader may match a kernel that does not know its scales.
    """

    def __init__(
        self,
        model: ir.Model,
        folder: Path,
        *,
        taps: Sequence[str] = (),
        threads: int | None = None,
        level: Level = "all",
        spinning: bool = True,
        only_taps: bool = False,
    ) -> None:
        self._taps = tuple(taps)
        self._path = store.write(_prefix(model, self._taps) if only_taps else _tapped(model, self._taps), folder)
        self.outputs = [] if only_taps else [name_of(v) for v in model.graph.outputs]
        self.inputs = {name_of(v): v for v in model.graph.inputs}
        self._session = open_session(self._path, threads=threads, level=level, spinning=spinning)

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """All outputs and taps of one call, by name."""
        names = list(dict.fromkeys([*self.outputs, *self._taps]))
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))

    def call(
        self, signature: Signature, x: npt.NDArray[np.float32], t: Timestep, conditions: Feeds | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """One network call: `x` float32 `[batch, C, H, W]` at timestep `t` for the whole batch."""
        return self.run(feeds(self.inputs, signature, x, t, conditions))

    def close(self) -> None:
        """Free the session and remove its files."""
        del self._session
        store.discard(self._path)

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def feeds(
    inputs: Mapping[str, ir.Value],
    signature: Signature,
    x: npt.NDArray[np.float32],
    t: Timestep,
    conditions: Feeds | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Inputs of one call, the timestep in the shape and type that the graph asks for."""
    time = inputs[signature.timestep]
    dtype = np.dtype(np.int64) if time.dtype is None else time.dtype.numpy()
    rank = 0 if time.shape is None else len(time.shape)
    size = () if rank == 0 else (1 if time.shape is not None and time.shape[0] == 1 else len(x),)
    return {signature.sample: x, signature.timestep: np.full(size, t, dtype), **(conditions or {})}


def _tapped(model: ir.Model, taps: Sequence[str]) -> ir.Model:
    if not taps:
        return model
    clone = model.clone()
    have = {name_of(v) for v in clone.graph.outputs}
    by_name = {name_of(out): out for node in clone.graph for out in node.outputs}
    clone.graph.outputs.extend(by_name[name] for name in taps if name not in have)
    return clone


def _prefix(model: ir.Model, taps: Sequence[str]) -> ir.Model:
    """A clone that computes the taps and nothing else; the inputs stay, whether they are read or not."""
    clone = _tapped(model, taps)
    clone = model.clone() if clone is model else clone
    by_name = {name_of(v): v for v in clone.graph.outputs}
    clone.graph.outputs[:] = [by_name[name] for name in taps]
    remove_dead(clone.graph)
    return clone
