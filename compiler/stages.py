"""Hidden folders next to an output, in which one process writes before anything moves to its place.

    .mezzotint-partial-<16 random bytes>/owner.json    host, boot, process, its start, the same random token, the output
                                         ...           what is being written

The name cannot be guessed, and the folder is created by this process and readable by its user only. The process holds a
lock on `owner.json` for as long as it lives. A killed process leaves its folder; the next stage in the same place
removes it if all of this is true: the token is the one in the name, the folder is of this user, this machine, this boot
and this container (by its process namespace) made it, that process has ended, and nothing holds the lock. A process
that was killed before it wrote its owner's file left nothing in the folder, which is removed as well: a living process
that was about to write there makes another one. Any other folder is left alone, whatever its name is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import psutil

from mezzotint.runtime.errors import InputError, MezzotintError

from .errors import OutputError
from .moves import move_new

if sys.platform == "win32":
    fcntl: ModuleType | None = None
else:
    import fcntl

PREFIX = ".mezzotint-partial-"
OWNER = "owner.json"
OLD = "old"  # in a stage: the folder that was the output, between two steps of a replacement
OLD_FILES = "old-files"  # in a stage: the same of an output of several files
CLOCK_SECONDS = 60  # a start that differs by less is taken for the same process: clocks are corrected meanwhile

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Owner:
    """The process that made a stage. `target` is the name of the output next to it."""

    host: str
    boot: str
    namespace: str
    pid: int
    started: float
    token: str
    target: str

    @classmethod
    def of_this_process(cls, token: str, target: str) -> Owner:
        pid = os.getpid()
        return cls(*this_machine(), pid, psutil.Process(pid).create_time(), token, target)

    def has_ended(self) -> bool:
        """Return whether the process has certainly ended; one of another machine or container never has."""
        if (self.host, self.boot, self.namespace) != this_machine():
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
            return bool(abs(process.create_time() - self.started) > CLOCK_SECONDS)
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def this_machine() -> tuple[str, str, str]:
    """Return the host's name, its boot, and the process namespace: empty where the system has none."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    words = [platform.node(), "", ""]
    with contextlib.suppress(OSError):
        words[1] = boot.read_text(encoding="ascii").strip()
    with contextlib.suppress(OSError):
        words[2] = str(namespace.readlink())
    return words[0], words[1], words[2]


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder next to `target`, which must be absolute. It is removed at the end.

    Folders above the target are made; those that were made are removed again if nothing was written. Raises OutputError
    for what cannot be written, InputError for a file that cannot be read meanwhile.
    """
    made: list[Path] = []
    folder = target.parent
    try:
        _make_folders(target.parent, made)
        remove_leftovers(target.parent)
        with _owned(target) as folder:
            yield folder
    except OSError as error:
        raise disk_error(error, target, folder) from error
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # not empty: the output is there
                parent.rmdir()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder for temporary files, removed at the end.

    Raises as `partial_folder` does, and OutputError where there is no place for temporary files.
    """
    try:
        folder = tempfile.mkdtemp(prefix="mezzotint-")
    except OSError as error:
        if error.errno in _FULL:
            raise disk_error(error, Path(tempfile.gettempdir()), Path(tempfile.gettempdir())) from error
        raise OutputError(
            f"no folder for temporary files can be made: {error.strerror or error}",
            hint="set TMPDIR to a folder that exists and can be written",
        ) from error
    try:
        yield Path(folder)
    except OSError as error:
        raise disk_error(error, Path(folder), Path(folder)) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def disk_error(error: OSError, target: Path, folder: Path) -> MezzotintError:
    """Return the error for a failed file operation while `target` was written by way of `folder`.

    A file that is neither in `folder` nor the target nor a folder above it was being read.
    """
    where = str(error.filename or target)
    if is_full(error):
        return OutputError("the disk is full", where=where, hint="free some space or choose another folder")
    reason = error.strerror or str(error)
    path = None if error.filename is None else Path(os.fsdecode(error.filename)).absolute()
    if path is None or path == target or path in target.parents or folder in (path, *path.parents):
        return OutputError(f"cannot write: {reason}", where=where, hint="free some space or choose another folder")
    return InputError(f"cannot read: {reason}", where=where, hint="check that the file exists and may be read")


