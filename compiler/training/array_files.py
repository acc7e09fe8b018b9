"""Arrays of a training in files of the working folder: memory holds those that are in use."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt


class ArrayFiles:
    """A folder with one file for each array. `close` removes it."""

    def __init__(self, parent: Path) -> None:
        self._folder = Path(mkdtemp(prefix="training-", dir=parent))
        self._files: list[Path] = []

    def __enter__(self) -> ArrayFiles:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def keep(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Write an array and return it as a memory map. Changes of the map do not reach the file."""
        path = self._folder / f"{len(self._files)}.npy"
        np.save(path, array)
        self._files.append(path)
        kept: npt.NDArray[Any] = np.load(path, mmap_mode="c")  # torch warns of arrays that cannot be written
        return kept

    def close(self) -> None:
        """Remove the files."""
        for path in self._files:
            path.unlink()
        self._folder.rmdir()
