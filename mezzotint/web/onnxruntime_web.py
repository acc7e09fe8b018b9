"""The two files of the npm package onnxruntime-web that a page needs: from a folder, from the cache, or through npm.

Every file is compared with a SHA-256 that is written here, wherever it comes from: one release was tested with these
pages, and the files run with the page's rights. The package has no build without threads since 1.19; this one runs on
one thread where a page asks for one, and then needs no cross-origin isolation.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from mezzotint.compiler.bundle.staging import staged
from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.errors import MezzotintError

from ..io.children import run_program

NPM_PACKAGE = "onnxruntime-web"
WEB_VERSION = "1.30.0"
ORT_SCRIPT = "ort.wasm.bundle.min.mjs"
ORT_WASM = "ort-wasm-simd-threaded.wasm"
WEB_FILES = {
    ORT_SCRIPT: "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    ORT_WASM: "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
NPM_INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Of the package's archive, as npm's registry states it."""
CACHE_VARIABLE = "MEZZOTINT_CACHE"
NPM_SECONDS = 600


class WebRuntimeMissing(MezzotintError):
    """The files of onnxruntime-web cannot be had: npm is missing or failed, or a file is not the tested one."""


def web_runtime_files(folder: Path | None = None, cache: Path | None = None) -> dict[str, Path]:
    """Return the path of each of WEB_FILES, checked.

    `folder` is an unpacked package, its `dist`, or a folder that has it in `node_modules`; it is read in place. Without
    it, npm is asked once, and the files are kept below `cache`, by default `cache_folder()`. Raises WebRuntimeMissing.
    """
    if folder is not None:
        return _from_folder(folder)
    kept = (cache or cache_folder()) / f"{NPM_PACKAGE}-{WEB_VERSION}"
    if not all(_is_tested(kept / name, digest) for name, digest in WEB_FILES.items()):
        _fetch(kept)
    return {name: kept / name for name in WEB_FILES}


def cache_folder() -> Path:
    """Return the folder for files that can be fetched again: that of the system, or of MEZZOTINT_CACHE."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        return Path(base or Path.home() / "AppData" / "Local") / "mezzotint" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mezzotint"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mezzotint"


def _from_folder(folder: Path) -> dict[str, Path]:
    places = (folder, folder / "dist", folder / "node_modules" / NPM_PACKAGE / "dist", folder / NPM_PACKAGE / "dist")
    place = next((place for place in places if (place / ORT_SCRIPT).is_file()), None)
    hint = f"unpack `npm pack {NPM_PACKAGE}@{WEB_VERSION}` of a machine that has npm, and name the folder `package`"
    if place is None:
        raise WebRuntimeMissing(f"there is no {ORT_SCRIPT}", where=str(folder), hint=hint)
    for name, digest in WEB_FILES.items():
        if not (place / name).is_file():
            raise WebRuntimeMissing(f"there is no {name}", where=str(place), hint=hint)
        if not _is_tested(place / name, digest):
            raise WebRuntimeMissing(
                f"{name} is not that of {NPM_PACKAGE} {WEB_VERSION}: its SHA-256 differs", where=str(place), hint=hint
            )
    return {name: place / name for name in WEB_FILES}


def _is_tested(file: Path, digest: str) -> bool:
    return file.is_file() and file_sha256(file) == digest


def _fetch(kept: Path) -> None:
    """Write the files into a folder of the cache, which appears whole, through npm. Raises WebRuntimeMissing."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="mezzotint-npm-") as work:
        archive = _packed(Path(work))
        with staged(kept, force=True, ours=_is_kept, shared=True) as (folder, _):
            _unpack(archive, folder)


def _is_kept(folder: Path) -> bool:
    """Return whether a folder of the cache has no other files than those that belong there; they may be damaged."""
    return folder.is_dir() and {file.name for file in folder.iterdir()} <= WEB_FILES.keys()


def _packed(work: Path) -> Path:
    """Return the package's archive, which `npm pack` writes into `work`; no script of the package runs."""
    npm = shutil.which("npm")
    hint = f"name a folder that has {NPM_PACKAGE} {WEB_VERSION}: --onnxruntime-web FOLDER"
    if npm is None:
        raise WebRuntimeMissing(
            f"{NPM_PACKAGE} is needed, and npm is not installed", hint=f"install Node.js, or {hint}"
        )
    # In an empty folder: npm obeys the .npmrc of the folder that it runs in.
    command = [npm, "pack", f"{NPM_PACKAGE}@{WEB_VERSION}", "--prefer-offline", "--ignore-scripts", "--no-audit"]
    try:
        done = run_program(command, work, NPM_SECONDS)
    except OSError as error:
        raise WebRuntimeMissing(f"npm did not run: {error}", hint=hint) from error
    archive = work / f"{NPM_PACKAGE}-{WEB_VERSION}.tgz"
    if done.returncode or not archive.is_file():
        said = " ".join(line for line in done.stderr.splitlines() if "npm error" in line or "npm ERR!" in line)
        raise WebRuntimeMissing(f"npm could not fetch {NPM_PACKAGE} {WEB_VERSION}: {said or done.stderr}", hint=hint)
    digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != NPM_INTEGRITY:
        raise WebRuntimeMissing(
            f"npm gave another {NPM_PACKAGE} {WEB_VERSION} than the tested one: its SHA-512 differs"
        )
    return archive


def _unpack(archive: Path, folder: Path) -> None:
    """Write the tested files of the archive, and nothing else of it."""
    with tarfile.open(archive) as packed:
        for name, digest in WEB_FILES.items():
            member = packed.extractfile(f"package/dist/{name}")
            (folder / name).write_bytes(b"" if member is None else member.read())
            if not _is_tested(folder / name, digest):
                raise WebRuntimeMissing(f"{name} of the archive is not the tested one", where=str(archive))
