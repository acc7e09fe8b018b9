"""Hostile settings, condition files, numbers, words and paths, by kind: a right result, or one error of ours.

The seeds are fixed. MEZZOTINT_BATTERY=20 runs twenty times as many inputs, with other seeds.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint import compile_model
from tests.helpers import hostile_texts
from tests.helpers.battery import Battery
from tests.helpers.hostile_texts import ARCHIVES, NASTY, NUMBERS, PLACES, TEXTS, YAML
from tests.helpers.models import SMALL, hand_written

TIMES = int(os.environ.get("MEZZOTINT_BATTERY", "1"))
ROWS = {"c": np.ones((2, 6), np.float32)}
DRY = ("compile", "m/model.onnx", "-o", "out", "--steps", "2", "--conditions", "random", "--dry-run")
PLAN = (*DRY, "--scheduler", "ddpm-linear")
SAMPLE = ("sample", "b", "-o", "s.npy", "-n", "1", "--conditions", "c.npz")
EVAL = ("eval", "b", "--reference", "float.onnx", "-n", "2", "--no-speed", "--resamples", "2")
WEB = ("web", "b", "-o", "out", "--onnxruntime-web", "nowhere")
PAGE = ("inspect", "b", "--html", "out", "--reference", "float.onnx", "-n", "1", "--calls", "1", "--no-profile")
DEBUG = ("debug", "b", "--reference", "float.onnx", "--calls", "1")
MIX = ("mix", "b", "b", "--reference", "float.onnx", "-o", "out", "-n", "1")

SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 100,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.001,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
FLOW: dict[str, Any] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 100, "shift": 3.0}
FIGURES: dict[str, Any] = {
    "bundle": {"digest": "", "name": "b"},
    "metrics": {"psnr": {"value": 30.0, "low": 29.0, "high": 31.0}},
    "speed": {"batch": 1, "threads": 1, "ratio": 2.0},
}
LAYERS: dict[str, Any] = {"layers": [{"layer": "second", "share": 0.5}, {"layer": "third", "share": 0.25}]}
CONFIG: dict[str, Any] = {"_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [8, 16]}
RECIPE = """name: mine
extends: w8a8
passes:
  - normalize
  - pass: observe
    options: {groups: 2, channels: inputs}
  - pass: choose_scales
    options: {activations: percentile, percentile: 99.9}
  - insert_qdq
