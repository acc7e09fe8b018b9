"""The manifest of a bundle, and the files of a bundle or of a pipeline against their entries in one."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath

from ..errors import BundleError
from ..json_text import read_json
from .layout import MANIFEST
from .manifest import Manifest, check_format, manifest_digest
from .manifest_entries import FileEntry


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_file(folder: Path, name: str, entry: FileEntry, verify: bool) -> None:
    """Raise BundleError for a listed file that is missing, changed, or outside the folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise BundleError(f"the manifest names a file outside the bundle: {name}", where=str(folder / MANIFEST))
    file = folder / name
    if not file.is_file():
        raise BundleError("a file of the bundle is missing", where=str(file), hint="copy the whole folder again")
    if file.stat().st_size != entry.bytes or (verify and file_sha256(file) != entry.sha256):
        raise BundleError("a file was changed after the bundle was sealed", where=str(file), hint="copy it again")


def read_manifest(file: Path) -> Manifest:
    """Return the manifest of a bundle. Raises BundleError for one that is missing, changed or of another format."""
    if not file.is_file():
        raise BundleError(f"there is no {MANIFEST}", where=str(file.parent), hint="this folder is not a bundle")
    data = read_json(file, "the manifest", BundleError)
    check_format(data, str(file))
    if data.get("digest") != manifest_digest(data):
        raise BundleError("the manifest was changed after it was written", where=str(file), hint="compile again")
    return Manifest.from_json(data, str(file))
