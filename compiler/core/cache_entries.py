"""Results of long work, kept in a folder that compilations share: an entry is a folder with a JSON file and arrays.

The key of an entry is a digest of everything that the result depends on (`program_key`), so a compilation that takes it
from the cache writes the same bundle as one that computes it. An entry is written to a hidden folder and then moved: a
killed compilation leaves no partial entry. The JSON file has the hash of the arrays and of itself: a damaged entry is
refused. Entries never change: delete folders to free space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors import SafetensorError

from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.session import running_version

from ..errors import StatsError
from ..graph import nodes as graph
from ..graph import weight_store as store
from ..moves import move_new
from ..stages import partial_folder
from . import snapshot
from .pipeline import Context
from .program import Program

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


def program_key(program: Program, context: Context, facts: Mapping[str, Any]) -> str:
    """Return the digest of a program, of its calibration and of these facts."""
    home = snapshot.home_of(program.model)
    weights = None if home is None else file_sha256(home / store.WEIGHTS)
    known = {
        "graph": graph.digest(program.model),
        "weights": weights,
        "signature": program.signature.to_json(),
        "schedule": dict(program.schedule.config),
        "deployment": program.deployment.to_json(),
        "shape": list(program.shape),
        "allocation": list(program.allocation),
        "calibration": [context.samples, context.batch, context.seed],
        "onnxruntime": [running_version(), context.threads],
        **({} if context.condition_network is None else {"condition_network": context.condition_network.digest}),
        **facts,
    }
    sha = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for part in (context.conditions, context.unconditional):
        for name, rows in sorted(part.items()):
            sha.update(f"{name}{rows.dtype}{rows.shape}".encode())
            sha.update(np.ascontiguousarray(rows).tobytes())
    return sha.hexdigest()[:32]


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
