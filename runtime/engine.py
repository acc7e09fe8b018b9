"""What runs a network: the engine that was asked for, the network that it opened, and what was really used."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from .bounds import MOST_THREADS, check_number
from .errors import EngineError, InputError

EnginePrecision = Literal["f32", "bf16", "f16"]
"""The type that float operations compute in. Integer layers stay integer layers."""
ENGINE_PRECISIONS: tuple[str, ...] = get_args(EnginePrecision)
THREADS_VARIABLE = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class TensorInfo:
    """An input or an output of a network as the graph declares it.

    `dtype` is None for a type that numpy does not have; `type` is its name. An open dimension is a name, or None.
    """

    type: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class EngineUsage:
    """What a network really uses, read back from the engine.

    library     the library that computes, with its version
    device      the device within the engine
    threads     the number of threads, None for the engine's own choice
    precision   of the operations that the graph has in float
    options     that were passed on
    nodes       providers, each with its number of nodes; empty where one engine takes the whole graph
    fallback    nodes that the CPU provider runs instead of the engine, by operation
    """

    engine: str
    library: str
    device: str
    threads: int | None
    precision: str
    options: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[str, int] = field(default_factory=dict)
    fallback: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "engine": self.engine,
            "library": self.library,
            "device": self.device,
            "threads": self.threads,
            "precision": self.precision,
            "options": dict(self.options),
            "nodes": dict(self.nodes),
            "fallback": dict(self.fallback),
        }

    def text(self) -> str:
        """Return the usage in one line, for display."""
        threads = "its own choice of threads" if self.threads is None else f"threads {self.threads}"
        parts = [f"{self.engine} ({self.library})", self.device, self.precision, threads]
        if count := sum(self.fallback.values()):
            parts.append(f"{count} of {sum(self.nodes.values())} nodes on the CPU provider")
        return ", ".join(part for part in parts if part)


class EngineNetwork(Protocol):
    """An opened graph. Threads may share it."""

    @property
    def inputs(self) -> Mapping[str, TensorInfo]: ...

    @property
    def outputs(self) -> Mapping[str, TensorInfo]: ...

    @property
    def usage(self) -> EngineUsage: ...

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], output: str, out: npt.NDArray[np.float32]) -> None:
        """Compute one output into `out`. Raises InputError where the engine refuses the call."""


@dataclass(frozen=True)
class Engine(ABC):
    """An engine and how it was asked to compute. Make one with `runtime.providers.names.find_engine`.

    `options` are pairs for the engine itself, by its own names. `precision` None is f32 where the engine can choose.
    """

    name: str
    options: tuple[tuple[str, str], ...] = ()
    precision: EnginePrecision | None = None

    def __post_init__(self) -> None:
        check_precision(self.precision)

    @abstractmethod
    def open(
        self, model: str | Path | bytes, *, threads: int | None = None, profile: Path | None = None
    ) -> EngineNetwork:
        """Open an ONNX file. Raises EngineError or InputError; see `threads_of` for `threads` None."""

    def to_json(self) -> dict[str, Any]:
        """Return what was asked for, as plain data that `find_engine` takes."""
        return {"name": self.name, "options": dict(self.options), "precision": self.precision}


def check_precision(precision: str | None) -> None:
    """Raise EngineError for a precision that no engine has."""
    if precision is not None and precision not in ENGINE_PRECISIONS:
        raise EngineError(f"no precision is called {precision!r}", hint=f"use one of {', '.join(ENGINE_PRECISIONS)}")


def model_name(model: str | Path | bytes) -> str:
    """Return what a message calls a model."""
    return "a model in memory" if isinstance(model, bytes) else str(model)


def threads_of(threads: int | None) -> int | None:
    """Return the number of threads for any engine: as given, else by OMP_NUM_THREADS, else None (its own choice).

    OMP_NUM_THREADS may be a list, one number for each level of nesting; the first counts. Raises InputError.
    """
    if threads is None:
        text = os.environ.get(THREADS_VARIABLE, "").partition(",")[0].strip()
        if not text:
            return None
        if not text.isascii() or not text.isdigit() or int(text) < 1:
            raise InputError(f"{THREADS_VARIABLE} is {text!r}, not a number of threads", hint="set it to 1 or more")
        threads = int(text)
    elif isinstance(threads, bool) or threads < 1:
        raise InputError(f"{threads!r} threads are not possible", hint="ask for 1 or more, or None")
    check_number("threads", threads, MOST_THREADS)
    return threads
