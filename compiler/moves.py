"""Moves of files and folders that replace nothing unless asked to.

`os.rename` replaces an existing file in silence. Linux and macOS have calls that refuse, and calls that exchange two
paths. Where the system or the file system has none, the same is made of steps that each refuse.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .errors import OutputError

_AT_FDCWD = -100
_REFUSE, _EXCHANGE = {"linux": (1, 2), "darwin": (4, 2)}.get(sys.platform, (0, 0))
_NOT_HERE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}  # this file system has no such call


@dataclass(frozen=True)
class Occupant:
    """What was at a path: enough to notice that it was replaced or changed since."""

    device: int
    inode: int
    kind: int
    size: int
    modified: int


def occupant(path: Path) -> Occupant | None:
    """Return what is at a path, without following a link; None for nothing. Raises OutputError for no possible path."""
    try:
        facts = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # too long a name, a loop of links, a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"cannot write: {reason}", where=str(path), hint="choose another place") from error
    size = facts.st_size if stat.S_ISREG(facts.st_mode) else 0
    return Occupant(facts.st_dev, facts.st_ino, stat.S_IFMT(facts.st_mode), size, facts.st_mtime_ns)


def move_new(source: Path, target: Path) -> None:
    """Move a file or a folder to a path where nothing is. Raises FileExistsError, and then changes nothing."""
    if sys.platform == "win32":
        source.rename(target)  # it refuses by itself
    elif not _renamed(source, target, _REFUSE):
        _move_new_in_steps(source, target)


def exchange(source: Path, target: Path, aside: Path) -> None:
    """Put `source` at `target`. What was at `target` is at `source` or at `aside` afterwards.

    Where the system can, in one step. `aside` is a free path for the steps that other systems need. A failure puts
    `target` back.
    """
    if _renamed(source, target, _EXCHANGE):
        return
    target.rename(aside)
    try:
        move_new(source, target)
    except BaseException:
        aside.rename(target)
        raise


def _move_new_in_steps(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        target.mkdir()
        try:
            source.replace(target)  # replaces an empty folder only
        except OSError:
            target.rmdir()
            raise
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: reserve the name, then replace the empty file
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        source.replace(target)
        return
    source.unlink()


def _renamed(source: Path, target: Path, flag: int) -> bool:
    """Rename with a flag of the system. Return False where the system or the file system has no such call."""
    call = _system_call()
    if call is None:
        return False
    words: list[object] = [os.fsencode(source), os.fsencode(target)]
    if sys.platform == "linux":
        words = [_AT_FDCWD, words[0], _AT_FDCWD, words[1]]
    if call(*words, ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NOT_HERE:
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _system_call() -> Callable[..., int] | None:
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    return None if name is None else getattr(ctypes.CDLL(None, use_errno=True), name, None)
