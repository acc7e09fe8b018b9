"""The cache of `--cache`: a folder, or the URL of an object store that many machines share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from mezzotint.compiler.core.cache import Cache
from mezzotint.runtime.errors import InputError

from .io.objects import ObjectFolder, is_url


@contextmanager
def opened_cache(place: str | Path | None) -> Iterator[Cache | None]:
    """Yield the cache at a place. What is taken from a URL lies in a temporary folder meanwhile.

    Raises InputError for a URL that cannot be opened, and for a file in the place of a folder.
    """
    if place is None:
        yield None
    elif not is_url(str(place)):
        if Path(place).exists() and not Path(place).is_dir():
            raise InputError("the cache is no folder", where=str(place), hint="give a folder, which is made if need be")
        yield Cache(Path(place).absolute())
    else:
        with TemporaryDirectory(prefix="mezzotint-cache-") as folder:
            yield Cache(Path(folder), ObjectEntries(ObjectFolder(str(place))))


class ObjectEntries:
    """Entries of a cache below a URL. The JSON file of an entry is its last object: without it there is no entry."""

    def __init__(self, objects: ObjectFolder) -> None:
        self._objects = objects

    def fetch(self, name: str, folder: Path) -> bool:
        names = self._objects.names(name)
        if not any(_is_last(found) for found in names):
            return False
        folder.mkdir()
        for found in names:
            if (data := self._objects.read(found)) is not None:
                (folder / Path(found).name).write_bytes(data)
        return True

    def put(self, name: str, folder: Path) -> None:
        for file in sorted(folder.iterdir(), key=lambda file: _is_last(file.name)):
            self._objects.write(f"{name}/{file.name}", file.read_bytes())


def _is_last(name: str) -> bool:
    return name.endswith(".json")
