"""Small files, written next to their target and moved into place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mezzotint.compiler.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; at the end its file replaces `path`.

    Parent folders are created. A failure leaves an earlier file as it was; errors of the disk become OutputError.
    """
    part = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        raise OutputError(
            f"cannot write: {error.strerror or error}", where=str(path), hint="free some space or choose another place"
        ) from error
    finally:
        with suppress(NotADirectoryError):  # a file in the place of a parent folder, reported above
            part.unlink(missing_ok=True)
