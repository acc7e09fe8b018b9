"""Execution of a graph on onnxruntime, with any of its values as outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import AnyArray, shared_row
from mezzotint.runtime.session import Level, open_session
from mezzotint.runtime.signature import Signature, Timestep

from ..errors import ConditionError
from ..graph import weight_store as store
from ..graph.nodes import name_of, remove_dead

Feeds = Mapping[str, AnyArray]
"""Arrays by the names of graph inputs."""
_Session = TypeVar("_Session", bound="NetworkSession")


class NetworkSession:
    """A session on the file of a graph that returns the graph's outputs. A context manager."""

    def __init__(
        self,
        path: Path,
        graph: ir.Graph | None = None,
        *,
        threads: int | None = None,
        level: Level = "all",
        spinning: bool = True,
    ) -> None:
        """Open the file of `graph`, which is read where it is not given."""
        graph = graph or ir.load(path).graph
        self.outputs = [name_of(v) for v in graph.outputs]
        self.inputs = {name_of(v): v for v in graph.inputs}
        self._session = open_session(path, threads=threads, level=level, spinning=spinning)

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Return all outputs of one call, by name."""
        return dict(zip(self.outputs, self._session.run(self.outputs, dict(feeds)), strict=True))

    def call(
        self, signature: Signature, x: npt.NDArray[np.float32], t: Timestep, conditions: Feeds | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Return all outputs of one network call, `x` float32 `[batch, C, H, W]` at timestep `t`, by name."""
        return self.run(feeds(self.inputs, signature, x, t, conditions))

    def close(self) -> None:
        """Free the session."""
        del self._session

    def __enter__(self: _Session) -> _Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Executor(NetworkSession):
    """A session on a graph that also returns chosen values. A context manager, because it writes files.

    taps       names of values to return besides the graph's outputs. onnxruntime has to compute them as such, so a
               tapped quantized graph may fuse less than the same graph without taps
    level      onnxruntime's optimization level
    spinning   as in `open_session`; without it the cores are free for a Collector
    only_taps  leave out the outputs and all nodes that the taps do not need. A quantized graph then needs the level
               "basic": a value that lost a reader may match a fused kernel that does not know its scales
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
        self._path = write_network(model, folder, taps=taps, only_taps=only_taps)
        super().__init__(self._path, model.graph, threads=threads, level=level, spinning=spinning)
        self.outputs = list(dict.fromkeys([*([] if only_taps else self.outputs), *taps]))

    def close(self) -> None:
        """Free the session and remove its files."""
        super().close()
        store.discard(self._path)


def write_network(
    model: ir.Model, folder: Path, stem: str | None = None, *, taps: Sequence[str] = (), only_taps: bool = False
) -> Path:
    """Write a graph that also returns `taps`, or with `only_taps` nothing else, to a folder; return the file's path."""
    return store.write(_prefix(model, taps) if only_taps else _tapped(model, taps), folder, stem)


def feeds(
    inputs: Mapping[str, ir.Value],
    signature: Signature,
    x: npt.NDArray[np.float32],
    t: Timestep,
    conditions: Feeds | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of one call, by name.

    A condition that the graph declares with one row, or as a number, gets the one row that all samples share.
    Raises ConditionError where the rows differ.
    """
    rows = {name: _shared(inputs[name], array) for name, array in (conditions or {}).items()}
    return {signature.sample: x, **timestep_feed(inputs, signature, len(x), t), **rows}


def timestep_feed(
    inputs: Mapping[str, ir.Value], signature: Signature, samples: int, t: Timestep
) -> dict[str, npt.NDArray[Any]]:
    """Return the timestep of one call of so many samples, in the shape, the type and the unit of the graph's input.

    It is empty for a component of a pipeline, whose signature has no timestep.
    """
    if not signature.timestep:
        return {}
    time = inputs[signature.timestep]
    dtype = np.dtype(np.int64) if time.dtype is None else time.dtype.numpy()
    rank = 0 if time.shape is None else len(time.shape)
    size = () if rank == 0 else (1 if time.shape is not None and time.shape[0] == 1 else samples,)
    return {signature.timestep: np.full(size, signature.network_time(t), dtype)}


def _shared(value: ir.Value, rows: AnyArray) -> AnyArray:
    shape = None if value.shape is None else list(value.shape)
    if shape is None or rows.ndim != max(len(shape), 1) or not (shape == [] or shape[0] == 1):
        return rows
    row = shared_row(rows)
    if row is None:
        raise ConditionError(
            f"the model takes one {value.name!r} for all samples of a call, and the rows differ",
            where=f"input {value.name}",
            hint="give one row, or export the model with a batch for this input",
        )
    return row.reshape(()) if shape == [] else row


def _tapped(model: ir.Model, taps: Sequence[str]) -> ir.Model:
    if not taps:
        return model
    clone = model.clone()
    outputs = {name_of(v) for v in clone.graph.outputs}
    by_name = {name_of(out): out for node in clone.graph for out in node.outputs}
    clone.graph.outputs.extend(by_name[name] for name in taps if name not in outputs)
    return clone


def _prefix(model: ir.Model, taps: Sequence[str]) -> ir.Model:
    """Return a clone that computes the taps only. All inputs stay, read or not."""
    clone = _tapped(model, taps)
    clone = model.clone() if clone is model else clone
    by_name = {name_of(v): v for v in clone.graph.outputs}
    clone.graph.outputs[:] = [by_name[name] for name in taps]
    remove_dead(clone.graph)
    return clone
