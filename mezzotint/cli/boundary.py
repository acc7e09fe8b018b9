"""The boundary of the command line: every exception becomes one error of Mezzotint.

Errors of bad input are raised where they are found. What comes here as another exception is an error of the system
(a disk, memory), or a fault of Mezzotint, and is reported as that.
"""

from __future__ import annotations

import os
import traceback
from pathlib import Path

from mezzotint.runtime.errors import MezzotintError

ROOT = Path(__file__).parents[2]
DEBUG = "--debug"
DEBUG_VARIABLE = "MEZZOTINT_DEBUG"  # any text: as if --debug were given


class SystemRefusal(MezzotintError):
    """The system refused a file or memory."""


class Unexpected(MezzotintError):
    """A fault of Mezzotint: an exception that no part of it raises on purpose."""


def wants_traceback(words: list[str]) -> bool:
    """Return whether the command or the environment asks for tracebacks."""
    return DEBUG in words or bool(os.environ.get(DEBUG_VARIABLE))


def as_error(error: Exception) -> MezzotintError:
    """Return an exception as the error to print."""
    if isinstance(error, MezzotintError):
        return error
    if isinstance(error, OSError):
        from mezzotint.compiler.stages import is_full

        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
        if is_full(error):
            return SystemRefusal(
                "the disk is full",
                where=" and ".join(names) or "standard output",
                hint="free some space or choose another place",
            )
        return SystemRefusal(
            f"the system refused a file: {error.strerror or error}",
            where=" and ".join(names) or None,
            hint="check the path, its permissions and the space on its disk",
        )
    if isinstance(error, MemoryError):
        return SystemRefusal(
            f"there is not enough memory: {error}" if str(error) else "there is not enough memory",
            hint="ask for fewer images in one call (--batch), or a smaller --size",
        )
    return Unexpected(
        f"an unexpected {type(error).__name__}: {error}",
        where=_place(error),
        hint=f"this is a fault of Mezzotint: {DEBUG} prints the traceback; please report it with the input",
    )


def _place(error: Exception) -> str | None:
    """Return the last place of the traceback that is in Mezzotint's own code, as `file:line`."""
    own = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(ROOT.resolve()):
            own.append(f"{path.relative_to(ROOT.resolve()).as_posix()}:{frame.lineno}")
    return own[-1] if own else None