"""
# file -> (a good text, the command that reads it, what is before and behind it)
FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "scheduler.json": (json.dumps(SCHEDULE, indent=1).encode(), (*DRY, "--scheduler", "scheduler.json")),
    "flow.json": (json.dumps(FLOW, indent=1).encode(), (*DRY, "--scheduler", "flow.json")),
    "recipe.yaml": (RECIPE.encode(), (*PLAN, "--recipe", "recipe.yaml")),
    "figures.json": (json.dumps(FIGURES, indent=1).encode(), ("card", "b", "--eval", "figures.json")),
    "bench.json": (json.dumps(FIGURES, indent=1).encode(), ("card", "b", "--bench", "bench.json")),
    "layers.json": (
        json.dumps(LAYERS, indent=1).encode(),
        ("overlay", "b", "-o", "out", "--what", "cost", "--layers", "layers.json"),
    ),
    "m/config.json": (json.dumps(CONFIG, indent=1).encode(), PLAN),
    "run/sampling.json": (b"", ("sample", "b", "-o", "run", "-n", "2", "--shard-size", "2", "--conditions", "c.npz")),
    "evaluated/eval.json": (b"", (*EVAL, "--conditions", "c.npz", "-o", "evaluated", "--seed", "1")),
}


@pytest.fixture(scope="module")
def battery() -> Iterator[Battery]:
    with Battery() as battery:
        yield battery


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a condition, its bundle `b` and float model, its rows, and two begun runs."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "m").mkdir()
    (folder / "m" / "model.onnx").write_bytes(hand_written(opset=17, context="c").SerializeToString())
    options = {**SMALL, "conditions": ROWS}
    compile_model(folder / "m" / "model.onnx", folder / "b", recipe="w8a8", export=folder / "float.onnx", **options)
    arrays: dict[str, Any] = dict(ROWS)
    np.savez(folder / "c.npz", **arrays)
    return folder


@pytest.fixture
def world(good: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "w"
    shutil.copytree(good, folder)
    return folder


def _run(battery: Battery, world: Path, *command: str) -> None:
    targets = [world / name for name in ("out", "out.failed", "out.data", "s.npy", "run", "evaluated")]
    if command[0] == "card":
        targets += [world / "b" / "README.md", world / "b" / "mezzotint.json"]
    battery.run(command, world=world, targets=targets, partial=command[0] in ("compile", "sample", "eval"))
    for target in targets[:4]:
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def _check(battery: Battery, start: int, *, refused: int = 1) -> None:
    """Require that no outcome is wrong, that some inputs were refused, and that nothing shown is hidden or forged."""
    assert battery.problems_since(start) == []
    outcomes = battery.outcomes[start:]
    assert sum(outcome.refused for outcome in outcomes) >= refused
    for outcome in outcomes:
        shown = outcome.out + outcome.err
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c != "\n"]
        assert outcome.err.count("\nerror: ") + outcome.err.startswith("error: ") <= 1


def test_the_good_inputs_work(battery: Battery, world: Path) -> None:
    """Guards against a battery whose inputs are refused for another reason than their damage."""
    start = len(battery.outcomes)
    begun = [command for text, command in FILES.values() if not text]
    (world / "layers.json").write_bytes(FILES["layers.json"][0])
    (world / "recipe.yaml").write_bytes(FILES["recipe.yaml"][0])
    (world / "scheduler.json").write_bytes(FILES["scheduler.json"][0])
    read = [FILES[name][1] for name in ("recipe.yaml", "scheduler.json", "layers.json")]
    for command in (PLAN, SAMPLE, *begun, *read, (*DEBUG, "--conditions", "c.npz"), PAGE, ("inspect", "b")):
        _run(battery, world, *command)
    assert battery.problems_since(start) == []
    assert [(o.arguments, o.err) for o in battery.outcomes[start:] if o.code != 0] == []


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_text(name: str, battery: Battery, world: Path) -> None:
    """Settings, figures and runs in JSON and YAML: bytes, nesting, long numbers, values of another type."""
    start = len(battery.outcomes)
    text, command = FILES[name]
    file = world / name
    if not text:
        _run(battery, world, *command)
        text = file.read_bytes()
    if name.startswith(("figures", "bench")):
        digest = json.loads((world / "b" / "mezzotint.json").read_text(encoding="utf-8"))["digest"]
        text = text.replace(b'"digest": ""', b'"digest": "%s"' % digest.encode())
    texts = [hostile_texts.text(kind, text, seed) for kind in TEXTS for seed in range(2 * TIMES)]
    if name.endswith("json"):
        texts += [hostile_texts.odd_json(json.loads(text), seed) for seed in range(18 * TIMES)]
    else:
        texts += YAML.values()
    for damaged in texts:
        file.write_bytes(damaged)
        _run(battery, world, *command)
    _check(battery, start, refused=len(texts) // 4 if "eval.json" not in name else 0)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_hostile_condition_file(kind: str, battery: Battery, world: Path) -> None:
    start = len(battery.outcomes)
    commands = (SAMPLE, (*DEBUG, "--conditions", "c.npz"), (*EVAL, "--conditions", "c.npz"), SAMPLE)
    for seed in range(20 * TIMES):
        (world / "c.npz").write_bytes(hostile_texts.npz(kind, ROWS, seed))
        _run(battery, world, *commands[seed % 4])
    _check(battery, start, refused=8 * TIMES)


OF_NUMBERS = {
    PLAN: "--steps --eta --guidance --calibration-samples --calibration-batch --seed --size --min-sqnr --channels",
    SAMPLE: "-n --steps --eta --guidance --seed --batch --threads",
    ("sample", "b", "-o", "run", "-n", "2", "--conditions", "c.npz"): "--shards --shard-size",
    (*EVAL, "--conditions", "c.npz"): "-n --seed --batch --resamples --threads",
    (*DEBUG, "--conditions", "c.npz"): "-n --calls --top --seed --threads",
    PAGE: "-n --calls --seed --threads",
    ("bench", "b", "--repeats", "1", "--rounds", "1"): "--batch --threads --repeats --rounds",
    ("audit", "b"): "--threads",
    WEB: "-n --steps --eta --seed",
}
SIZES = [(command, option) for command, options in OF_NUMBERS.items() for option in options.split()]


@pytest.mark.parametrize("part", range(4))
def test_an_absurd_number(part: int, battery: Battery, world: Path) -> None:
    start = len(battery.outcomes)
    for i, (command, option) in enumerate(SIZES):
        for j, number in enumerate(NUMBERS):
            if (i + j) % 4 == part and (TIMES > 1 or (i + j // 4) % 4 == 0):
                _run(battery, world, *command, f"{option}={number}" if option.startswith("--") else option + number)
    _check(battery, start, refused=20)


OF_WORDS = {
    PLAN: "--recipe --set --scheduler --sampler --input --output --prediction --timestep-unit --license --size",
    SAMPLE: "--sampler --conditions --unconditional",
    ("sample", "b", "-o", "run", "-n", "2"): "--format --shards",
    ("diff", "b", "--from", "normalize"): "--to",
    ("overlay", "b", "-o", "out"): "--what --layers",
    ("card", "b"): "--license --base-model --eval --bench",
    (*EVAL, "--conditions", "c.npz"): "--features --reference",
    MIX: "--cost --budget",
    WEB: "--sampler --onnxruntime-web",
    ("inspect",): "",
    ("recipes",): "",
    ("audit",): "",
    ("compile", "-o", "out"): "",
    ("",): "",
}
WORDS = [(command, option) for command, options in OF_WORDS.items() for option in options.split() or [""]]


@pytest.mark.parametrize("part", range(3))
def test_a_nasty_word(part: int, battery: Battery, world: Path) -> None:
    """Names of recipes, settings, samplers, roles, files and commands with markup, control characters, forged lines."""
    start = len(battery.outcomes)
    for i, (command, option) in enumerate(WORDS):
        for j, word in enumerate(NASTY):
            if (i + j) % 3 != part or (TIMES == 1 and (i + j // 3) % 2):
                continue
            value = {"--set": f"observe.groups={word}", "--cost": f"{word}=1", "--input": f"sample={word}"}.get(
                option, word
            )
            _run(battery, world, *(w for w in command if w), f"{option}={value}" if option else value)
    _check(battery, start, refused=40)


def test_odd_places(battery: Battery, world: Path, tmp_path: Path) -> None:
    """Folders, pipes, devices, links in a ring and names that are too long, where a file is expected."""
    start = len(battery.outcomes)
    readers = (
        *((*PLAN, "--recipe"), (*DRY, "--scheduler"), (*SAMPLE, "--conditions"), ("card", "b", "--eval")),
        *(
            ("overlay", "b", "-o", "out", "--what", "cost", "--layers"),
            (*EVAL, "--reference"),
            ("inspect",),
            ("audit",),
        ),
        *(("compile", "-o", "out"), ("recipes",), ("bench", "b", "--repeats", "1", "--float"), (*EVAL, "--features")),
        *((*WEB, "--float"), ("web", "b", "-o", "out", "--onnxruntime-web")),
    )
    for kind in PLACES:
        if kind == "unreadable" and os.geteuid() == 0:
            continue  # the administrator reads everything
        folder = tmp_path / kind
        folder.mkdir()
        path = hostile_texts.place(kind, folder)
        for reader in readers:
            _run(battery, world, *reader, path)
    _check(battery, start, refused=7 * len(readers))


def test_names_reach_no_reader_raw(battery: Battery, tmp_path: Path) -> None:
    """Nodes, inputs and files with markup and control characters: tables, pages, cards and the programs in them."""
    start = len(battery.outcomes)
    names = [name for name in NASTY if name and "\x00" not in name and "\udcff" not in name and len(name) < 99]
    model = hand_written(opset=17, context="c\"'\\{}[/]\n\x1b[31m")
    for i, (node, name) in enumerate(zip(model.graph.node, names * 9, strict=False)):
        node.name = f"{node.name}{i} {name}"
    world = tmp_path / "w"
    world.mkdir()
    source = world / "[bold]m[red] \x1b[31m\n.onnx"
    source.write_bytes(model.SerializeToString())
    compile_model(source, world / "b", recipe="w8a8", export=world / "float.onnx", **{**SMALL, "conditions": "random"})
    for command in (
        ("inspect", "b", "--all"),
        ("audit", "b", "--all"),
        DEBUG,
        ("diff", "b", "--from", "1", "--to", "4"),
        PAGE,
    ):
        _run(battery, world, *command, *(("--conditions", "x.npz") if command is DEBUG else ()))
    _check(battery, start, refused=0)
    card = (world / "b" / "README.md").read_text(encoding="utf-8")
    assert not [c for c in card if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c != "\n"]
    programs = re.findall(r"^```python\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)
    assert len(programs) >= 2
    for program in programs:
        ast.parse(program)
    for program in programs:
        if "InferenceSession" in program or "open_bundle" in program:
            ran = subprocess.run(
                [sys.executable, "-c", program], cwd=world / "b", capture_output=True, text=True, check=False
            )
            assert ran.returncode == 0, ran.stderr


def test_interrupts_and_processes(world: Path) -> None:
    """A sample of the same inputs in processes of their own, with the exit code and the streams that a shell sees."""
    (world / "recipe.yaml").write_bytes(YAML["bomb"])
    for command in (
        (*PLAN, "--recipe", "recipe.yaml"),
        (*PLAN, "--steps", "9" * 5_000),
        ("inspect", "\x1b[31m\nerror: forged"),
    ):
        ran = subprocess.run(
            [sys.executable, "-m", "mezzotint", *command],
            cwd=world,
            capture_output=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        assert ran.returncode == 2
        assert ran.stdout == b""
        assert b"Traceback" not in ran.stderr
        assert b"\x1b" not in ran.stderr
