"""What a worker does: it opens the work once, and turns each piece into a result.

A piece's result is a function of the work and the piece alone. The work is pickled once, lies in the object store of
each machine once, and is opened once by each worker process; a piece is some bytes.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mezzotint.runtime.engine import THREADS_VARIABLE
from mezzotint.runtime.errors import InputError, MezzotintError

from .placement import Fetch, Machine, this_computer


class Work(Protocol):
    """The shared part of a run's pieces. It is pickled, so it has plain values and the names of files.

    `threads` is the number of threads of each piece.
    """

    @property
    def threads(self) -> int: ...

    def open(self, fetch: Fetch) -> Callable[[Any], Any]:
        """Return the function from a piece to its result. `fetch` reads what travelled by the object store."""


@dataclass(frozen=True)
class Stamp:
    """Who computed a piece: the node of the cluster, its machine, the process, seconds, and threads."""

    node: str
    machine: Machine
    process: int
    seconds: float
    threads: int


@dataclass(frozen=True)
class Answer:
    """What comes back from a piece: its result, or the refusal that the same call raises in one process."""

    stamp: Stamp
    result: Any = None
    refusal: MezzotintError | None = None


@dataclass(frozen=True)
class Envelope:
    """The pickled work, the versions that the workers must have as well, and the files that travel, by key.

    Ray follows references in its own objects only, so those of the files are here, and not in the pickled work.
    """

    work: bytes
    versions: dict[str, str]
    files: dict[str, Any]


def own_versions() -> dict[str, str]:
    """Return the versions of what decides about bytes."""
    from importlib.metadata import version

    import numpy as np

    from mezzotint.runtime import __version__
    from mezzotint.runtime.session import running_version

    return {
        "mezzotint": __version__,
        "onnxruntime": running_version(),
        "numpy": np.__version__,
        "scipy": version("scipy"),
    }


_opened: dict[str, tuple[int, Callable[[Any], Any]]] = {}  # at most one: another work's weights would keep its memory


def perform(key: str, reference: Any, piece: bytes) -> Answer:
    """Perform a piece in this worker. `key` names the work, `reference` its envelope in the object store.

    An error of Mezzotint is returned, as every process would raise it; any other exception passes, and is tried again.
    """
    from .ray_library import ray_library

    ray = ray_library()
    node = str(ray.get_runtime_context().get_node_id())
    started = time.perf_counter()
    threads = 0
    try:
        if key not in _opened:
            _opened.clear()
            _opened[key] = _open(ray.get(reference), ray)
        threads, function = _opened[key]
        result, refusal = function(pickle.loads(piece)), None
    except MezzotintError as error:
        result, refusal = None, error
    stamp = Stamp(node, this_computer(), os.getpid(), time.perf_counter() - started, threads)
    return Answer(stamp, result, refusal)


def _open(envelope: Envelope, ray: Any) -> tuple[int, Callable[[Any], Any]]:
    for name, here in own_versions().items():
        if here != envelope.versions[name]:
            raise InputError(
                f"a machine of the cluster has {name} {here}, and this one {envelope.versions[name]}",
                where=this_computer().host,
                hint="install the same versions on all machines: others may compute other bytes",
            )
    work: Work = pickle.loads(envelope.work)
    os.environ[THREADS_VARIABLE] = str(work.threads)  # for what the work starts without a number of threads
    return work.threads, work.open(lambda key: ray.get(envelope.files[key]))
