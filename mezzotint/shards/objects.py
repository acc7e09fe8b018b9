"""Shards in an object store: the objects are the files that a folder has, and are checked and read as those are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.signature import Images

from ..cluster.record import MACHINES, MachineRecord
from ..io.objects import ObjectFolder, is_url
from .files import INSIDE, Shard
from .run import RUN, Run, check_same, read_run


def run_at(place: Path | str, settings: Mapping[str, Any]) -> Run:
    """Return the run in a folder, or below a URL."""
    return ObjectRun(str(place), settings) if is_url(str(place)) else Run(Path(place), settings)


def settings_at(place: Path | str) -> dict[str, Any] | None:
    """Return the settings of the run in a folder or below a URL, None where there is none. Raises InputError."""
    return _settings(ObjectFolder(str(place))) if is_url(str(place)) else read_run(Path(place) / RUN)


@dataclass(frozen=True)
class ObjectShard(Shard):
    """A shard below a URL. Its `folder` is empty, and `path` relative to the URL."""

    objects: ObjectFolder

    def store(self, files: Mapping[str, bytes]) -> None:
        """Write the objects; the list of a PNG shard comes last, and without it the shard is not complete."""
        below = "" if self.format == "npz" else f"{self.path.name}/"
        for name, data in sorted(files.items(), key=lambda item: item[0] == INSIDE):
            self.objects.write(f"{below}{name}", data)

    def load(self) -> Images:
        """Return the images. Raises Damaged, Foreign."""
        names = [self.path.name] if self.format == "npz" else self.objects.names(self.path.name)
        with TemporaryDirectory() as folder:
            for name in names:
                if (data := self.objects.read(name)) is not None:
                    file = Path(folder) / name
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(data)
            facts = (self.number, self.first, self.stop, self.format, self.shape, self.seed, self.run)
            return Shard(Path(folder), *facts).load()

    def exists(self) -> bool:
        """Return whether the shard's last object is there."""
        return self.objects.exists(self.path.name if self.format == "npz" else f"{self.path.name}/{INSIDE}")

    def remove_partial(self) -> None:
        """Do nothing: an object is whole, or is not there."""


class ObjectRun(Run):
    """A run below a URL."""

    def __init__(self, url: str, settings: Mapping[str, Any]) -> None:
        super().__init__(Path(), settings)
        self.objects = ObjectFolder(url)
        self.where = self.objects.url

    def shard(self, number: int) -> ObjectShard:
        s = super().shard(number)
        facts = (s.number, s.first, s.stop, s.format, s.shape, s.seed, s.run)
        return ObjectShard(Path(), *facts, self.objects)

    def is_begun(self) -> bool:
        before = _settings(self.objects)
        if before is None:
            if self.objects.names():
                raise OutputError(
                    "there are objects already, and no samples were drawn there",
                    where=self.where,
                    hint="choose another URL",
                )
            return False
        check_same(before, self.settings, f"{self.where}/{RUN}")
        return True

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        with TemporaryDirectory() as folder:
            if (data := self.objects.read(name)) is not None:
                (Path(folder) / name).write_bytes(data)
            yield Path(folder) / name

    def store(self, name: str, data: bytes) -> None:
        self.objects.write(name, data)

    def announce(self) -> None:
        if not self.is_begun():
            self.objects.write(RUN, self.text().encode())

    def record(self) -> MachineRecord:
        return _ObjectRecord(self.objects, self.digest)


class _ObjectRecord(MachineRecord):
    """`machines.json` below a URL."""

    def __init__(self, objects: ObjectFolder, run: str) -> None:
        self._objects = objects
        super().__init__(Path(), run)

    def _load(self) -> Any:
        data = self._objects.read(MACHINES)
        return None if data is None else _as_file(MACHINES, data, super()._load_file)

    def _save(self, text: str) -> None:
        self._objects.write(MACHINES, text.encode())


def _settings(objects: ObjectFolder) -> dict[str, Any] | None:
    data = objects.read(RUN)
    return None if data is None else _as_file(RUN, data, read_run)


def _as_file(name: str, data: bytes, read: Any) -> Any:
    """Return what `read` makes of an object as a local file: sizes and contents are checked in one way."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / name
        file.write_bytes(data)
        return read(file)
