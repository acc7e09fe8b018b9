"""Files and folders are written next to their target and then moved into place, so that a target is always whole.

What is at the target is never replaced unseen. Without `force`, a target that exists when the work begins is refused,
and so is one that appears meanwhile. With `force`, a target is replaced only if Mezzotint wrote all of it, and it is
still the one that was there when the work began.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mezzotint.runtime.bundle.layout import DENOISERS, MANIFEST, is_pipeline
from mezzotint.runtime.json_text import read_json

from ..errors import OutputError
from ..moves import Occupant, exchange, move_new, occupant
from ..stages import OLD, OLD_FILES, partial_folder

DEMO_FILES = frozenset({"bundle", "float.onnx", "float.onnx.data", "digits.png", "float.png", "integer.png"})
SUMMARY = "summary.json"
Ours = Callable[[Path], bool]


@dataclass(frozen=True)
class Claim:
    """An output file as it was when a command began: what is there at the end is replaced only if it is this."""

    before: Occupant | None


def claim_file(target: Path) -> Claim:
    """Return the claim on an output file that exists or not. Raises OutputError for a folder, a link, a device."""
    check_target_file(target, force=True)
    return Claim(occupant(target))


@contextlib.contextmanager
def staged(
    target: Path, *, force: bool = False, ours: Ours | None = None, shared: bool = False
) -> Iterator[tuple[Path, Path]]:
    """Yield (bundle, work): two empty folders next to the target. On success the first becomes the target.

    Raises OutputError if the target cannot be written, exists, or was changed meanwhile. With `force` it may exist if
    `ours(target)` accepts it (by default `is_ours`); a link to such a folder stays, and the folder is replaced. Of
    several commands that write a `shared` target, the last one wins. A crash leaves a hidden folder that the next
    command in the same place removes. The target does not change before everything is written.
    """
    target = place_of(target)
    check_target(target, force=force, ours=ours)
    before = occupant(target)
    with partial_folder(target) as folder:
        bundle, work = folder / "bundle", folder / "work"
        bundle.mkdir()
        work.mkdir()
        yield bundle, work
        now = occupant(target)
        if now is not None and not shared:
            _check_unchanged(before, now, target, force)
        if now is not None:
            check_target(target, force=force, ours=ours)
            exchange(bundle, target, folder / OLD)
            return
        try:
            move_new(bundle, target)
        except FileExistsError:
            raise _appeared(target) from None


@contextlib.contextmanager
def staged_file(target: Path, *, force: bool = False, claim: Claim | None = None) -> Iterator[tuple[Path, Path]]:
    """Yield (file, work): a path to write to, of the target's name, and an empty folder, as `staged` does.

    Files next to the written one (its external data) move with it, and are refused in the same way. `force` replaces
    what is there, a `claim` only what it was made on. Raises OutputError.
    """
    target = target.absolute()
    check_target_file(target, force=force or claim is not None)
    with partial_folder(target) as folder:
        written, work, old = folder / "written", folder / "work", folder / OLD_FILES
        written.mkdir()
        work.mkdir()
        yield written / target.name, work
        now = occupant(target)
        if claim is not None and now is not None and not force:
            _check_unchanged(claim.before, now, target, force=False)
        # The data before the graph that reads it, so that a graph is never beside the data of another.
        files = sorted(written.iterdir(), key=lambda file: (file.name == target.name, file.name))
        for file in files:
            replaced = force or (file.name == target.name and claim is not None and claim.before is not None)
            check_target_file(target.with_name(file.name), force=replaced)
        if len(files) == 1 and now is not None:
            files[0].replace(target)
        else:
            _publish(files, target.parent, old)


def _publish(files: list[Path], place: Path, old: Path) -> None:
    """Move files to their place in this order. Files that are there go to `old` first, in the opposite order."""
    old.mkdir()
    moved: list[Path] = []
    try:
        for file in reversed(files):
            if occupant(place / file.name) is not None:
                (place / file.name).rename(old / file.name)
        for file in files:
            move_new(file, place / file.name)
            moved.append(place / file.name)
    except BaseException as error:
        for path in reversed(moved):
            path.unlink()
        for file in files:
            if (old / file.name).exists():
                (old / file.name).replace(place / file.name)
        if isinstance(error, FileExistsError):
            raise _appeared(Path(error.filename2 or error.filename)) from None
        raise


def place_of(target: Path) -> Path:
    """Return the absolute path of a folder to write; a link to a folder is followed."""
    there = occupant(target)
    followed = there is not None and target.is_symlink() and target.is_dir()
    return target.resolve() if followed else target.absolute()


def check_target(target: Path, *, force: bool, ours: Ours | None = None) -> None:
    """Raise OutputError for an output that exists; with `force`, only for one that Mezzotint did not write."""
    if occupant(target) is None:
        return
    if not force:
        raise OutputError("the output exists already", where=str(target), hint="choose another folder, or add --force")
    if ours is not None:
        foreign = None if ours(target) else "the output exists, and Mezzotint did not write it"
    else:
        foreign = foreign_part(target)
    if foreign is not None:
        raise OutputError(
            foreign,
            where=str(target),
            hint="choose another folder; --force replaces only what Mezzotint wrote",
        )


def check_target_file(target: Path, *, force: bool) -> None:
    """Raise OutputError for an output file that exists; with `force`, only for one that is no plain file."""
    there = occupant(target)
    if there is not None and (target.is_symlink() or not target.is_file()):
        raise OutputError("the output exists already, and is no plain file", where=str(target), hint="choose another")
    if not force and there is not None:
        raise OutputError("the output exists already", where=str(target), hint="choose another file, or add --force")


def foreign_part(target: Path) -> str | None:
    """Return why `force` may not replace a folder: it holds something that is not of a bundle or of the demo.

    A bundle holds the files of its manifest, a pipeline those of two manifests, a demo its own files and a bundle. An
    empty folder may be replaced.
    """
    no = "the output exists, and Mezzotint did not write it"
    if not target.is_dir():
        return no
    names = {entry.name for entry in target.iterdir()}
    if not names:
        return None
    if MANIFEST in names:
        return _foreign_file(target)
    if names <= DEMO_FILES | {SUMMARY} and (target / "bundle" / MANIFEST).is_file():
        return _foreign_file(target / "bundle")
    return no


def _foreign_file(bundle: Path) -> str | None:
    """Return the complaint about the first file of a bundle's folder that its manifest does not list."""
    try:
        known = _listed(bundle)
    except (OutputError, TypeError, KeyError):
        return f"the output exists, and its {MANIFEST} cannot be read"
    for path in sorted(bundle.rglob("*")):
        name = path.relative_to(bundle).as_posix()
        if name != MANIFEST and name not in known and (path.is_symlink() or not path.is_dir()):
            return f"the output holds a file that Mezzotint did not write: {name}"
    return None


def _listed(folder: Path) -> set[str]:
    """Return the files that a manifest lists, with those of the denoiser's bundle in a pipeline's folder."""
    data = read_json(folder / MANIFEST, "the manifest", OutputError)
    known = set(data["files"])
    if is_pipeline(data) and data["denoiser"] in DENOISERS:
        slot = data["denoiser"]
        known |= {f"{slot}/{name}" for name in (*_listed(folder / slot), MANIFEST)}
    return known


def _check_unchanged(before: Occupant | None, now: Occupant, target: Path, force: bool) -> None:
    if before is None and not force:
        raise _appeared(target)
    if before != now:
        raise OutputError(
            "another command wrote the output while this one ran; it is left as it is",
            where=str(target),
            hint="choose another place, or run this command again",
        )


def _appeared(target: Path) -> OutputError:
    return OutputError(
        "the output appeared while this command ran; it is left as it is",
        where=str(target),
        hint="choose another place, or add --force",
    )


def write_text(path: Path, text: str) -> None:
    """Write a text file of a bundle, with the same bytes on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
