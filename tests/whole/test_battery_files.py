"""Hostile model files and bundles, by kind: each command gives a right result, or one error of ours.

The seeds are fixed. MEZZOTINT_BATTERY=20 runs twenty times as many inputs, with other seeds.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mezzotint import compile_model
from tests.helpers import hostile_bundles, hostile_folders, hostile_models
from tests.helpers.battery import Battery
from tests.helpers.models import SMALL, hand_written, small_unet

TIMES = int(os.environ.get("MEZZOTINT_BATTERY", "1"))
SCHEDULER = ("--scheduler", "ddpm-linear")
TINY = (*SCHEDULER, "--steps", "2", "--recipe", "w8a8", "--calibration-samples", "1", "--threads", "1", "--quiet")
FLOAT = "float.onnx"

# Commands for a model file, for a bundle `b` beside a good one `good`, and for a float model beside a good bundle.
OF_MODEL = (
    ("compile", "m/model.onnx", "-o", "out", *TINY),
    ("compile", "m/model.onnx", "-o", "out", *SCHEDULER, "--dry-run"),
    ("export", "m/model.onnx", "-o", "out", *SCHEDULER, "--quiet"),
    ("audit", "m/model.onnx", "--threads", "1"),
)
OF_BUNDLE = (
    ("inspect", "b"),
    ("inspect", "b", "--json"),
    ("sample", "b", "-o", "s.npy", "-n", "1"),
    ("audit", "b", "--threads", "1"),
    ("diff", "b", "good"),
    ("diff", "good", "b"),
    ("diff", "b", "--from", "normalize", "--to", "observe"),
    ("eval", "b", "--reference", FLOAT, "-n", "2", "--no-speed", "--resamples", "2"),
    ("debug", "b", "--reference", FLOAT, "--calls", "1"),
    ("bench", "b", "--repeats", "1", "--rounds", "1"),
    ("card", "b"),
    ("overlay", "b", "-o", "out"),
    ("overlay", "b", "-o", "out", "--what", "scale"),
    ("overrides", "b", "--float", FLOAT, "-o", "out"),
    ("mix", "one=b", "two=good", "--reference", FLOAT, "-o", "out", "-n", "1"),
    ("inspect", "b", "--html", "out", "--reference", FLOAT, "-n", "1", "--calls", "1", "--no-profile"),
    ("compile", "b", "-o", "out"),
)
OF_FLOAT = (
    ("eval", "good", "--reference", "m/model.onnx", "-n", "2", "--no-speed", "--resamples", "2"),
    ("debug", "good", "--reference", "m/model.onnx", "--calls", "1"),
    ("bench", "good", "--float", "m/model.onnx", "--repeats", "1", "--rounds", "1"),
    ("overrides", "good", "--float", "m/model.onnx", "-o", "out"),
    ("mix", "one=good", "two=other", "--reference", "m/model.onnx", "-o", "out", "-n", "1"),
    ("inspect", "good", "--html", "out", "--reference", "m/model.onnx", "-n", "1", "--calls", "1", "--no-profile"),
)
SLOW_KINDS = {"many_nodes"}  # to build; once is enough


@pytest.fixture(scope="module")
def battery() -> Iterator[Battery]:
    with Battery() as battery:
        yield battery


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle `b` that has a correction, and its float model."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "m.onnx").write_bytes(hand_written(opset=17).SerializeToString())
    compile_model(folder / "m.onnx", folder / "b", recipe="ptqd-w8a8", export=folder / FLOAT, **SMALL)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder."""
    folder = tmp_path_factory.mktemp("saved") / "m"
    small_unet().save_pretrained(folder)  # type: ignore[operator]
    return folder


def _seeds(kind: str, count: int) -> range:
    """Return other seeds for a longer battery: the first ones are those of every run."""
    return range(1 if kind in SLOW_KINDS else count * TIMES)


def _world(folder: Path, good: Path, *bundles: str) -> Path:
    folder.mkdir(parents=True)
    for name in bundles:
        shutil.copytree(good / "b", folder / name)
    if bundles:
        for file in good.glob(f"{FLOAT}*"):
            shutil.copy(file, folder)
    return folder


def _run(battery: Battery, command: tuple[str, ...], world: Path) -> None:
    targets = [world / name for name in ("out", "out.failed", "out.data", "s.npy")]
    for target in targets:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    if command[0] == "card":
        targets += [world / "b" / "README.md", world / "b" / "mezzotint.json"]
    battery.run(command, world=world, targets=targets, partial="compile" in command)


def _refusals(battery: Battery, start: int) -> int:
    return sum(outcome.refused for outcome in battery.outcomes[start:])


