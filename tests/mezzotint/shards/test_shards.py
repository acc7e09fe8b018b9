"""Folders of shards: resumed, shared, made again alone, and the same bytes whichever way."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mezzotint import Bundle, compile_model, read_shards, sample_to_folder
from mezzotint.compiler.errors import OutputError
from mezzotint.compiler.stages import OWNER
from mezzotint.io.images import to_pixels
from mezzotint.runtime.errors import InputError, MezzotintError, TimestepNotDeployed
from mezzotint.runtime.signature import Images
from mezzotint.shards.run import RUN, Run
from mezzotint.shards.shards import parse_shards
from tests.helpers.full_disk import full_disk
from tests.helpers.leftovers import leave_stage
from tests.helpers.models import CONTEXT, SMALL, Cli, Compiled, hand_written, write

ROOT = Path(__file__).parents[3]
N, SIZE = 10, 4  # shards of 4, 4 and 2
OPTIONS: dict[str, Any] = {"shard_size": SIZE, "sampler": "ddpm", "seed": 3, "threads": 1}


def contexts(rows: int) -> Images:
    return np.random.default_rng(1).standard_normal((rows, CONTEXT)).astype(np.float32)


@pytest.fixture(scope="module")
def conditioned(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The hand-written denoiser with a condition `context` [batch, CONTEXT]."""
    folder = tmp_path_factory.mktemp("conditioned")
    source = write(hand_written(context="context"), folder / "m.onnx")
    return compile_model(source, folder / "bundle", recipe="w8a8", conditions={"context": contexts(4)}, **SMALL)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative path."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def written(folder: Path) -> dict[str, tuple[int, int]]:
    """When every file was written, and which one it is."""
    files = {f.relative_to(folder).as_posix(): f.stat() for f in folder.rglob("*") if f.is_file()}
    return {name: (facts.st_mtime_ns, facts.st_ino) for name, facts in files.items()}


def joined(folder: Path) -> Images:
    return np.concatenate([images for _, images in read_shards(folder)])


def check_same(found: Images, wanted: Images) -> None:
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


class Stopped(Exception):
    """Raised by a reporter, as Ctrl-C would."""


def stop_after(pictures: int) -> Callable[[str, int, int], None]:
    def report(stage: str, done: int, total: int) -> None:
        if stage == "sample" and done >= pictures:
            raise Stopped

    return report


