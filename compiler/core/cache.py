"""Results of long work, kept in a folder that compilations share: an entry is a folder with a JSON file and arrays.

The key of an entry is a digest of all that the result depends on (program_key.py), so a compilation that takes it
from the cache writes the same bundle as one that computes it. An entry is written to a hidden folder and then moved: a
killed compilation leaves no partial entry. The JSON file has the hash of the arrays and of itself: a damaged entry is
refused. Entries never change: delete folders to free space. A cache may have a store that other machines share, such as
a bucket: an entry is taken from there if the folder lacks it, and goes there when it was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from safetensors import SafetensorError

from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.json_text import read_json

from ..errors import StatsError
from ..moves import move_new
from ..stages import partial_folder

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError, MezzotintError)
_T = TypeVar("_T")


@dataclass(frozen=True)
class EntryForm:
    """The files of one kind of entry: `<kind>.json` and `<kind>.safetensors`, and what a message calls it."""

    kind: str
    words: str
    layout: int

    def keep(self, entry: Path, write: Callable[[Path], Any]) -> None:
        """Write an entry. `write` writes the arrays' file to a folder and returns the rest as plain data."""
        entry = entry.absolute()
        with partial_folder(entry) as folder:
            written = folder / "entry"
            written.mkdir()
            data = write(written)
            facts = {"layout": self.layout, "arrays": file_sha256(written / self.arrays), self.kind: data}
            text = json.dumps({**facts, "sha256": _hash(facts)})
            (written / f"{self.kind}.json").write_text(text, encoding="utf-8", newline="\n")
            with suppress(FileExistsError):  # another process may have computed the same meanwhile
                move_new(written, entry)

    def load(self, entry: Path, read: Callable[[Any, Path], _T]) -> _T:
        """Return what `read` makes of the plain data and the folder. Raise StatsError for a damaged entry."""
        try:
            facts = read_json(entry / f"{self.kind}.json", self.words, StatsError)
            if facts.pop("sha256") != _hash(facts) or facts["arrays"] != file_sha256(entry / self.arrays):
                raise ValueError("they were changed after they were written")
            return read(facts[self.kind], entry)
        except _UNREADABLE as error:
            raise StatsError(
                f"{self.words} in the cache cannot be read: {error}", where=str(entry), hint="delete this folder"
            ) from error

    @property
    def arrays(self) -> str:
        return f"{self.kind}.safetensors"


class EntryStore(Protocol):
    """Entries that other machines share, by their names."""

    def fetch(self, name: str, folder: Path) -> bool:
        """Copy the files of an entry into a folder that is made; return whether there is one. Raises OutputError."""

    def put(self, name: str, folder: Path) -> None:
        """Copy an entry's folder there. Raises OutputError."""


@dataclass(frozen=True)
class Cache:
    """The entries in a folder, and in a store if there is one."""

    folder: Path
    store: EntryStore | None = None

    def load(self, form: EntryForm, name: str, read: Callable[[Any, Path], _T]) -> _T | None:
        """Return what `read` makes of an entry, None where there is none. Raises StatsError, OutputError."""
        entry = (self.folder / name).absolute()
        if not entry.exists() and self.store is not None:
            with partial_folder(entry) as hidden:
                if self.store.fetch(name, hidden / "entry"):
                    with suppress(FileExistsError):
                        move_new(hidden / "entry", entry)
        return form.load(entry, read) if entry.exists() else None

    def keep(self, form: EntryForm, name: str, write: Callable[[Path], Any]) -> None:
        """Write an entry, as `EntryForm.keep` does. Raises OutputError."""
        form.keep(self.folder / name, write)
        if self.store is not None:
            self.store.put(name, self.folder / name)


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
