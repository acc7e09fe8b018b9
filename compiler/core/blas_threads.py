"""The threads of BLAS, on which the last bits of its results depend: two threads divide a sum in another way than one.

numpy and scipy bring a copy of OpenBLAS each, which takes its number of threads from the environment when it is loaded.
Here the number is read back and set by OpenBLAS's own functions, as its users outside of C have to.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import NamedTuple

from mezzotint.runtime.errors import MezzotintWarning

from ..errors import PassError

_LINKED = ("numpy.linalg._umath_linalg", "scipy.linalg._fblas")
"""Modules that are linked with the copies: a handle of one finds the functions of its library."""
_SPELLINGS = tuple((before, behind) for before in ("scipy_", "") for behind in ("64_", "_64", ""))


class NotSpread(MezzotintWarning):
    """Pieces were not given to the workers of a cluster, because their BLAS cannot be set as this process's is."""


class _Copy(NamedTuple):
    """One copy of OpenBLAS: its library, and what surrounds the names of its functions."""

    library: ctypes.CDLL
    before: str
    behind: str

    @property
    def threads(self) -> int:
        return int(self.library[f"{self.before}openblas_get_num_threads{self.behind}"]())

    def use(self, threads: int) -> None:
        self.library[f"{self.before}openblas_set_num_threads{self.behind}"](threads)


def blas_threads() -> tuple[int, ...] | None:
    """Return the threads of numpy's BLAS and of scipy's, in this process; None where one of them is no OpenBLAS."""
    copies = [_copy_of(name) for name in _LINKED]
    known = [copy.threads for copy in copies if copy is not None]
    return tuple(known) if len(known) == len(copies) else None


def blas_threads_for_workers(step: str) -> tuple[int, ...] | None:
    """Return `blas_threads` for the workers of a step; None, with a warning, where theirs could not be set."""
    threads = blas_threads()
    if threads is None:
        warnings.warn(NotSpread(f"{step} runs in one process: numpy or scipy has no OpenBLAS"), stacklevel=3)
    return threads


@contextmanager
def with_blas_threads(wanted: tuple[int, ...]) -> Iterator[None]:
    """Compute with the threads that `blas_threads` returned in another process. Raises PassError if it cannot be."""
    before = blas_threads()
    if before == wanted:
        yield
        return
    try:
        if before is not None:
            _use(wanted)
        if (used := blas_threads()) != wanted:
            raise PassError(
                f"BLAS computes with {_words(used)} threads, and with {_words(wanted)} where the work comes from",
                where="BLAS",
                hint="install the same builds of numpy and scipy on all machines, and set OMP_NUM_THREADS=1 everywhere",
            )
        yield
    finally:
        if before is not None:
            _use(before)


def _use(threads: tuple[int, ...]) -> None:
    for name, count in zip(_LINKED, threads, strict=True):
        copy = _copy_of(name)
        if copy is not None:
            copy.use(count)


def _words(threads: tuple[int, ...] | None) -> str:
    return "an unknown number of" if threads is None else " and ".join(map(str, threads))


@cache
def _copy_of(module: str) -> _Copy | None:
    file = import_module(module).__file__
    library = None if file is None else ctypes.CDLL(file)
    for before, behind in _SPELLINGS:
        if hasattr(library, f"{before}openblas_get_num_threads{behind}"):
            return None if library is None else _Copy(library, before, behind)
    return None
