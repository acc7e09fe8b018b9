"""Where pieces are computed: the facts of a machine, and the files that a piece needs there.

Weights travel once to each machine. A worker that finds the folder at its own path, with the same digest, reads it
there: on one machine, or on a disk that all share. Otherwise it takes the files from Ray's object store, which moves
each of them to a machine once, and keeps them in a folder for temporary files, named by the digest.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mezzotint.runtime.errors import BundleError, InputError

from ..io.processor import processor_features, processor_name, usable_cores

Fetch = Callable[[str], Any]
"""Returns the content of a file that travels, bytes or uint8 `[size]`, for its key in the object store."""


@dataclass(frozen=True)
class Machine:
    """A machine that computed a piece. `features` are those that decide which kernels run; None where unknown."""

    host: str
    processor: str
    features: tuple[str, ...] | None
    system: str
    cores: int
    onnxruntime: str

    @property
    def kind(self) -> str:
        """The kind of processor: integer kernels may differ between two kinds."""
        return self.system if self.features is None else " ".join((self.system, *self.features))

    def to_json(self) -> dict[str, Any]:
        return {
            "host": self.host,
            "processor": self.processor,
            "features": None if self.features is None else list(self.features),
            "system": self.system,
            "cores": self.cores,
            "onnxruntime": self.onnxruntime,
        }


@dataclass(frozen=True)
class Place:
    """Where a piece is alone: a machine, its node of the cluster, and the cores that the cluster has there."""

    host: str
    node: str
    cores: int


@cache
def this_computer() -> Machine:
    """Return the facts of the machine that this process runs on."""
    from mezzotint.runtime.session import running_version

    features = processor_features()
    system = f"{platform.system()} {platform.machine()}"
    known = None if features is None else tuple(features)
    return Machine(platform.node(), processor_name(), known, system, usable_cores(), running_version())


def mixed_kinds(machines: Mapping[str, Machine]) -> str | None:
    """Return a warning where machines have processors of several kinds, else None."""
    kinds: dict[str, list[str]] = {}
    for machine in machines.values():
        kinds.setdefault(machine.kind, []).append(machine.host)
    if len(kinds) < 2:
        return None
    shares = "; ".join(f"{kind or 'none'}: {', '.join(sorted(set(hosts)))}" for kind, hosts in sorted(kinds.items()))
    return (
        f"the machines have {len(kinds)} kinds of processors ({shares}): integer kernels may differ between them, and "
        "the same piece may have other bytes on each"
    )


@dataclass(frozen=True)
class CarriedFolder:
    """A folder that workers read. `digest` names its content; `files` are keys for `Fetch` by relative name, if it
    travels.
    """

    path: str
    digest: str
    files: Mapping[str, str] | None = None


def placed_folder(folder: CarriedFolder, digest_of: Callable[[Path], str], fetch: Fetch) -> Path:
    """Return where the files of a folder are on this machine, after they were fetched if need be.

    `digest_of` returns the digest of a folder as it is found. Raises InputError.
    """
    here = Path(folder.path)
    if _has(here, folder.digest, digest_of):
        return here
    if folder.files is None:
        raise InputError(
            "this machine does not have the folder, and its files did not travel",
            where=f"{folder.path} on {platform.node()}",
            hint="give the machines one shared disk",
        )
    place = cache_place() / folder.digest
    if _has(place, folder.digest, digest_of):
        return place
    stage = place.with_name(f"{place.name}.{secrets.token_hex(8)}")
    try:
        stage.mkdir()  # a folder may have no files
        for name, key in folder.files.items():
            target = stage / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(fetch(key))
        try:
            stage.rename(place)
        except OSError:  # another worker of this machine was first, or an older copy is damaged
            if not _has(place, folder.digest, digest_of):
                shutil.rmtree(place, ignore_errors=True)
                stage.rename(place)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return place


def cache_place() -> Path:
    """Return this user's folder of travelled files on this machine. Raises InputError where it is another user's."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    place = Path(tempfile.gettempdir()) / f"mezzotint-cluster-{user}"
    place.mkdir(mode=0o700, exist_ok=True)
    if hasattr(os, "getuid") and (place.is_symlink() or place.stat().st_uid != user):
        raise InputError("the folder of travelled files belongs to another user", where=str(place), hint="set TMPDIR")
    return place


def _has(folder: Path, digest: str, digest_of: Callable[[Path], str]) -> bool:
    try:
        return folder.is_dir() and digest_of(folder) == digest
    except (BundleError, OSError):
        return False
