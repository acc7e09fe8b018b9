"""A cluster that is started on this machine, or joined at its address.

`local` starts a cluster with a worker for each core and ends it; `local:7` has seven workers. Any other text is the
address of a cluster that runs (`ray start --head`), which is left as it was.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mezzotint.runtime.engine import threads_of
from mezzotint.runtime.errors import InputError

from ..io.children import absolute_paths
from ..io.processor import usable_cores
from .driver import Cluster
from .ray_library import ray_library

LOCAL = "local"
MOST_WORKERS = 1024  # on one machine
_TOKEN = secrets.token_hex(32)  # without one, anybody on this machine could send work to the workers
_folders_of_job: list[tuple[str, ...]] = []  # at most one: what `current_folders` was when this process connected
_used: set[str] = set()  # has _TOKEN once Ray was imported with it
LONGEST_PLACE = 30  # characters, with 77 of Ray's own behind them
ANSWER_SECONDS = 5.0
STORE_BYTES = 256 << 20  # of the local object store: what waits between a worker and the driver


def check_cluster(spec: str) -> None:
    """Raise InputError for a text that names no cluster, and where Ray is not installed. Nothing is started."""
    if _is_local(spec):
        _local_workers(spec)
    elif not re.fullmatch(r"(ray://)?[\w.-]+:\d{1,5}|auto", spec):
        raise InputError(
            f"no cluster is called {spec!r}",
            where="--cluster",
            hint="use local, local:WORKERS, or an address HOST:PORT",
        )
    if find_spec("ray") is None:
        ray_library()


def piece_threads(threads: int | None) -> int:
    """Return the number of threads of each piece: as given, else by OMP_NUM_THREADS, else 1. Raises InputError."""
    return threads_of(threads) or 1


def count_workers(spec: str, threads: int | None = None) -> int:
    """Return the number of workers of a cluster; a local one is not started for that. Raises as `open_cluster`."""
    check_cluster(spec)
    if _is_local(spec):
        return _workers_here(spec, piece_threads(threads))
    with open_cluster(spec, threads) as cluster:
        return cluster.workers


@contextmanager
def open_cluster(spec: str, threads: int | None = None, modules: Sequence[Path] = ()) -> Iterator[Cluster]:
    """Yield the cluster of `--cluster`. `threads` are those of each piece: OMP_NUM_THREADS, or 1, when left out.

    `modules` are folders of modules that pieces need beside Mezzotint. A process that is connected to a cluster of Ray
    already stays there. Raises InputError.
    """
    check_cluster(spec)
    each, added = piece_threads(threads), tuple(map(str, modules))
    with _own_token(spec):
        ray = ray_library()
        if ray.is_initialized():
            yield Cluster(ray, each, _folders_of_job[-1] if _folders_of_job else current_folders(), added)
            return
        _folders_of_job.append(current_folders())
        folder = tempfile.mkdtemp(prefix="mz", dir=_short_place()) if _is_local(spec) else None
        try:
            with _undisturbed():
                _start(ray, spec, each, folder)
            # Ray prints the end of a worker to standard output, where --json has its object; `answers` tells failures.
            ray._private.worker._worker_logs_enabled = False
            yield Cluster(ray, each, _folders_of_job[-1], added)
        finally:
            ray.shutdown()
            _folders_of_job.pop()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def cluster_or_none(spec: str | None, threads: int | None = None) -> Iterator[Cluster | None]:
    """Yield the cluster of `--cluster`, or None where it was left out."""
    if spec is None:
        yield None
        return
    with open_cluster(spec, threads) as opened:
        yield opened


def _start(ray: Any, spec: str, threads: int, folder: str | None) -> None:
    """Connect to a cluster, which is started for `local`; `folder` receives its sockets and logs."""
    quiet = {"log_to_driver": False, "configure_logging": False}
    if folder is None:
        try:
            _knock(spec)
            ray.init(address=spec, **quiet)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            line = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"no cluster answers: {line}", where=spec, hint="start one: ray start --head --port 6379"
            ) from error
        return
    workers = _workers_here(spec, threads)
    ray.init(
        address=LOCAL,  # and not the address in RAY_ADDRESS
        num_cpus=workers * threads,
        include_dashboard=False,
        object_store_memory=STORE_BYTES,
        _temp_dir=folder,
        _system_config={"worker_niceness": 0},  # Ray's 15 would starve workers beside any other process
        **quiet,
    )


def _knock(spec: str) -> None:
    """Raise OSError where HOST:PORT refuses a connection: Ray itself tries for minutes."""
    host, _, port = spec.removeprefix("ray://").rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()


def _short_place() -> str | None:
    """Return the folder for a local cluster, None for the usual one: names of sockets have at most 107 characters."""
    usual, short = tempfile.gettempdir(), "/tmp"
    return short if len(usual) > LONGEST_PLACE and os.access(short, os.W_OK) else None


def _is_local(spec: str) -> bool:
    return spec.partition(":")[0] == LOCAL


def _workers_here(spec: str, threads: int) -> int:
    return _local_workers(spec) or max(1, usable_cores() // threads)


def _local_workers(spec: str) -> int | None:
    """Return the number of workers of `local:N`, None for `local`."""
    if spec == LOCAL:
        return None
    number = spec.partition(":")[2]
    if not re.fullmatch(r"\d{1,4}", number) or not 1 <= int(number) <= MOST_WORKERS:
        raise InputError(f"{spec!r} names no number of workers", where="--cluster", hint=f"1 to {MOST_WORKERS}")
    return int(number)


@contextmanager
def _own_token(spec: str) -> Iterator[None]:
    """Protect a local cluster by a token of this process, where the user's environment says nothing about tokens.

    Ray reads the variables when it is imported; imported before, it takes or makes a token in the user's home.
    """
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    first = "ray" not in sys.modules or _TOKEN in _used
    if not _is_local(spec) or not first or any(name in os.environ for name in own):
        yield
        return
    _used.add(_TOKEN)
    with _variables(own):
        yield


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the handlers of signals that Ray changes while it starts.

    What it starts gets a PYTHONPATH without entries that depend on the current folder.
    """
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.getsignal(number) for number in numbers}
    paths = os.environ.get("PYTHONPATH")
    with _variables({} if paths is None else {"PYTHONPATH": absolute_paths(paths)}):
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment, and restore them in the end."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def current_folders() -> tuple[str, ...]:
    """Return the folders that Ray adds to the module path of workers, unless PYTHONPATH has them."""
    kept = absolute_paths(os.environ.get("PYTHONPATH", "")).split(os.pathsep)
    added = (str(Path.cwd()), str(Path(sys.argv[0]).resolve().parent) if sys.argv and sys.argv[0] else "")
    return tuple(dict.fromkeys(folder for folder in added if folder and folder not in kept))
