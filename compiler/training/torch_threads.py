"""The number of threads that torch uses while something is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(wanted: int | None) -> Iterator[None]:
    """Let torch use so many threads, and afterwards as many as before: sums depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
