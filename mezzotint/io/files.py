"""Small files, written beside their target and moved into place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mezzotint.compiler.errors import OutputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to; at the end what lies there takes the place of `path`, an earlier one until then.

    Folders above are made. What fails leaves nothing behind; errors of the disk become OutputError.
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
        with suppress(NotADirectoryError):  # a file stood where a folder should: told above
            part.unlink(missing_ok=True)
