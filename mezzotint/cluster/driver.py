"""The driver: pieces of work that it hands out to the workers of a cluster.

    with open_cluster("local") as cluster:  # connection.py
        for piece, answer in cluster.answers(work, pieces, stage="sample", progress=progress):
            ...

Results come in the order of completion, or with `ordered` in the order of the pieces. At most a few pieces more than
there are workers are handed out, so memory holds that many results. A piece that fails is tried again elsewhere; after
three failures it is given up, the others go on, and `answers` raises ClusterError in the end. An error of Mezzotint is
a refusal, which every process would raise: it ends the run at once.

What is in flight then goes on until it is done, or the connection ends. It is not cancelled: Ray 2.60 aborts the
process of a driver that cancels a task just as a worker gets it (its check "Tried to complete task that was not
pending").
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent

from ..io.children import PACKAGE
from .entry import Start, enter
from .ledger import ATTEMPTS, ClusterError, Ledger
from .pace import Pace
from .placement import CarriedFolder, Place
from .ray_library import pinned
from .tasks import Answer, Envelope, Work, own_versions

AHEAD = 2  # pieces handed out for each worker: one runs, one waits


class Cluster:
    """A connection to a cluster; make it with `open_cluster`. `threads` are those of each piece.

    `dropped` are folders that Ray put into the module path of the workers, `added` are folders that belong there.
    """

    def __init__(self, ray: Any, threads: int, dropped: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> None:
        self._ray = ray
        self._start = Start(str(PACKAGE / "__init__.py"), dropped, added)
        self._files: dict[str, Any] = {}
        self.threads = threads

    @property
    def workers(self) -> int:
        """The number of pieces that can run at once, now. Raises InputError where no machine has enough cores."""
        cores = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        if max(cores, default=0) < self.threads:
            raise InputError(
                f"no machine of the cluster has {self.threads} cores for a piece",
                where="--threads",
                hint=f"ask for at most {max(cores, default=0)}",
            )
        return sum(count // self.threads for count in cores)

    def places(self) -> list[Place]:
        """Return every machine, by its name: a piece that is put there has all of its cores.

        Of several nodes on one machine it is that with the most cores.
        """
        found: dict[str, Place] = {}
        for node in self._ray.nodes():
            cores = int(node["Resources"].get("CPU", 0))
            address = str(node["NodeManagerAddress"])  # machines may share a name
            if node["Alive"] and cores > (found[address].cores if address in found else 0):
                found[address] = Place(str(node["NodeManagerHostname"]), str(node["NodeID"]), cores)
        return sorted(found.values(), key=lambda place: (place.host, place.node))

    def carried(self, folder: Path, names: Sequence[str], digest: str) -> CarriedFolder:
        """Return a folder for workers. Its files go to the object store where the cluster has other machines."""
        here = self._ray.get_runtime_context().get_node_id()
        if all(node["NodeID"] == here for node in self._ray.nodes() if node["Alive"]):
            return CarriedFolder(str(folder.absolute()), digest)
        return CarriedFolder(str(folder.absolute()), digest, self.stored(folder, names))

    def stored(self, folder: Path, names: Sequence[str]) -> Mapping[str, str]:
        """Put files into the object store, each as uint8 `[size]`, and return their keys for workers by name."""
        import numpy as np

        keys = {name: f"{folder.absolute()}/{name}" for name in names}
        for name, key in keys.items():
            self._files[key] = self._ray.put(np.fromfile(folder / name, np.uint8))
        return keys

    def drop_missing(self) -> None:
        """Free what the object store has of files that are gone, such as those of a stage that is over."""
        self._files = {key: reference for key, reference in self._files.items() if Path(key).exists()}

    def answers(
        self,
        work: Work,
        pieces: Sequence[Any],
        *,
        stage: str,
        sizes: Sequence[int] | None = None,
        unit: str = "pieces",
        ordered: bool = False,
        needs_all: bool = False,
        gpus: float = 0,
        places: Sequence[Place] | None = None,
        progress: Progress = silent,
    ) -> Iterator[tuple[int, Answer]]:
        """Yield (index of the piece, its answer) for each piece that has a result.

        `sizes` weigh the pieces in the `progress` of `stage`, in `unit`. `gpus` is the number that each piece asks for.
        With `places` each piece runs at its own, alone there. Raises the refusal of a piece, and ClusterError for
        pieces that were given up: in the end, or behind the results before the first of them where the caller, who
        takes them `ordered`, `needs_all`.
        """
        envelope = Envelope(pickle.dumps(work), own_versions(), dict(self._files))
        run = _Run(self._ray, self.threads, gpus, envelope, self._start)
        width = AHEAD * self.workers
        ledger = Ledger(len(pieces), 4 * width if ordered else None)
        pace = Pace(sizes or [1] * len(pieces), unit, stage, self.threads, progress)
        kept: dict[int, Answer] = {}
        following = 0
        while not ledger.is_over:
            while len(run.running) < width and (piece := ledger.take()) is not None:
                run.submit(piece, pieces[piece], None if places is None else places[piece])
            piece, answer, error, lost = run.next()
            if answer is None:
                ledger.failed(piece, error, lost=lost)
            elif answer.refusal is not None:
                raise answer.refusal
            else:
                ledger.done(piece)
                cores = self.threads if places is None else places[piece].cores
                pace.done(piece, answer.stamp.seconds * cores / self.threads)
                if ordered:
                    kept[piece] = answer
                else:
                    yield piece, answer
            while following in kept or following in ledger.failures:
                if following in kept:
                    yield following, kept.pop(following)
                elif needs_all:
                    raise _given_up(stage, pieces, ledger)
                following += 1
        if ledger.failures:
            raise _given_up(stage, pieces, ledger, "the other pieces are done; ")


def _given_up(stage: str, pieces: Sequence[Any], ledger: Ledger, done: str = "") -> ClusterError:
    lines = [f"{stage} {pieces[piece]}: {error}" for piece, error in sorted(ledger.failures.items())]
    more = f" and {len(lines) - 5} more" if len(lines) > 5 else ""
    return ClusterError(
        f"{len(lines)} of {len(pieces)} pieces failed {ATTEMPTS} times: {'; '.join(lines[:5])}{more}",
        where="--cluster",
        hint=f"{done}run the command again when the cause is gone",
    )


class _Run:
    """The pieces of one work that are handed out, by their references."""

    def __init__(self, ray: Any, threads: int, gpus: float, envelope: Envelope, start: Start) -> None:
        self._ray = ray
        self._key = hashlib.sha256(envelope.work).hexdigest()
        self._work = ray.put(envelope)
        ray.cloudpickle.register_pickle_by_value(sys.modules[enter.__module__])
        self._enter = ray.remote(enter)
        self._asked: dict[str, Any] = {"num_cpus": threads, "num_gpus": gpus, "max_retries": 0}
        self._start = start
        self.running: dict[Any, int] = {}

    def submit(self, index: int, piece: Any, place: Place | None = None) -> None:
        """Hand out a piece, to a place with all of its cores or to any worker."""
        asked = self._asked
        if place is not None:
            asked = {**asked, "num_cpus": place.cores, "scheduling_strategy": pinned(place.node)}
        sent = self._enter.options(**asked).remote(tuple(self._start), self._key, [self._work], pickle.dumps(piece))
        self.running[sent] = index

    def next(self) -> tuple[int, Answer | None, str, bool]:
        """Wait for a piece; return (its index, its answer or None, the error, whether its machine was lost)."""
        (ready, *_), _ = self._ray.wait(list(self.running), num_returns=1)
        index = self.running.pop(ready)
        errors = self._ray.exceptions
        try:
            return index, self._ray.get(ready), "", False
        except errors.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            return index, None, f"{type(cause).__name__}: {cause}".splitlines()[0], False
        except (errors.NodeDiedError, errors.ObjectLostError, errors.LocalRayletDiedError) as error:
            return index, None, f"its machine was lost ({type(error).__name__})", True
        except errors.RayError as error:
            return index, None, f"its worker ended ({type(error).__name__})", False
