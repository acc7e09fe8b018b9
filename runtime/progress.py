"""Progress of a long call: a function that is given the stage, the steps done, and their number."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""`(stage, done, total)`. A stage begins with 0 done and ends with all of them.

What follows DETAIL in the name of a stage may change while it runs, such as the loss of a training.
"""
DETAIL = " | "
CallProgress = Callable[[int, int], None]
"""`(network calls done, total)`: progress of one known stage."""


def part_of_stage(progress: Progress, index: int, count: int, stage: str | None = None) -> Progress:
    """Return the progress of one of `count` equal parts of a stage; `stage` is its name where the part has another."""
    return lambda name, done, total: progress(stage or name, index * total + done, count * total)


def silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""