class TestPictures:
    """What is in the shards."""

    def test_they_are_those_of_one_call(self, hand: Compiled, tmp_path: Path) -> None:
        wanted = hand.bundle.sample(N, sampler="ddpm", seed=3, threads=1)

        drawn = sample_to_folder(hand.bundle, tmp_path / "f", N, **OPTIONS)

        check_same(joined(tmp_path / "f"), wanted)
        with pytest.raises(AssertionError):
            check_same(joined(tmp_path / "f"), hand.bundle.sample(N, sampler="ddpm", seed=4, threads=1))
        assert [index.tolist() for index, _ in read_shards(tmp_path / "f")] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert (drawn.shards, drawn.made, drawn.skipped, drawn.pictures) == (3, (0, 1, 2), (), N)
        assert sorted(contents(tmp_path / "f")) == [RUN, *(f"shard_0000{i}.npz" for i in range(3))]
        with np.load(tmp_path / "f" / "shard_00002.npz", allow_pickle=False) as data:
            assert set(data) == {"images", "index", "seed", "run"}
            assert (data["index"].dtype, int(data["seed"])) == (np.int64, 3)
            check_same(data["images"], wanted[8:])

    def test_a_batch_that_is_written_into_the_graph(self, hand: Compiled, tmp_path: Path) -> None:
        source = write(hand_written(batch=3), tmp_path / "m.onnx")
        options = {**SMALL, "calibration_samples": 3, "calibration_batch": 3}
        bundle = compile_model(source, tmp_path / "bundle", recipe="w8a8", **options)
        widths: list[int] = []
        network = bundle.denoiser(1)
        call = type(network).__call__

        def watched(self: Any, x: Images, t: int, **conditions: Any) -> Images:
            widths.append(len(x))
            return call(self, x, t, **conditions)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(network), "__call__", watched)
            sample_to_folder(bundle, tmp_path / "f", N, **OPTIONS)

        assert set(widths) == {3}
        assert len(widths) == 4 * (2 + 2 + 1), "batches begin with the shards"
        check_same(joined(tmp_path / "f"), bundle.sample(N, sampler="ddpm", seed=3, threads=1))

    def test_png(self, hand: Compiled, tmp_path: Path) -> None:
        images = hand.bundle.sample(N, sampler="ddpm", seed=3, threads=1)

        sample_to_folder(hand.bundle, tmp_path / "f", N, format="png", **OPTIONS)

        for i, pixels in enumerate(to_pixels(images)):
            with Image.open(tmp_path / "f" / f"shard_0000{i // SIZE}" / f"{i:08d}.png") as opened:
                assert opened.mode == "L"
                np.testing.assert_array_equal(np.asarray(opened), pixels[:, :, 0])
        found = joined(tmp_path / "f")
        assert found.dtype == np.float32
        assert 0 < np.abs(found - np.clip(images, -1, 1)).max() <= 1 / 255 + 1e-6
        np.testing.assert_array_equal(to_pixels(found), to_pixels(images))

    def test_conditions_go_with_their_pictures(self, conditioned: Bundle, tmp_path: Path) -> None:
        rows = contexts(N)
        for name, given in (("each", rows), ("all", rows[:1]), ("turned", rows[::-1])):
            sample_to_folder(conditioned, tmp_path / name, N, conditions={"context": given}, batch=3, **OPTIONS)

        wanted = conditioned.sample(N, sampler="ddpm", seed=3, conditions={"context": rows}, threads=1)
        check_same(joined(tmp_path / "each"), wanted)
        with pytest.raises(AssertionError):
            check_same(joined(tmp_path / "turned"), wanted)
        one = conditioned.sample(N, sampler="ddpm", seed=3, conditions={"context": rows[:1]}, threads=1)
        check_same(joined(tmp_path / "all"), one)

    def test_a_shard_alone_has_its_conditions(self, conditioned: Bundle, tmp_path: Path) -> None:
        given = {"context": contexts(N)}
        sample_to_folder(conditioned, tmp_path / "whole", N, conditions=given, **OPTIONS)
        sample_to_folder(conditioned, tmp_path / "alone", N, conditions=given, shards=[1], **OPTIONS)

        whole, alone = contents(tmp_path / "whole"), contents(tmp_path / "alone")
        assert set(alone) == {RUN, "shard_00001.npz"}
        assert alone.items() <= whole.items()

    @pytest.mark.parametrize("given", [contexts(0), np.array([[{}]] * N)], ids=["none", "objects"])
    def test_conditions_that_do_not_fit(self, conditioned: Bundle, tmp_path: Path, given: Any) -> None:
        with pytest.raises(InputError, match="conditions 'context' has shape") as caught:
            sample_to_folder(conditioned, tmp_path / "f", N, conditions={"context": given}, **OPTIONS)
        assert "image i takes row i" in (caught.value.hint or "")
        assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("format", ["npz", "png"])
