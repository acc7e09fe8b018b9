"""Files and folders are written next to their target and then moved into place, so that a target is always whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from mezzotint.runtime.bundle.bundle import MANIFEST

from ..errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def staged(
    target: Path, *, force: bool = False, ours: Callable[[Path], bool] | None = None
) -> Iterator[tuple[Path, Path]]:
    """Yield (bundle, work): two empty folders next to the target. On success the first becomes the target.

    Raises OutputError if the target cannot be written, or exists. With `force` it may exist if `ours(target)` accepts
    it (by default a bundle, a folder of the demo, or an empty folder). A crash leaves a hidden folder that the next
    compilation to the same place removes. The target does not change before everything is written.
    """
    check_target(target, force=force, ours=ours)
    target = target.absolute()
    with _stage(target) as stage:
        bundle, work = stage / "bundle", stage / "work"
        bundle.mkdir()
        work.mkdir()
        yield bundle, work
        _swap(bundle, target, stage / "old")


@contextlib.contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[tuple[Path, Path]]:
    """Yield (file, work): a path to write to, of the target's name, and an empty folder, as `staged` does.

    Files next to the written one (its external data) move with it.
    """
    if target.exists() and not (force and target.is_file()):
        raise OutputError("the output exists already", where=str(target), hint="choose another file, or add --force")
    target = target.absolute()
    with _stage(target) as stage:
        written, work = stage / "written", stage / "work"
        written.mkdir()
        work.mkdir()
        yield written / target.name, work
        for file in sorted(written.iterdir(), reverse=True):  # the data before the graph that reads it
            file.replace(target.parent / file.name)


@contextlib.contextmanager
def _stage(target: Path) -> Iterator[Path]:
    """Yield an empty hidden folder next to the target; failures to write become OutputError."""
    stage = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        yield stage
    except OSError as error:
        what = "the disk is full" if error.errno in _FULL else f"cannot write: {error.strerror or error}"
        raise OutputError(
            what, where=str(error.filename or target), hint="free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_target(target: Path, *, force: bool, ours: Callable[[Path], bool] | None = None) -> None:
    """Raise OutputError for an output that exists; with `force`, only for one that Mezzotint did not write."""
    if not target.exists():
        return
    if not force:
        raise OutputError("the output exists already", where=str(target), hint="choose another folder, or add --force")
    if not (ours or _is_ours)(target):
        raise OutputError(
            "the output exists, and Mezzotint did not write it",
            where=str(target),
            hint="choose another folder; --force replaces only what Mezzotint wrote",
        )


def _is_ours(target: Path) -> bool:
    """Return whether `force` may replace a target: a bundle, a folder of the demo, or an empty folder."""
    if not target.is_dir():
        return False
    return (target / MANIFEST).is_file() or (target / "bundle" / MANIFEST).is_file() or not any(target.iterdir())


def remove_stale(target: Path) -> None:
    """Remove the folders of killed compilations next to the target; undo a `_swap` that was killed."""
    for folder in target.parent.glob(f".{target.name}.partial-*"):
        pid = folder.name.rpartition("-")[2]
        if not pid.isdigit() or not psutil.pid_exists(int(pid)):
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)


def _swap(bundle: Path, target: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
        try:
            bundle.rename(target)
        except OSError:
            old.rename(target)
            raise
    else:
        bundle.rename(target)


def write_text(path: Path, text: str) -> None:
    """Write a text file of a bundle, with the same bytes on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