@pytest.mark.parametrize("kind", [*hostile_models.KINDS, *hostile_models.EXTERNAL])
def test_a_hostile_model_file(kind: str, battery: Battery, tmp_path: Path) -> None:
    model = hand_written(opset=17)
    start = len(battery.outcomes)
    for seed in _seeds(kind, 4):
        world = _world(tmp_path / str(seed), tmp_path)
        (world / "m").mkdir()
        if kind in hostile_models.KINDS:
            (world / "m" / "model.onnx").write_bytes(hostile_models.damaged(kind, model, seed))
        else:
            hostile_models.damaged_external(kind, model, seed, world / "m")
        for command in (OF_MODEL[seed % 2], OF_MODEL[2 + seed // 2 % 2]):
            _run(battery, command, world)
        shutil.rmtree(world)
    assert battery.problems_since(start) == []
    harmless = {"unsorted", "flipped_bits", "flipped_structure", "names", "input_types", "wrong_value_info"}
    assert kind in harmless or _refusals(battery, start) > 0


@pytest.mark.parametrize("kind", list(hostile_bundles.KINDS))
def test_a_hostile_bundle(kind: str, battery: Battery, good: Path, tmp_path: Path) -> None:
    start = len(battery.outcomes)
    for seed in _seeds(kind, 6):
        world = _world(tmp_path / str(seed), good, "b", "good")
        hostile_bundles.damage(kind, world / "b", seed)
        for command in random.Random(f"{kind} {seed}").sample(OF_BUNDLE, 3):
            _run(battery, command, world)
        shutil.rmtree(world)
    assert battery.problems_since(start) == []
    assert _refusals(battery, start) > 0


@pytest.mark.parametrize("kind", ["garbage", "truncated", "folder", "a bundle", "another network", "loop_bomb", "pipe"])
def test_a_hostile_float_model(kind: str, battery: Battery, good: Path, tmp_path: Path) -> None:
    start = len(battery.outcomes)
    for seed in range(TIMES):
        world = _world(tmp_path / str(seed), good, "good", "other")
        file = world / "m" / "model.onnx"
        if kind != "a bundle":
            file.parent.mkdir()
        if kind == "folder":
            file.mkdir()
        elif kind == "pipe":
            os.mkfifo(file)
        elif kind == "a bundle":
            shutil.copytree(good / "b", world / "m")
            (world / "m" / "unet" / "model.onnx").replace(file)
        elif kind == "another network":
            other = hand_written(opset=17, sample="latent", size=(4, 4), context="c")
            file.write_bytes(other.SerializeToString())
        else:
            file.write_bytes(hostile_models.damaged(kind, hand_written(opset=17), seed))
        for command in OF_FLOAT:
            _run(battery, command, world)
        shutil.rmtree(world)
    assert battery.problems_since(start) == []
    assert _refusals(battery, start) > 0


@pytest.mark.parametrize("kind", sorted(set(hostile_folders.KINDS) - {"config_value"}))
def test_a_hostile_diffusers_folder(kind: str, battery: Battery, saved: Path, tmp_path: Path) -> None:
    start = len(battery.outcomes)
    for seed in range(3 * TIMES):
        world = tmp_path / str(seed)
        shutil.copytree(saved, world / "m")
        hostile_folders.damage(kind, world / "m", seed)
        _run(battery, ("export", "m", "-o", "out", *SCHEDULER, "--quiet"), world)
        shutil.rmtree(world)
    assert battery.problems_since(start) == []
    assert all(outcome.refused for outcome in battery.outcomes[start:])


def test_the_battery_sees_a_traceback_and_a_file_outside(tmp_path: Path) -> None:
    from tests.helpers.battery import differences, judged, snapshot

    before = snapshot(tmp_path)
    (tmp_path / "outside").write_text("x", encoding="utf-8")
    (tmp_path / "target").write_text("x", encoding="utf-8")
    assert differences(before, snapshot(tmp_path, [tmp_path / "target"])) == [str(tmp_path / "outside")]
    assert judged(0, "fine", "", 1.0, 0) == judged(2, "", "error: no", 1.0, 0) == ""
    for wrong in (
        judged(1, "", "error: no", 1.0, 0),
        judged(2, "", "Traceback (most recent call last):\n", 1.0, 0),
        judged(2, "", "", 1.0, 0),
        judged(2, "", "error: no", 11.0, 0),
        judged(2, "", "error: no", 1.0, 2 << 30),
        judged(2, "", "error: \x07", 1.0, 0),
    ):
        assert wrong