class TestBytes:
    """The same pictures make the same bytes, however they came about."""

    @pytest.fixture
    def whole(self, hand: Compiled, tmp_path: Path, format: str) -> Path:
        sample_to_folder(hand.bundle, tmp_path / "whole", N, format=format, **OPTIONS)
        return tmp_path / "whole"

    def test_batches_do_not_matter(self, hand: Compiled, whole: Path, tmp_path: Path, format: str) -> None:
        sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, batch=3, **OPTIONS)

        assert contents(tmp_path / "f") == contents(whole)

    def test_a_shard_made_alone(self, hand: Compiled, whole: Path, tmp_path: Path, format: str) -> None:
        for number in (2, 0):
            drawn = sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, shards=[number], **OPTIONS)
            assert drawn.made == (number,)

        alone = contents(tmp_path / "f")
        assert alone == {name: data for name, data in contents(whole).items() if not name.startswith("shard_00001")}
        sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, **OPTIONS)
        assert contents(tmp_path / "f") == contents(whole)

    def test_twice(self, hand: Compiled, whole: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
        before, data = written(whole), contents(whole)

        drawn = sample_to_folder(hand.bundle, whole, N, format=format, **OPTIONS)
        assert (drawn.made, drawn.skipped, drawn.pictures) == ((), (0, 1, 2), 0)
        assert written(whole) == before

        clock = time.time  # an archive that dates its members has steps of two seconds
        monkeypatch.setattr(time, "time", lambda: clock() + 1e6)
        forced = sample_to_folder(hand.bundle, whole, N, format=format, shards=[1], force=True, **OPTIONS)
        assert (forced.made, forced.skipped) == ((1,), ())
        changed = {name for name, when in written(whole).items() if when != before[name]}
        pictures = {f"shard_00001/{name}" for name in ("shard.json", *(f"{i:08d}.png" for i in range(4, 8)))}
        assert changed == ({"shard_00001.npz"} if format == "npz" else pictures)
        assert contents(whole) == data

    def test_interrupted(self, hand: Compiled, whole: Path, tmp_path: Path, format: str) -> None:
        with pytest.raises(Stopped):
            sample_to_folder(
                hand.bundle, tmp_path / "f", N, format=format, batch=2, progress=stop_after(SIZE + 2), **OPTIONS
            )
        before = written(tmp_path / "f")
        assert {name.partition("/")[0].partition(".")[0] for name in contents(tmp_path / "f")} == {
            "sampling",
            "shard_00000",
        }

        drawn = sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, **OPTIONS)

        assert (drawn.made, drawn.skipped) == ((1, 2), (0,))
        assert contents(tmp_path / "f") == contents(whole)
        assert before.items() <= written(tmp_path / "f").items()

    def test_what_a_killed_run_left_is_removed(self, hand: Compiled, whole: Path, tmp_path: Path, format: str) -> None:
        data = contents(whole)
        name = "shard_00001.npz" if format == "npz" else "shard_00001"
        leave_stage(whole / name)
        lives = leave_stage(whole / "shard_00002", pid=os.getpid())
        (lives / OWNER).unlink()

        drawn = sample_to_folder(hand.bundle, whole, N, format=format, **OPTIONS)

        assert drawn.made == ()
        left = f"{lives.name}/half"
        assert contents(whole) == {**data, left: b"half"}

    def test_a_shard_of_another_run(self, hand: Compiled, whole: Path, tmp_path: Path, format: str) -> None:
        sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, **{**OPTIONS, "seed": 4})
        data = contents(tmp_path / "f")
        name = next(path.name for path in whole.iterdir() if path.name.startswith("shard_00001"))
        (tmp_path / "f" / name).rename(tmp_path / "kept")
        (shutil.copytree if format == "png" else shutil.copy)(whole / name, tmp_path / "f" / name)

        with pytest.raises(OutputError, match="shard 1 is of another run") as caught:
            sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, **{**OPTIONS, "seed": 4})
        assert "--force" in (caught.value.hint or "")
        with pytest.raises(InputError, match=r"shard 1 is not whole: .*another run"):
            joined(tmp_path / "f")

        again = {**OPTIONS, "seed": 4, "shards": [1], "force": True}
        sample_to_folder(hand.bundle, tmp_path / "f", N, format=format, **again)
        assert contents(tmp_path / "f") == data


