"""Small files, written next to their target and moved into place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mezzotint.compiler.bundle.staging import Claim, claim_file, staged_file


@contextmanager
def replacing(path: Path, claim: Claim | None = None) -> Iterator[Path]:
    """Yield a temporary path; at the end its file replaces `path`.

    A file that is there is replaced only if the `claim` was made on it: at the beginning of a long command, or now when
    left out. Folders above are made. A failure leaves an earlier file as it was; errors of the disk become OutputError.
    """
    with staged_file(path, claim=claim or claim_file(path)) as (file, _):
        yield file