def is_full(error: OSError) -> bool:
    """Return whether an error says that the disk is full. numpy's own has no number."""
    return error.errno in _FULL or (error.errno is None and "requested and" in str(error))


def remove_leftovers(place: Path) -> None:
    """Remove the stages of ended processes in a folder. An output that one had taken away is put back first."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(place)):
            if entry.name.startswith(PREFIX) and entry.is_dir(follow_symlinks=False):
                _remove_leftover(Path(entry.path))


def _remove_leftover(folder: Path) -> None:
    _remove_empty(folder)
    with _ended_owner(folder) as owner:
        if owner is not None:
            _restore(folder, folder.parent / owner.target)
            _remove(folder)


def _restore(folder: Path, target: Path) -> None:
    """Put back what a killed process had taken away: a folder, or files with the one that reads the others last."""
    files = sorted((folder / OLD_FILES).glob("*"), key=lambda file: file.name == target.name)
    with contextlib.suppress(OSError):
        if target.exists():
            return
        if (folder / OLD).is_dir():
            move_new(folder / OLD, target)
        for file in files:
            file.replace(target.parent / file.name)


@contextlib.contextmanager
def _owned(target: Path) -> Iterator[Path]:
    """Make a folder for a target, and hold the lock of its owner's file. At the end, remove it: that file last."""
    begun = None
    while begun is None:
        begun = _begun(target)
    folder, file = begun
    try:
        yield folder
    finally:
        _remove(folder, file)


def _begun(target: Path) -> tuple[Path, int] | None:
    """Return a new folder and its owner's file, None where another process removed it while it was empty."""
    token = secrets.token_hex(8)
    folder = target.parent / f"{PREFIX}{token}"
    folder.mkdir(mode=0o700)
    file = None
    try:
        file = os.open(folder / OWNER, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o600)
        _lock(file)
        os.write(file, json.dumps(asdict(Owner.of_this_process(token, target.name))).encode())
        if not os.path.samestat(os.fstat(file), (folder / OWNER).stat()):
            raise FileNotFoundError(folder)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not folder.exists():
            if file is not None:
                os.close(file)
            return None
        _remove(folder, file)
        raise
    return folder, file


def _remove_empty(folder: Path) -> None:
    """Remove the folder of a process that was killed before it wrote its owner's file: nothing else may be in it."""
    if fcntl is None:  # no lock says that a process lives
        return
    with contextlib.suppress(OSError):
        if folder.lstat().st_uid != os.getuid():
            return
        if [entry.name for entry in folder.iterdir()] == [OWNER]:
            file = os.open(folder / OWNER, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if not _lock(file) or os.fstat(file).st_size:
                    return
                (folder / OWNER).unlink()
            finally:
                os.close(file)
        folder.rmdir()


@contextlib.contextmanager
def _ended_owner(folder: Path) -> Iterator[Owner | None]:
    """Yield the owner of a leftover, None for a folder that has to stay; no other process removes it meanwhile."""
    owner, file = None, None
    try:
        if hasattr(os, "getuid") and folder.lstat().st_uid != os.getuid():
            yield None
            return
        file = os.open(folder / OWNER, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
        owner = Owner(**json.loads(os.read(file, 1 << 16)))
        plain = Path(owner.target).name == owner.target and owner.token == folder.name.removeprefix(PREFIX)
        if not (plain and owner.has_ended() and _lock(file)):
            owner = None
    except (OSError, ValueError, TypeError):
        owner = None
    try:
        yield owner
    finally:
        if file is not None:
            os.close(file)


def _lock(file: int) -> bool:
    """Take the lock of an open file, for as long as it is open. Return False where another process has it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: the process itself has to be asked
        return True
    return True


def _remove(folder: Path, file: int | None = None) -> None:
    """Remove a stage. The owner's file goes last: without it, no later process could remove what is left."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != OWNER:
                Path(entry.path).unlink()
    if file is not None:
        os.close(file)
    shutil.rmtree(folder, ignore_errors=True)


def _make_folders(folder: Path, made: list[Path]) -> None:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        with contextlib.suppress(FileExistsError):  # another command made it meanwhile
            path.mkdir()
            made.append(path)
    if missing and not missing[0].is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(missing[0]))