def _replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda f: f.write_bytes(f.read_bytes()[:-100]),
    "empty": lambda f: f.write_bytes(b""),
    "no archive": lambda f: f.write_bytes(b"hello"),
    "a changed byte": lambda f: f.write_bytes(_flipped(f.read_bytes(), 300)),
    "a changed header": lambda f: f.write_bytes(_flipped(f.read_bytes(), 60)),
    "fewer pictures": lambda f: _saved(f, images=np.zeros((3, 1, 8, 8), np.float32)),
    "another type": lambda f: _saved(f, images=np.zeros((4, 1, 8, 8))),
    "other numbers": lambda f: _saved(f, index=np.arange(4)),
    "another seed": lambda f: _saved(f, seed=np.asarray(9)),
    "objects": lambda f: _saved(f, images=np.array([{}] * 4, dtype=object)),
    "a folder": _replaced_by_a_folder,
}
PNG_DAMAGE: dict[str, Callable[[Path], object]] = {
    "a missing picture": lambda f: (f / "00000005.png").unlink(),
    "a changed picture": lambda f: (f / "00000005.png").write_bytes(_flipped((f / "00000005.png").read_bytes(), 60)),
    "another picture": lambda f: shutil.copy(f / "00000004.png", f / "00000005.png"),
    "no list": lambda f: (f / "shard.json").unlink(),
    "a cut list": lambda f: (f / "shard.json").write_text((f / "shard.json").read_text()[:-9]),
    "an odd list": lambda f: (f / "shard.json").write_text("[]"),
    "a short list": lambda f: _edited(f / "shard.json", pictures={}),
    "another seed": lambda f: _edited(f / "shard.json", seed=9),
}


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _saved(file: Path, **changes: npt.NDArray[Any]) -> None:
    with np.load(file) as data:
        arrays = {**data, **changes}
    np.savez(file, **arrays)


def _edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestDamage:
    """A shard that is not whole is seen, and made again."""

    @pytest.mark.parametrize(
        ("format", "damage"), [*(("npz", name) for name in DAMAGE), *(("png", name) for name in PNG_DAMAGE)]
    )
    def test_it_is_made_again(self, hand: Compiled, tmp_path: Path, format: str, damage: str) -> None:
        folder = tmp_path / "f"
        sample_to_folder(hand.bundle, folder, N, format=format, **OPTIONS)
        data = contents(folder)
        if format == "npz":
            DAMAGE[damage](folder / "shard_00001.npz")
        else:
            PNG_DAMAGE[damage](folder / "shard_00001")
        assert contents(folder) != data

        with pytest.raises(InputError, match="shard 1 is not whole") as caught:
            joined(folder)
        assert (caught.value.hint or "").endswith("--shards 1")
        if damage == "a folder":  # it may hold files of the user: it is not replaced
            with pytest.raises(OutputError, match="exists already"):
                sample_to_folder(hand.bundle, folder, N, format=format, **OPTIONS)
            return
        drawn = sample_to_folder(hand.bundle, folder, N, format=format, **OPTIONS)

        assert (drawn.made, drawn.skipped) == ((1,), (0, 2))
        assert contents(folder) == data

    def test_every_byte_of_an_archive(self, hand: Compiled, tmp_path: Path) -> None:
        """A byte that changes is seen, or is one of the archive's own that say nothing about the pictures."""
        folder = tmp_path / "f"
        sample_to_folder(hand.bundle, folder, 2, **OPTIONS)
        file = folder / "shard_00000.npz"
        data, images = file.read_bytes(), joined(folder)
        seen = 0
        for at in range(0, len(data), 5):
            file.write_bytes(_flipped(data, at))
            try:
                check_same(joined(folder), images)
            except InputError:
                seen += 1
        assert seen > len(data) / 5 * 0.6

    def test_somebody_elses_files_are_never_removed(self, hand: Compiled, tmp_path: Path) -> None:
        folder = tmp_path / "f"
        sample_to_folder(hand.bundle, folder, N, format="png", **OPTIONS)
        (folder / "shard_00001" / "00000004.png").unlink()
        (folder / "shard_00001" / "letter.txt").write_text("dear")
        data = contents(folder)

        for force in (False, True):
            with pytest.raises(OutputError, match="Mezzotint did not write it"):
                sample_to_folder(hand.bundle, folder, N, format="png", shards=[1], force=force, **OPTIONS)
        assert contents(folder) == data


