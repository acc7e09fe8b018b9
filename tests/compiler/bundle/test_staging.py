"""Staging: nothing that exists, appears or changes is replaced unseen, and only own leftovers are removed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezzotint.compiler import moves, stages
from mezzotint.compiler.bundle.staging import claim_file, staged, staged_file
from mezzotint.compiler.errors import OutputError
from mezzotint.compiler.stages import OWNER, PREFIX, scratch
from mezzotint.runtime.errors import InputError
from tests.helpers.leftovers import leave_stage

ROOT = Path(__file__).parents[3]
unix = pytest.mark.skipif(sys.platform == "win32", reason="links, devices and signals of Unix")


@pytest.fixture(params=["calls of the system", "steps"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that can refuse and exchange in one call, and one where steps stand for both."""
    if request.param == "steps":
        monkeypatch.setattr(moves, "_system_call", lambda: None)
    return str(request.param)


def files(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def bundle(folder: Path, text: str, *, extra: str | None = None) -> Path:
    """What counts as a bundle: a manifest, and the files that it lists."""
    folder.mkdir(parents=True)
    (folder / "data").write_text(text)
    (folder / "mezzotint.json").write_text(json.dumps({"files": {"data": {}}}))
    if extra is not None:
        (folder / extra).parent.mkdir(parents=True, exist_ok=True)
        (folder / extra).write_text("mine")
    return folder


def write(target: Path, text: str, *, force: bool = False, meanwhile: Callable[[], object] = lambda: None) -> None:
    with staged(target, force=force) as (folder, work):
        (folder / "data").write_text(text)
        (folder / "mezzotint.json").write_text(json.dumps({"files": {"data": {}}}))
        (work / "notes").write_text("work")
        meanwhile()


APPEAR: dict[str, Callable[[Path], object]] = {
    "a bundle": lambda p: bundle(p, "theirs"),
    "an empty folder": lambda p: p.mkdir(),
    "a file": lambda p: p.write_text("theirs"),
    "a link": lambda p: p.symlink_to("nowhere"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", APPEAR)
def test_a_target_that_appears_is_left(system: str, tmp_path: Path, kind: str, force: bool) -> None:
    target = tmp_path / "b"
    with pytest.raises(OutputError, match="is left as it is") as caught:
        write(target, "ours", force=force, meanwhile=lambda: APPEAR[kind](target))
    assert caught.value.hint
    assert "ours" not in files(tmp_path).values()
    assert target.is_symlink() or target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("kind", APPEAR)
def test_a_file_that_appears_is_left(system: str, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "x.json"
    for claim in (None, claim_file(target)):
        with (
            pytest.raises(OutputError, match=r"exists already|is left as it is"),
            staged_file(target, claim=claim) as (file, _),
        ):
            file.write_text("ours")
            APPEAR[kind](target)
        assert "ours" not in files(tmp_path).values()
        if target.is_dir():
            for part in (target / "data", target / "mezzotint.json"):
                part.unlink(missing_ok=True)
            target.rmdir()
        else:
            target.unlink()


def test_the_instant_before_the_move(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that appears after the last look is refused by the move itself."""
    target = tmp_path / "b"
    monkeypatch.setattr("mezzotint.compiler.bundle.staging.occupant", lambda path: None)
    with pytest.raises(OutputError, match="appeared while this command ran"):
        write(target, "ours", meanwhile=lambda: bundle(target, "theirs"))
    with (
        pytest.raises(OutputError, match="appeared while this command ran"),
        staged_file(tmp_path / "x") as (file, _),
    ):
        file.write_text("ours")
        (tmp_path / "x").write_text("theirs")
    assert {"b/data": "theirs", "x": "theirs"}.items() <= files(tmp_path).items()


def test_force_replaces_what_it_saw(system: str, tmp_path: Path) -> None:
    target = bundle(tmp_path / "b", "old")
    write(target, "new", force=True)
    assert files(target)["data"] == "new"
    with pytest.raises(RuntimeError, match="planted"):
        write(target, "newer", force=True, meanwhile=_fail)
    assert files(target)["data"] == "new"
    with pytest.raises(OutputError, match="another command wrote the output"):
        write(target, "mine", force=True, meanwhile=lambda: write(target, "theirs", force=True))
    assert files(target)["data"] == "theirs"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def _fail() -> None:
    raise RuntimeError("planted")


@pytest.mark.parametrize("extra", ["notes.txt", "unet/mine.onnx", ".git/config"])
def test_force_never_takes_files_of_others(tmp_path: Path, extra: str) -> None:
    """A folder counts as ours only if all of it is: a file that the manifest does not list is the user's."""
    folders = {
        "a bundle": bundle(tmp_path / "b", "old", extra=extra),
        "a project with a bundle in it": bundle(tmp_path / "p" / "bundle", "old").parent,
        "a demo with a changed bundle": bundle(tmp_path / "d" / "bundle", "old", extra=extra).parent,
        "other files": tmp_path / "o",
    }
    for folder in (folders["a project with a bundle in it"], folders["other files"]):
        (folder / extra).parent.mkdir(parents=True, exist_ok=True)
        (folder / extra).write_text("mine")
    before = files(tmp_path)
    for folder in folders.values():
        with pytest.raises(OutputError, match="did not write"):
            write(folder, "new", force=True)
    assert files(tmp_path) == before


@unix
def test_links_and_devices(tmp_path: Path) -> None:
    target = bundle(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new", force=True)
    assert (tmp_path / "link").is_symlink() and files(target)["data"] == "new"

    (tmp_path / "file").write_text("theirs")
    (tmp_path / "to_file").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "to_file", tmp_path / "fifo", Path(os.devnull), tmp_path / "real"):
        with pytest.raises(OutputError, match="no plain file"):
            claim_file(path)
        with pytest.raises(OutputError, match="no plain file"), staged_file(path, force=True):
            pytest.fail("it was begun")
    assert (tmp_path / "file").read_text() == "theirs"


def test_external_data_moves_with_its_graph_or_not_at_all(system: str, tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"

    def export(text: str, *, force: bool, data: bool = True) -> None:
        with staged_file(target, force=force) as (file, _):
            file.write_text(text)
            if data:
                file.with_name("m.onnx.data").write_text(f"{text} data")

    (tmp_path / "m.onnx.data").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export("one", force=False)
    assert files(tmp_path) == {"m.onnx.data": "mine"}
    export("two", force=True)
    assert files(tmp_path) == {"m.onnx": "two", "m.onnx.data": "two data"}
    export("three", force=True)
    assert files(tmp_path) == {"m.onnx": "three", "m.onnx.data": "three data"}


def test_a_failure_between_two_files_puts_both_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    target.write_text("old")
    (tmp_path / "m.onnx.data").write_text("old data")
    real = moves.move_new

    def fails(source: Path, place: Path) -> None:
        if place == target:
            raise OSError(28, "No space left on device", str(place))
        real(source, place)

    monkeypatch.setattr("mezzotint.compiler.bundle.staging.move_new", fails)
    with pytest.raises(OutputError, match="the disk is full"), staged_file(target, force=True) as (file, _):
        file.write_text("new")
        file.with_name("m.onnx.data").write_text("new data")
    assert files(tmp_path) == {"m.onnx": "old", "m.onnx.data": "old data"}


class TestLeftovers:
    """A leftover is removed only if this user's ended process on this machine made it."""

    def test_a_stage_of_a_killed_process_is_removed(self, tmp_path: Path) -> None:
        leave_stage(tmp_path / "b")
        leave_stage(tmp_path / "another")
        write(tmp_path / "b", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["b"]

    @pytest.mark.parametrize(
        "owner",
        [
            {"host": "elsewhere"},
            {"boot": "another boot"},
            {"namespace": "pid:[1]"},  # another container, where the same number is another process
            {"pid": os.getpid()},
            {"token": "0" * 16},
            {"target": "../b"},
            {"target": 3},
            {"pid": "x"},
            {"more": 1},
        ],
    )
    def test_all_others_stay(self, tmp_path: Path, owner: dict[str, object]) -> None:
        folder = leave_stage(tmp_path / "b", **owner)
        write(tmp_path / "b", "new")
        assert (folder / "half").read_bytes() == b"half"

    def test_names_prove_nothing(self, tmp_path: Path) -> None:
        """Folders of the same pattern, without an owner's file or with one that is no JSON, are of others."""
        names = [f"{PREFIX}0123456789abcdef", ".b.partial-1", f".*.partial-{os.getpid()}", "*"]
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "mine").write_text("mine")
        (tmp_path / names[0] / OWNER).write_text("[")
        (tmp_path / f"{PREFIX}file").write_text("mine")
        (tmp_path / f"{PREFIX}link").symlink_to(names[0])
        before = files(tmp_path)
        for target in ("**", "[a-z]*", "b"):
            write(tmp_path / target, "new")
        assert before.items() <= files(tmp_path).items()

    @unix
    @pytest.mark.parametrize("at", ["open", "write"])
    def test_a_stage_of_a_process_killed_at_its_start(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
    ) -> None:
        """Nothing is in it yet."""

        class Killed(BaseException):
            pass

        def killed(*args: Any) -> int:
            if at == "write":
                os.close(args[0])  # with its lock, as the system does
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, at, killed)
            with pytest.raises(Killed), stages.partial_folder(tmp_path / "b"):
                pass
        (left,) = tmp_path.iterdir()
        assert [file.name for file in left.iterdir()] == ([] if at == "open" else [OWNER])
        write(tmp_path / "b", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["b"]

    @unix
    @pytest.mark.parametrize("at", ["open", "write"])
    def test_a_process_whose_empty_stage_was_removed_makes_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
    ) -> None:
        real = getattr(os, at)
        taken: list[Path] = []

        def taken_away(*args: Any, **more: Any) -> Any:
            if not taken:
                taken.extend(tmp_path.iterdir())
                for folder in taken:
                    shutil.rmtree(folder)
            return real(*args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, at, taken_away)
            begun = stages._begun(tmp_path / "b")
        assert len(taken) == 1 and begun is None and not list(tmp_path.iterdir())
        write(tmp_path / "b", "new")
        assert [p.name for p in tmp_path.iterdir()] == ["b"]

    @unix
    def test_a_lock_keeps_a_stage(self, tmp_path: Path) -> None:
        """The process number may be unknown here; the lock is what a living process has."""
        import fcntl

        folder = leave_stage(tmp_path / "b")
        with (folder / OWNER).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            write(tmp_path / "b", "new")
        assert folder.exists()

    @pytest.mark.parametrize("there", [False, True])
    def test_an_output_between_two_steps_is_put_back(self, tmp_path: Path, there: bool) -> None:
        bundle(leave_stage(tmp_path / "b") / stages.OLD, "old")
        old = leave_stage(tmp_path / "m.onnx") / stages.OLD_FILES
        old.mkdir()
        for name in ("m.onnx", "m.onnx.data"):
            (old / name).write_text("old")
        (tmp_path / "m.onnx.data").write_text("new")
        if there:
            bundle(tmp_path / "b", "new")
            (tmp_path / "m.onnx").write_text("new")
        stages.remove_leftovers(tmp_path)
        state = "new" if there else "old"
        assert {name: text for name, text in files(tmp_path).items() if name != "b/mezzotint.json"} == {
            "b/data": state,
            "m.onnx": state,
            "m.onnx.data": state,
        }

    def test_a_stage_cannot_be_foreseen(self, tmp_path: Path) -> None:
        names = set()
        for i in range(3):
            with staged(tmp_path / str(i)) as (folder, _):
                names.add(folder.parent.name)
                assert folder.parent.stat().st_mode & 0o77 == 0 or sys.platform == "win32"
        assert len(names) == 3 and all(len(name.removeprefix(PREFIX)) == 16 for name in names)


RACE = """
import sys
from pathlib import Path
from mezzotint.compiler.bundle.staging import staged
from mezzotint.runtime.errors import MezzotintError

print("ready", flush=True)
sys.stdin.readline()
try:
    with staged(Path(sys.argv[1])) as (folder, work):
        (folder / "data").write_text(sys.argv[2] * 1000)
        print("written", flush=True)
        sys.stdin.readline()
except MezzotintError as error:
    print("refused:", error.what, flush=True)
else:
    print("won", flush=True)
"""


def test_of_two_processes_one_wins_and_the_others_say_so(tmp_path: Path) -> None:
    target = tmp_path / "b"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(target), letter],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for letter in "ab"
    ]
    for _ in range(2):  # all have begun, then all have written
        lines = [run.stdout.readline() for run in runs if run.stdout]
        assert lines in (["ready\n"] * 2, ["written\n"] * 2)
        for run in runs:
            assert run.stdin
            run.stdin.write("\n")
            run.stdin.flush()
    said = [run.communicate(timeout=60)[0] for run in runs]
    assert sorted(text.partition(":")[0].strip() for text in said) == ["refused", "won"], said
    winner = "ab"[[text.startswith("won") for text in said].index(True)]
    assert files(target) == {"data": winner * 1000}
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


class TestErrors:
    """A read error is not reported as a write error, and folders that were made for nothing go away."""

    def test_what_is_read_is_named_as_read(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot read") as caught, staged(tmp_path / "b"):
            (tmp_path / "missing").read_text()
        assert caught.value.where == str(tmp_path / "missing")
        with pytest.raises(InputError, match="cannot read"), scratch():
            (tmp_path / "missing").read_text()

    def test_what_is_written_is_named_as_written(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "b") as (folder, _):
            (folder / "no" / "folder").write_text("x")
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "file" / "b"):
            pytest.fail("it was begun")
        with pytest.raises(OutputError, match="cannot write"), staged(tmp_path / "file" / "c" / "b"):
            pytest.fail("it was begun")
        with pytest.raises(OutputError, match="the disk is full"), staged(tmp_path / "b"):
            raise OSError("8192 requested and 4096 written")  # numpy, on a full disk

    def test_folders_above_a_failed_output(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="planted"), staged(tmp_path / "a" / "b" / "c"):
            _fail()
        assert list(tmp_path.iterdir()) == []
        write(tmp_path / "a" / "b" / "c", "new")
        assert (tmp_path / "a" / "b" / "c" / "data").exists()

    def test_a_name_as_long_as_the_system_takes(self, tmp_path: Path) -> None:
        with staged_file(tmp_path / ("n" * 255)) as (file, _):
            file.write_text("x")
        for name in ("n" * 256, "null\0"):
            for begin in (staged, staged_file):
                with pytest.raises(OutputError, match="cannot write"), begin(tmp_path / name):
                    pytest.fail("it was begun")

    def test_no_folder_for_temporary_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
        with pytest.raises(OutputError, match="temporary files") as caught, scratch():
            pytest.fail("it was begun")
        assert "TMPDIR" in (caught.value.hint or "")
