"""Accidents that any command can meet: a full disk, no place for temporary files, a signal, a target that appears."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mezzotint import open_bundle
from mezzotint.compiler.bundle import staging
from mezzotint.compiler.stages import PREFIX, partial_folder
from tests.helpers.full_disk import run_accidents
from tests.helpers.models import FAST, Cli, Compiled

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits and signals of Unix")


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def place(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and outputs of earlier commands."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(hand.bundle.path, folder / "bundle")
    for name in ("grid.png", "images.npy", "page.html", "diff.html", "nodes.json", "overrides.json", "float.onnx"):
        (folder / name).write_bytes(b"earlier")
    return folder


def commands(hand: Compiled, place: Path) -> dict[str, list[object]]:
    """Every command, with outputs that exist where it may replace them."""
    bundle, few = place / "bundle", ["--threads", 1]
    two = ["-n", 2]
    return {
        "demo": ["demo", "-o", place / "demo", *few],
        "compile": ["compile", hand.exported, "-o", bundle, "--force", *FAST],
        "compile --cache": ["compile", hand.exported, "-o", place / "new", "--cache", place / "cache", *FAST],
        "export": ["export", hand.exported, "-o", place / "float.onnx", "--scheduler", "sd", "--force", *few],
        "sample to a grid": ["sample", bundle, "-o", place / "grid.png", *two, *few],
        "sample to an array": ["sample", bundle, "-o", place / "images.npy", *two, *few],
        "sample to a folder": ["sample", bundle, "-o", place / "shards", *two, *few],
        "sample to a folder of PNGs": ["sample", bundle, "-o", place / "pngs", *two, "--format", "png", *few],
        "mix": [
            "mix",
            f"A={bundle}",
            f"B={hand.bundle.path}",
            "-o",
            place / "mixed",
            "--reference",
            hand.exported,
            *few,
        ],
        "inspect": ["inspect", bundle],
        "inspect --json": ["inspect", bundle, "--json"],
        "inspect --html": ["inspect", bundle, "--html", place / "page.html", "-n", 0, "--calls", 0, "--no-profile"],
        "audit": ["audit", bundle, *few],
        "diff": ["diff", bundle, hand.bundle.path],
        "diff --html": ["diff", bundle, "--from", "0", "--to", "1", "--html", place / "diff.html"],
        "debug": ["debug", bundle, "--reference", hand.exported, "-n", 1, *few],
        "eval": ["eval", bundle, "--reference", hand.exported, *two, "--resamples", 2, "--no-speed", *few],
        "eval to a folder": [
            *("eval", bundle, "--reference", hand.exported, "-o", place / "eval", *two),
            *("--resamples", 2, "--no-speed", *few),
        ],
        "bench": ["bench", bundle, "--repeats", 1, "--rounds", 1, "--json", *few],
        "card": ["card", bundle, "--license", "mit"],
        "overlay": ["overlay", bundle, "-o", place / "nodes.json", "--force"],
        "overrides": ["overrides", bundle, "--float", hand.exported, "-o", place / "overrides.json", "--force", *few],
        "recipes": ["recipes"],
        "doctor": ["doctor", "--json"],
    }


FIRST_BYTES = 60
ALREADY_AT = {
    "demo": 0,
    **dict.fromkeys(("compile", "compile --cache", "export", "mix", "card", "inspect --html", "diff --html"), 400),
}
"""Bytes after which the disk is full: in the hidden folder's first file, or in what it is for."""


def test_a_full_disk_in_every_command(hand: Compiled, place: Path) -> None:
    """One error of ours, and every file that was there is as it was."""
    before = contents(place)
    cases = [
        {"words": words, "limit": ALREADY_AT.get(name, FIRST_BYTES)} for name, words in commands(hand, place).items()
    ]
    texts, _ = run_accidents(cases)
    for case, text in zip(cases, texts, strict=True):
        assert "Traceback" not in text, (case, text)
        assert text.count("error: ") == 1 and ("disk is full" in text or "free some space" in text), (case, text)
        assert text.count("what to do: ") == 1, (case, text)
    assert contents(place) == before
    assert not [path.name for path in place.iterdir() if path.name.startswith(".")]


def test_no_place_for_temporary_files(hand: Compiled, place: Path, tmp_path: Path) -> None:
    """The commands that need one name TMPDIR; the others write next to their output and do their work."""
    need = ("audit", "debug", "eval", "bench", "overrides")
    some = {name: words for name, words in commands(hand, place).items() if name in need}
    texts, printed = run_accidents(
        [{"words": words, "temporary": str(tmp_path / "nowhere")} for words in some.values()]
    )
    for name, text in zip(some, texts, strict=True):
        assert "Traceback" not in text, (name, text)
        assert text.count("error: ") == text.count("temporary files") == text.count("TMPDIR") == 1, (name, text)
    assert printed == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_compile_and_leaves_nothing(hand: Compiled, tmp_path: Path, number: int) -> None:
    words = ["compile", hand.exported, "-o", tmp_path / "b", "--calibration-samples", "100000", *FAST[:6]]
    before = signal.signal(number, signal.SIG_DFL)  # a shell's background job ignores SIGINT, and so would its children
    process = subprocess.Popen(
        [sys.executable, "-m", "mezzotint", *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    signal.signal(number, before)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(f"{PREFIX}*/bundle/passes/*_lower_norms.txt")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number, said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


WRITERS = ("compile", "export", "sample to a grid", "mix", "inspect --html", "diff --html", "overlay", "overrides")


@pytest.mark.parametrize("name", WRITERS)
def test_a_target_that_appears_while_a_command_runs(
    hand: Compiled, cli: Cli, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = [word for word in commands(hand, place)[name] if word != "--force"]
    at = next(i for i, word in enumerate(words) if word in ("-o", "--html")) + 1
    words[at] = target = tmp_path / "out" / f"target{Path(str(words[at])).suffix}"
    bundle = name in ("compile", "mix")

    @contextmanager
    def slow(path: Path) -> Iterator[Path]:
        with partial_folder(path) as folder:
            target.write_text("theirs")  # another command was faster
            yield folder

    monkeypatch.setattr(staging, "partial_folder", slow)
    answer = cli(*words)

    assert answer.code == 2 and answer.err.count("error: ") == 1, answer
    assert "is left as it is" in answer.err or "exists already" in answer.err
    assert contents(tmp_path) == {f"out/{target.name}": b"theirs"}
    if not bundle:
        return
    assert cli(*words, "--force").code == 2, "a file is no bundle: it is not replaced at all"
    assert contents(tmp_path) == {f"out/{target.name}": b"theirs"}


def test_the_cache_leaves_no_trace_in_a_bundle(hand: Compiled, cli: Cli, tmp_path: Path) -> None:
    """The same compile without a cache, with an empty one and with a full one: the same bytes, apart from times."""
    times = {"seconds", "peak_memory_mb", "created"}

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if key not in times}
        return [plain(item) for item in value] if isinstance(value, list) else value

    found = []
    for i, cache in enumerate(([], ["--cache", tmp_path / "c"], ["--cache", tmp_path / "c"])):
        answer = cli("compile", hand.exported, "-o", tmp_path / str(i), *FAST, "--json", *cache)
        assert answer.code == 0, answer.err
        files = contents(tmp_path / str(i))
        found.append((plain(json.loads(files.pop("mezzotint.json"))), files))
    assert found[0] == found[1] == found[2]
    assert len(list((tmp_path / "c").iterdir())) == 1
    assert open_bundle(tmp_path / "2").manifest.digest == hand.bundle.manifest.digest
