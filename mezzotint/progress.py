"""Progress of long calls, for display.

    from mezzotint import compile_model, progress

    compile_model("digits", "out/digits", progress=progress.auto())

`auto` shows bars in a terminal, one line for each finished stage in a notebook, and nothing in a pipe. Without an
argument `progress`, no function of the package shows anything.
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mezzotint.runtime.progress import DETAIL, Progress, silent
from mezzotint.runtime.visible import visible

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LONGEST_STAGE = 60  # characters before a bar

__all__ = ["Bars", "Lines", "Progress", "auto", "shown", "silent", "stage"]


def auto() -> Progress:
    """Return a reporter for the place where this process writes: `Bars`, `Lines`, or `silent`."""
    if in_notebook():
        return Lines(print)
    return Bars() if sys.stderr.isatty() else silent


@contextmanager
def shown(quiet: bool = False) -> Iterator[Progress]:
    """Yield the reporter of a command: bars on a terminal, one line for each finished stage elsewhere."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        bars = Bars()
        try:
            yield bars
        finally:
            bars.close()
    else:
        yield Lines(lambda line: print(line, file=sys.stderr, flush=True))


@contextmanager
def stage(progress: Progress, name: str) -> Iterator[None]:
    """Report a stage of one step. A stage that fails is not reported as done."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)


def in_notebook() -> bool:
    """Return whether this process is the kernel of a notebook. IPython is not imported."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class Lines:
    """A reporter that writes one line for each finished stage."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._started: dict[str, float] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.perf_counter()
        name = stage.partition(DETAIL)[0]
        self._started.setdefault(name, now)
        if done >= total:
            self._write(f"{visible(stage)}: {total} done in {now - self._started.pop(name):.1f} s")


class Bars:
    """A reporter that draws one bar for each stage on standard error.

    The display ends when every stage is finished, and begins again with the next stage. `close`, the end of the process
    and the end of this object end it as well.
    """

    def __init__(self) -> None:
        self._display: list[RichProgress] = []  # at most one; shared with the finalizer
        self._tasks: dict[str, TaskID] = {}
        self._finalizer = weakref.finalize(self, _stop, self._display)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._display:
            self._display.append(_new_display())
            self._display[0].start()
        bars = self._display[0]
        name, *_ = stage.partition(DETAIL)
        words = visible(stage, LONGEST_STAGE)
        if name not in self._tasks or (done == 0 and bars.tasks[self._tasks[name]].finished):
            self._tasks[name] = bars.add_task(words, total=total)
        bars.update(self._tasks[name], completed=done, total=total, description=words)
        if bars.finished:
            self.close()

    def close(self) -> None:
        """End the display; the bars stay on the screen."""
        _stop(self._display)
        self._tasks.clear()


def _new_display() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    return RichProgress(
        TextColumn("{task.description:<28}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _stop(display: list[RichProgress]) -> None:
    while display:
        display.pop().stop()
