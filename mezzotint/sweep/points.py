"""The points of a sweep: which batch sizes and numbers of threads are measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mezzotint.runtime import bounds
from mezzotint.runtime.errors import InputError

MOST_CALLS_OF_SWEEP = 1000
_MOST = {"batch": bounds.MOST_BATCH, "threads": bounds.MOST_THREADS}


@dataclass(frozen=True)
class SweepPoints:
    """Every pair of a batch size, the rows of one call, and a number of threads.

    Without `batches` it is the graph's own batch size, or 1.
    """

    batches: tuple[int, ...] | None
    threads: tuple[int, ...]

    @classmethod
    def parse(cls, texts: Sequence[str], *, batch: int | None, threads: int) -> SweepPoints:
        """Return the points of texts such as `batch=1,2,4` and `threads=1,2`.

        Where a text is missing there is one number, `batch` or `threads`. Raises InputError.
        """
        found: dict[str, tuple[int, ...]] = {}
        for text in texts:
            name, equals, numbers = text.partition("=")
            if name not in _MOST or not equals or name in found:
                raise InputError(
                    f"{text!r} is no part of a sweep",
                    where="--sweep",
                    hint="give batch=1,2,4 and threads=1,2, each once",
                )
            found[name] = _numbers(text, numbers, _MOST[name])
        if batch is not None and "batch" in found:
            raise InputError("batch sizes are given twice", where="--batch", hint="leave out --batch")
        points = cls(found.get("batch", None if batch is None else (batch,)), found.get("threads", (threads,)))
        if (count := len(points.batches or (1,)) * len(points.threads)) > MOST_CALLS_OF_SWEEP:
            raise InputError(
                f"the sweep has {count} points", where="--sweep", hint=f"give at most {MOST_CALLS_OF_SWEEP}"
            )
        return points


def _numbers(text: str, numbers: str, most: int) -> tuple[int, ...]:
    """Return different numbers from 1 to `most`, in their order."""
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", numbers):
        raise InputError(f"{text!r} has no numbers", where="--sweep", hint="separate them by commas, as in batch=1,2,4")
    found = tuple(dict.fromkeys(int(number) for number in numbers.split(",")))
    if bad := [number for number in found if not 1 <= number <= most]:
        raise InputError(f"{text!r} has {bad[0]}", where="--sweep", hint=f"give numbers from 1 to {most}")
    return found
