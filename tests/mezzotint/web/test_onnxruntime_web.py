"""The files of onnxruntime-web: from a folder, from the cache, through npm; and what is refused."""

from __future__ import annotations

import os
import shutil
import sys
import tarfile
from pathlib import Path

import pytest

from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.web import onnxruntime_web
from mezzotint.web.onnxruntime_web import (
    CACHE_VARIABLE,
    NPM_PACKAGE,
    ORT_SCRIPT,
    ORT_WASM,
    WEB_FILES,
    WEB_VERSION,
    WebRuntimeMissing,
    cache_folder,
    web_runtime_files,
)


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only one on the path: what is called `npm` there is npm."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def install(folder: Path, program: str) -> None:
    file = folder / "npm"
    file.write_text(f"#!{sys.executable}\n{program}\n", encoding="utf-8")
    file.chmod(0o755)


def test_the_cache_is_used_without_npm(web_runtime: Path, npm: Path) -> None:
    found = web_runtime_files(cache=web_runtime)
    assert found.keys() == WEB_FILES.keys() and all(path.is_file() for path in found.values())


def test_a_damaged_cache_is_fetched_again(web_runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / f"{NPM_PACKAGE}-{WEB_VERSION}"
    kept.mkdir()
    (kept / ORT_SCRIPT).write_bytes(b"damaged")
    archive = tmp_path / "package.tgz"
    with tarfile.open(archive, "w") as packed:
        for name in WEB_FILES:
            packed.add(next(web_runtime.iterdir()) / name, f"package/dist/{name}")
    monkeypatch.setattr(onnxruntime_web, "_packed", lambda work: archive)

    found = web_runtime_files(cache=tmp_path)

    assert {name: file_sha256(path) for name, path in found.items()} == WEB_FILES
    foreign = kept / "mine.txt"
    foreign.write_bytes(b"mine")
    (kept / ORT_SCRIPT).write_bytes(b"damaged")
    with pytest.raises(OutputError, match="did not write it"):
        web_runtime_files(cache=tmp_path)
    assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize("inside", ["dist", "onnxruntime-web/dist", "node_modules/onnxruntime-web/dist"])
def test_a_folder_is_used_without_npm(web_runtime: Path, npm: Path, tmp_path: Path, inside: str) -> None:
    place = tmp_path / "given" / inside
    place.parent.mkdir(parents=True)
    place.symlink_to(next(web_runtime.iterdir()), target_is_directory=True)
    assert web_runtime_files(tmp_path / "given")[ORT_WASM] == place / ORT_WASM


def test_a_changed_file_is_refused(web_runtime: Path, tmp_path: Path) -> None:
    for name in WEB_FILES:
        (tmp_path / name).write_bytes(b"another")
    with pytest.raises(WebRuntimeMissing, match=f"{ORT_SCRIPT} is not that of {NPM_PACKAGE} {WEB_VERSION}"):
        web_runtime_files(tmp_path)
    shutil.copy(next(web_runtime.iterdir()) / ORT_SCRIPT, tmp_path)
    (tmp_path / ORT_WASM).unlink()
    with pytest.raises(WebRuntimeMissing, match=f"there is no {ORT_WASM}"):
        web_runtime_files(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WebRuntimeMissing, match="there is no ort") as caught:
        web_runtime_files(tmp_path)
    assert f"npm pack {NPM_PACKAGE}@{WEB_VERSION}" in str(caught.value)


def test_without_npm_the_option_is_named(npm: Path, tmp_path: Path) -> None:
    with pytest.raises(WebRuntimeMissing, match="npm is not installed") as caught:
        web_runtime_files(cache=tmp_path / "cache")
    assert "--onnxruntime-web FOLDER" in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="a program without an ending is no program on Windows")
@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import sys; sys.exit('npm error code E404')", "npm could not fetch .* npm error code E404"),
        (f"open('{NPM_PACKAGE}-{WEB_VERSION}.tgz', 'w').write('another')", "its SHA-512 differs"),
    ],
)
def test_what_npm_gives_is_checked(npm: Path, tmp_path: Path, program: str, words: str) -> None:
    install(npm, program)
    with pytest.raises(WebRuntimeMissing, match=words):
        web_runtime_files(cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_cache_has_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().is_absolute() and "mezzotint" in cache_folder().parts