class TestRefusals:
    """What cannot be meant is refused before anything is drawn or written."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"n": 11}, "pictures was 10 and is 11 now"),
            ({"shard_size": 5}, "shard_size was 4 and is 5 now"),
            ({"format": "png"}, "format was 'npz' and is 'png' now"),
            ({"seed": 4}, "seed was 3 and is 4 now"),
            ({"sampler": "ddim"}, "sampler was 'ddpm' and is 'ddim' now"),
            ({"steps": 2}, "steps was 4 and is 2 now"),
            ({"sampler": "ddim", "eta": 0.5}, "sampler was"),
            ({"conditions": {"context": contexts(1)}}, "conditions.context.sha256 was"),
            ({"conditions": {"context": contexts(N)}}, "conditions.context.shape was"),
            ({"conditions": {}}, "conditions.context.dtype was '<f4' and is None now"),
            ({"guidance": 2}, "guidance was 1.0 and is 2.0 now"),
        ],
    )
    def test_other_settings(self, conditioned: Bundle, tmp_path: Path, change: dict[str, Any], words: str) -> None:
        folder = tmp_path / "f"
        given = {"conditions": {"context": np.zeros((1, CONTEXT), np.float32)}, **OPTIONS}
        sample_to_folder(conditioned, folder, N, **given)
        data = contents(folder)
        changed = {**given, "n": N, **change}

        for more in ({}, {"force": True}, {"shards": [0]}):
            with pytest.raises(InputError, match=re.escape(words)) as caught:
                _sample(conditioned, folder, {**changed, **more})
            assert caught.value.where == str(folder / RUN)
            assert "as it was" in (caught.value.hint or "")
        assert contents(folder) == data

    def test_another_bundle(self, hand: Compiled, conditioned: Bundle, tmp_path: Path) -> None:
        sample_to_folder(hand.bundle, tmp_path / "f", N, **OPTIONS)

        with pytest.raises(InputError, match=r"bundle was '[0-9a-f]{64}' and is"):
            sample_to_folder(conditioned, tmp_path / "f", N, conditions={"context": contexts(1)}, **OPTIONS)

    def test_a_folder_that_is_not_ours(self, hand: Compiled, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("dear")
        (tmp_path / "empty").mkdir()

        with pytest.raises(OutputError, match="no samples were drawn into it"):
            sample_to_folder(hand.bundle, tmp_path, N, force=True, **OPTIONS)
        with pytest.raises(OutputError, match="cannot write"):
            sample_to_folder(hand.bundle, tmp_path / "letter.txt", N, **OPTIONS)
        assert contents(tmp_path) == {"letter.txt": b"dear"}
        sample_to_folder(hand.bundle, tmp_path / "empty", N, **OPTIONS)
        assert len(joined(tmp_path / "empty")) == N

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", "not readable JSON"),
            ("[]", "cannot be read"),
            ('{"layout": 2}', "layout 2, this version of Mezzotint knows 1"),
            ('{"layout": 1, "run": "x", "settings": {"seed": 4}}', "changed after it was written"),
            ('{"layout": 1, "run": "x", "settings": 4}', "cannot be read"),
        ],
    )
    def test_settings_that_are_not_understood(self, hand: Compiled, tmp_path: Path, text: str, words: str) -> None:
        folder = tmp_path / "f"
        sample_to_folder(hand.bundle, folder, N, **OPTIONS)
        (folder / RUN).write_text(text)

        with pytest.raises(InputError, match=words):
            sample_to_folder(hand.bundle, folder, N, **OPTIONS)
        with pytest.raises(InputError, match=words):
            read_shards(folder)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n": 0}, "0 images"),
            ({"shard_size": 0}, "shards of 0"),
            ({"batch": 0}, "batches of 0"),
            ({"seed": -1}, "seed -1"),
            ({"format": "jpg"}, "no format 'jpg'"),
            ({"shards": [3]}, "there is no shard 3"),
            ({"shards": [-1, 1, 3, 4, 5]}, "there is no shard -1, 3:6"),
            ({"sampler": "painter"}, "unknown sampler 'painter'"),
            ({"correction": True}, "this bundle has none"),
            ({"eta": float("nan"), "sampler": "ddim"}, "eta"),
        ],
    )
    def test_options_that_cannot_be_meant(
        self, hand: Compiled, tmp_path: Path, options: dict[str, Any], words: str
    ) -> None:
        with pytest.raises(MezzotintError, match=re.escape(words)):
            _sample(hand.bundle, tmp_path / "f", {"n": N, **OPTIONS, **options})
        assert not (tmp_path / "f").exists()

    def test_latents_are_not_images(self, hand: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(hand.bundle, "sample_shape", (4, 8, 8))
        with pytest.raises(InputError, match="samples of 4 channels are latents") as caught:
            sample_to_folder(hand.bundle, tmp_path / "f", N, format="png", **OPTIONS)
        assert "--format npz" in (caught.value.hint or "")
        assert not (tmp_path / "f").exists()

    def test_a_wrong_call_leaves_no_settings_behind(self, hand: Compiled, tmp_path: Path) -> None:
        with pytest.raises(TimestepNotDeployed):
            sample_to_folder(hand.bundle, tmp_path / "f", N, **OPTIONS, steps=3)
        assert not (tmp_path / "f").exists()
        assert sample_to_folder(hand.bundle, tmp_path / "f", N, **OPTIONS).pictures == N

    @pytest.mark.parametrize(
        ("text", "numbers"),
        [("1", (1,)), ("0:3", (0, 1, 2)), (":2", (0, 1)), ("1:", (1, 2)), ("2,0", (0, 2)), ("0:2, 1:3", (0, 1, 2))],
    )
    def test_shards_in_words(self, text: str, numbers: tuple[int, ...]) -> None:
        assert parse_shards(text, N, SIZE) == numbers

    @pytest.mark.parametrize("text", ["", "x", "1:2:3", "-1", "1,", "1.0"])
    def test_odd_words(self, text: str) -> None:
        with pytest.raises(InputError, match="not shards"):
            parse_shards(text, N, SIZE)

    @pytest.mark.parametrize("text", ["3", "0:4", "2:2", "2:1", "3:", "0,3"])
    def test_shards_that_there_are_not(self, text: str) -> None:
        with pytest.raises(InputError, match="no shards") as caught:
            parse_shards(text, N, SIZE)
        assert caught.value.hint == "there are 0:3"


def _sample(bundle: Bundle, folder: Path, options: dict[str, Any]) -> None:
    sample_to_folder(bundle, folder, **options)


class TestReading:
    """read_shards, for evaluations."""

    def test_missing_shards_are_told_with_the_command_that_makes_them(
        self, hand: Compiled, conditioned: Bundle, cli: Cli, tmp_path: Path
    ) -> None:
        folder = tmp_path / "f"
        np.savez(tmp_path / "rows.npz", context=contexts(20))
        given = {**OPTIONS, "conditions": {"context": contexts(20)}, "correction": False}
        sample_to_folder(conditioned, folder, 20, shards=[1], **given)

        with pytest.raises(InputError, match="4 of 5 shards are missing: 0, 2:5") as caught:
            read_shards(folder)

        hint = caught.value.hint or ""
        assert "--shards 0,2:5" in hint
        words = hint.replace("BUNDLE", str(conditioned.path)).replace("FILE", str(tmp_path / "rows.npz")).split()
        answer = cli(*words[1:], "--threads", 1, "--json")
        assert answer.code == 0, answer.err
        assert json.loads(answer.out)["made"] == [0, 2, 3, 4]
        wanted = conditioned.sample(20, sampler="ddpm", seed=3, conditions=given["conditions"], threads=1)
        check_same(joined(folder), wanted)

    def test_the_command_has_every_option(self, hand: Compiled, tmp_path: Path) -> None:
        sample_to_folder(hand.bundle, tmp_path / "f", N, **OPTIONS)
        facts = json.loads((tmp_path / "f" / RUN).read_text())
        facts["settings"] |= {"guidance": 7.5, "empty_prompt": {"context": {"shape": [1, 6]}}, "unused": None}
        facts["run"] = Run(tmp_path, facts["settings"]).digest
        (tmp_path / "f" / RUN).write_text(json.dumps(facts))

        with pytest.raises(InputError, match=r"shard 0 is not whole: .* another run") as caught:
            joined(tmp_path / "f")
        assert (caught.value.hint or "").endswith("--guidance 7.5 --no-correction --empty-prompt FILE --shards 0")

    def test_a_folder_without_samples(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=f"there is no {RUN}"):
            read_shards(tmp_path)

    @pytest.mark.parametrize(("format", "few", "many", "size"), [("npz", 4, 16, 256), ("png", 1, 7, 128)])
    def test_memory_does_not_grow_with_the_shards(
        self, hand: Compiled, tmp_path: Path, format: str, few: int, many: int, size: int
    ) -> None:
        """The peak of few shards (64 KiB, 32 KiB) is the peak of many, but for what waits for the garbage collector."""
        shard = size * 64 * 4
        options: dict[str, Any] = {"shard_size": size, "format": format, "steps": 1, "threads": 1}

        def draw(count: int) -> None:
            sample_to_folder(hand.bundle, tmp_path / f"{count}", size * count, **options)

        def read(count: int) -> None:
            assert sum(len(images) for _, images in read_shards(tmp_path / f"{count}")) == size * count

        def keep(count: int) -> None:
            assert len(joined(tmp_path / f"{count}")) == size * count

        draw(2)  # what is loaded once
        for work in (draw, draw, read):  # made, then checked
            most = peak(work, few) + 4 * shard
            # Python's table of interned names may grow, by megabytes, in any call; it does so once.
            assert peak(work, many) < most or peak(work, many) < most
        with pytest.raises(AssertionError):
            assert peak(keep, many) < peak(keep, few) + 4 * shard


def peak(work: Callable[[int], None], count: int) -> int:
    """The most bytes that numpy and Python held at once during `work(count)`."""
    gc.collect()
    tracemalloc.start()
    try:
        work(count)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class TestCommand:
    """`mezzotint sample -o FOLDER`."""

    def test_in_json_and_again(self, hand: Compiled, cli: Cli, tmp_path: Path) -> None:
        words = ["sample", hand.bundle.path, "-o", tmp_path / "f", "-n", N, "--shard-size", SIZE, "--seed", 3]
        words += ["--sampler", "ddpm", "--threads", 1]

        first = cli(*words, "--shards", "0:2", "--json")
        second = cli(*words)

        printed = json.loads(first.out)
        seconds, engine = printed.pop("seconds"), printed.pop("engine")
        assert seconds > 0
        assert (engine["engine"], engine["threads"], engine["fallback"]) == ("cpu", 1, {})
        assert printed == {
            "output": str(tmp_path / "f"),
            "pictures": N,
            "sampler": "ddpm",
            "steps": 4,
            "eta": 0.0,
            "guidance": 1.0,
            "seed": 3,
            "correction": False,
            "format": "npz",
            "shards": 3,
            "made": [0, 1],
            "skipped": [],
            "pictures_made": 8,
        }
        assert first.err == ""
        assert second.code == 0, second.err
        assert "check shards: 3 done" in second.err
        assert "sample: 2 done" in second.err
        check_same(joined(tmp_path / "f"), hand.bundle.sample(N, sampler="ddpm", seed=3, threads=1))

    def test_a_prediction_writes_nothing(
        self, hand: Compiled, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("mezzotint.cluster.connection.find_spec", lambda name: "installed")  # it is not started
        words = ["sample", hand.bundle.path, "-o", tmp_path / "f", "-n", N, "--shard-size", SIZE, "--threads", 1]
        plain = cli(*words, "--dry-run", "--json")
        assert plain.code == 0, plain.err
        assert not (tmp_path / "f").exists()
        found = json.loads(plain.out)
        assert (found["shards"], found["images"], found["workers"], found["threads"]) == (3, N, 1, 1)
        assert found["seconds"] == pytest.approx(N * found["seconds_per_image"], abs=0.06)
        assert found["core_hours"] == pytest.approx(N * found["seconds_per_image"] / 3600, abs=1e-4)

        cli(*words, "--shards", 1)
        spread = json.loads(cli(*words, "--dry-run", "--json", "--cluster", "local:2").out)
        assert (spread["shards"], spread["images"], spread["workers"]) == (2, 6, 2)
        assert spread["seconds"] == pytest.approx(4 * spread["seconds_per_image"], abs=0.06)
        cli(*words)
        assert json.loads(cli(*words, "--dry-run", "--json").out)["seconds"] == 0
        refused = cli("sample", hand.bundle.path, "-o", tmp_path / "x.png", "--dry-run")
        assert (refused.code, "--dry-run is for folders" in refused.err) == (2, True)

    def test_the_shards_of_a_folder_by_default(self, hand: Compiled, cli: Cli, tmp_path: Path) -> None:
        answer = cli("sample", hand.bundle.path, "-o", tmp_path / "v0.5", "-n", 3, "--format", "png")

        assert answer.code == 0, answer.err
        assert json.loads((tmp_path / "v0.5" / RUN).read_text())["settings"]["shard_size"] == 256
        assert len(joined(tmp_path / "v0.5")) == 3

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("-o", "x.npy", "--shards", "0"), "--shards is for folders"),
            (("-o", "x.png", "--shard-size", "4"), "--shard-size is for folders"),
            (("-o", "x.png", "--format", "png"), "--format is for folders"),
            (("-o", "x.npz"), "cannot write a .npz file"),
            (("-o", "x", "--shards", "1"), "no shards 1"),
            (("-o", "x", "--format", "gif"), "no format 'gif'"),
        ],
    )
    def test_refusals(
        self,
        hand: Compiled,
        cli: Cli,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        options: tuple[str, ...],
        words: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        answer = cli("sample", hand.bundle.path, *options)

        assert (answer.code, answer.out) == (2, "")
        assert words in answer.err
        assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits and SIGKILL are of Unix")
class TestAccidents:
    """A full disk, and a kill."""

    @pytest.mark.parametrize(("format", "limits"), [("npz", [0, 60, 700, 2000]), ("png", [0, 60])])
    def test_a_full_disk(self, hand: Compiled, tmp_path: Path, format: str, limits: list[int]) -> None:
        folder = tmp_path / "f"
        sample_to_folder(hand.bundle, folder, N, format=format, **OPTIONS)
        data = contents(folder)
        words = ["sample", hand.bundle.path, "-o", folder, "-n", N, "--shard-size", SIZE, "--format", format]
        words += ["--sampler", "ddpm", "--seed", 3, "--threads", 1, "--force", "--json"]

        full_disk(limits, words)

        assert contents(folder) == data

    def test_a_kill(self, hand: Compiled, tmp_path: Path) -> None:
        n, size = 1280, 32
        words = ["sample", hand.bundle.path, "-o", tmp_path / "f", "-n", n, "--shard-size", size, "--sampler", "ddpm"]
        command = [sys.executable, "-m", "mezzotint", *map(str, [*words, "--seed", 3, "--threads", 1])]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        try:
            while not (tmp_path / "f" / "shard_00002.npz").exists():
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.001)
        finally:
            process.kill()
            process.wait()
        before = {k: when for k, when in written(tmp_path / "f").items() if k in (RUN, "shard_00000.npz")}
        made = len(list((tmp_path / "f").glob("shard_*.npz")))
        assert 3 <= made < n // size, "it was killed in the middle"

        options = {**OPTIONS, "shard_size": size}
        drawn = sample_to_folder(hand.bundle, tmp_path / "f", n, **options)

        assert drawn.skipped == tuple(range(made))
        assert before.items() <= written(tmp_path / "f").items()
        sample_to_folder(hand.bundle, tmp_path / "whole", n, **options)
        assert contents(tmp_path / "f") == contents(tmp_path / "whole")
