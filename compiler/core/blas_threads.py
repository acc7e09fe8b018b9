"""The threads of BLAS, on which the last bits of its results depend: two threads divide a sum in another way than one.

numpy and scipy bring a copy of OpenBLAS each, which takes its number of threads from the environment when it is loaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from mezzotint.runtime.errors import MezzotintWarning

from ..errors import PassError


class NotSpread(MezzotintWarning):
    """Pieces were not given to the workers of a cluster, because their BLAS cannot be set as this process's is."""


def blas_threads() -> int | None:
    """Return the threads of BLAS in this process; None where it is no OpenBLAS, or its copies have other numbers."""
    numbers = {library["num_threads"] for library in _openblas().info()}
    return numbers.pop() if len(numbers) == 1 else None


def blas_threads_for_workers(step: str) -> int | None:
    """Return `blas_threads` for the workers of a step; None, with a warning, where theirs could not be set."""
    threads = blas_threads()
    if threads is None:
        warnings.warn(NotSpread(f"{step} runs in one process: numpy or scipy has no OpenBLAS"), stacklevel=3)
    return threads


@contextmanager
def with_blas_threads(wanted: int) -> Iterator[None]:
    """Compute with the threads that `blas_threads` returned in another process. Raises PassError if it cannot be."""
    if blas_threads() == wanted:
        yield
        return
    with _openblas().limit(limits=wanted):
        if (used := blas_threads()) != wanted:
            raise PassError(
                f"BLAS computes with {used or 'an unknown number of'} threads, and with {wanted} where work comes from",
                where="BLAS",
                hint="install the same builds of numpy and scipy on all machines, and set OMP_NUM_THREADS=1 everywhere",
            )
        yield


@cache
def _openblas() -> Any:
    """Return the copies of numpy and of scipy; what is loaded later, such as torch's, is no part of these sums."""
    import scipy.linalg  # noqa: F401  loads both copies
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")
