"""One shard of a run on disk: some images, written completely or not at all, checked, and read again.

    npz   shard_00003.npz           samples of any rank, as images float32 [m, ...], index int64 [m], seed, run
    png   shard_00003/00000768.png  one 8-bit image each, grey or RGB; shard.json: seed, run, hashes of the files

`index` has the number of each image under its seed, and a PNG is named by it. `run` is the digest of the settings: it
exposes a shard in the folder of another run. The .npz is not compressed: deflate takes 7 % off 256 float images of
digits and thirty times as long. Equal images make equal bytes: numpy dates the members of its archives 1980, and Pillow
writes no dates.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from mezzotint.compiler.bundle.staging import staged, staged_file
from mezzotint.compiler.errors import OutputError
from mezzotint.compiler.stages import remove_leftovers
from mezzotint.runtime.json_text import parse_json
from mezzotint.runtime.signature import Images

from ..io.images import from_pixels, picture, to_pixels

ShardFormat = Literal["npz", "png"]
SHARD_FORMATS: tuple[str, ...] = get_args(ShardFormat)
INSIDE = "shard.json"  # in the folder of a PNG shard
Index = npt.NDArray[np.int64]


class Damaged(Exception):
    """A shard is missing or incomplete; the message is the reason."""


class Foreign(Exception):
    """A shard is complete, and belongs to another run."""


@dataclass(frozen=True)
class Shard:
    """Images `first` .. `stop` - 1 of `seed`, each of `shape`, at their place in the folder of the run `run`."""

    folder: Path
    number: int
    first: int
    stop: int
    format: ShardFormat
    shape: tuple[int, ...]
    seed: int
    run: str

    @property
    def path(self) -> Path:
        """The .npz file, or the folder of PNG files."""
        name = f"shard_{self.number:05d}"
        return self.folder / (f"{name}.npz" if self.format == "npz" else name)

    @property
    def index(self) -> Index:
        """The numbers of its images, int64 `[m]`."""
        return np.arange(self.first, self.stop, dtype=np.int64)

    def part(self, count: int) -> Shard:
        """Return a shard with the first images of this one, for a measurement: it is never written."""
        return replace(self, stop=min(self.stop, self.first + count))

    def complete(self) -> bool:
        """Read all of the shard and return whether it is complete. Partial files of killed runs are removed.

        Raises OutputError where a shard of another run is in its place.
        """
        self.remove_partial()
        try:
            self.load()
        except Damaged:
            return False
        except Foreign as error:
            raise OutputError(
                str(error),
                where=str(self.path),
                hint="move it to its own folder, or replace it with --force",
            ) from error
        return True

    def exists(self) -> bool:
        """Return whether something is in the shard's place."""
        return self.path.exists()

    def remove_partial(self) -> None:
        """Remove partial files of killed runs in the shard's folder."""
        remove_leftovers(self.folder)

    def write(self, images: Images) -> None:
        """Write float32 `[m, ...]`: `store` of what `encode` returns. Raises OutputError."""
        self.store(self.encode(images))

    def encode(self, images: Images) -> dict[str, bytes]:
        """Return the files of images float32 `[m, ...]` by name: of the .npz, or of those inside the folder."""
        data = io.BytesIO()
        if self.format == "npz":
            np.savez(data, images=images, index=self.index, seed=np.asarray(self.seed), run=np.asarray(self.run))
            return {self.path.name: data.getvalue()}
        files, hashes = {}, {}
        for i, number in enumerate(self.index.tolist()):
            data = io.BytesIO()
            picture(to_pixels(images[i : i + 1])[0]).save(data, format="PNG")
            files[_name(number)] = data.getvalue()
            hashes[_name(number)] = sha256(data.getvalue()).hexdigest()
        facts = {"run": self.run, "seed": self.seed, "pictures": hashes}
        return {**files, INSIDE: (json.dumps(facts, indent=2) + "\n").encode()}

    def store(self, files: Mapping[str, bytes]) -> None:
        """Write the files next to the place and move them there; an older shard is replaced at the end.

        Raises OutputError: a full disk, no permission, or something other than a shard in its place.
        """
        if self.format == "npz":
            with staged_file(self.path, force=True) as (file, _):
                file.write_bytes(files[self.path.name])
            return
        with staged(self.path, force=True, ours=_is_picture_shard, shared=True) as (folder, _):
            for name, content in files.items():
                (folder / name).write_bytes(content)

    def load(self) -> Images:
        """Return the images, float32 `[m, ...]`: exact from npz, in steps of 2/255 from png.

        Raises Damaged, Foreign.
        """
        images, index, seed = self._load_npz() if self.format == "npz" else self._load_png()
        wanted = (self.stop - self.first, *self.shape)
        if images.shape != wanted or images.dtype != np.float32:
            raise Damaged(f"it has {images.dtype} {list(images.shape)}, not float32 {list(wanted)}")
        if seed != self.seed or not np.array_equal(index, self.index):
            raise Damaged(f"its images are not {self.first} .. {self.stop - 1} of seed {self.seed}")
        return images

    def _check_run(self, run: str) -> None:
        if run != self.run:
            raise Foreign(f"shard {self.number} is of another run, with other settings (digest {run[:12]})")

    def _load_npz(self) -> tuple[Images, Index, int]:
        with _readable(self.path):
            with zipfile.ZipFile(self.path) as archive:
                # First: numpy allocates as much memory as a damaged header states.
                if (broken := archive.testzip()) is not None:
                    raise Damaged(f"{broken} does not match its checksum")
            with np.load(self.path, allow_pickle=False) as data:
                self._check_run(str(data["run"]))
                return data["images"], data["index"], int(data["seed"])

    def _load_png(self) -> tuple[Images, Index, int]:
        with _readable(self.path):
            facts = parse_json((self.path / INSIDE).read_text(encoding="utf-8"))
            seed, hashes = int(facts["seed"]), dict(facts["pictures"])
            self._check_run(str(facts["run"]))
            names = [_name(number) for number in self.index.tolist()]
            if list(hashes) != names:
                raise Damaged(f"{INSIDE} lists other images than {names[0]} .. {names[-1]}")
            channels, height, width = self.shape
            images = np.empty((len(names), *self.shape), np.float32)
            for out, name in zip(images, names, strict=True):
                data = (self.path / name).read_bytes()
                if sha256(data).hexdigest() != hashes[name]:
                    raise Damaged(f"{name} was changed")
                with Image.open(io.BytesIO(data)) as opened:
                    out[...] = from_pixels(np.asarray(opened).reshape(1, height, width, channels))[0]
            return images, self.index, seed


def _name(number: int) -> str:
    return f"{number:08d}.png"


def _is_picture_shard(folder: Path) -> bool:
    """Return whether the folder holds only files of a PNG shard, and so may be replaced."""
    names = [Path(entry.name) for entry in folder.iterdir()] if folder.is_dir() else [Path()]
    return all(name.name == INSIDE or (name.suffix == ".png" and name.stem.isdigit()) for name in names)


# zipfile raises RuntimeError where a changed bit marks a member as encrypted or as packed by an unknown method.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the errors of a truncated, changed or foreign file into Damaged."""
    try:
        yield
    except FileNotFoundError as error:
        raise Damaged("it is missing" if not path.exists() else f"{Path(error.filename).name} is missing") from error
    except _UNREADABLE as error:
        raise Damaged(f"it cannot be read: {type(error).__name__} {error}") from error
