"""The command line: help, refusals, and what stays on disk when a compilation fails, runs out of space or is killed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import numpy_helper

from mezzotint import __version__, open_bundle
from mezzotint.cli.options import plain_warnings
from mezzotint.compiler.audit.kernels import audit_kernels
from mezzotint.compiler.errors import CompileError, OutputError
from mezzotint.compiler.stages import PREFIX
from mezzotint.io.settings import parse_output, parse_roles, parse_settings, parse_size
from mezzotint.passes.recipes.catalog import DEFAULT, RECIPES
from mezzotint.passes.recipes.files import load_recipe, pass_names
from mezzotint.passes.recipes.targets import targets_of
from mezzotint.runtime.errors import InputError, InterpolatedCorrection
from tests.helpers.full_disk import full_disk
from tests.helpers.leftovers import leave_stage
from tests.helpers.models import FAST, INTEGER, THREADS, Answer, Cli, Compiled, hand_written, write

ROOT = Path(__file__).parents[3]
COMMANDS = (
    *("demo", "compile", "export", "sample", "mix", "inspect", "audit", "diff", "debug", "eval", "bench"),
    *("card", "overlay", "overrides", "recipes", "doctor"),
)
HEAVY = {"torch", "diffusers", "onnxruntime", "onnx", "onnx_ir", "numpy"}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its relative path."""
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def refused(answer: Answer, *words: str) -> None:
    """Exit code 2, nothing on standard output, and one message of ours: what, where, what to do."""
    assert answer.code == 2, answer
    assert answer.out == ""
    assert "Traceback" not in answer.err
    assert answer.err.startswith("error: "), answer.err
    assert answer.err.count("error: ") == 1
    assert answer.err.count("what to do: ") == 1, answer.err
    for word in words:
        assert word in answer.err, (word, answer.err)


class TestHelp:
    """Help is quick."""

    @pytest.mark.parametrize("command", COMMANDS)
    def test_every_command_explains_itself(self, cli: Cli, command: str) -> None:
        answer = cli(command, "--help")

        assert answer.code == 0
        assert f"mezzotint {command}" in answer.out
        assert len(answer.out.splitlines()) > 8

    def test_help_lists_every_command(self, cli: Cli) -> None:
        answer = cli("--help")

        assert answer.code == 0
        assert all(command in answer.out for command in COMMANDS)

    def test_the_version(self, cli: Cli) -> None:
        assert cli("--version").out == f"mezzotint {__version__}\n"

    @pytest.mark.parametrize("words", [["--help"], ["compile", "--help"]])
    def test_help_loads_nothing_heavy(self, words: list[str]) -> None:
        code = (
            "import sys; from mezzotint.cli.app import app\ntry: app()\nfinally: print(*sys.modules, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True
        )

        loaded = set(done.stderr.split())
        assert "mezzotint.cli.app" in loaded
        assert loaded & HEAVY == set()

    def test_an_unknown_command(self, cli: Cli) -> None:
        answer = cli("complie")

        assert answer.code == 2
        assert "complie" in answer.err


class TestCompile:
    """What compile does when all is well."""

    def test_the_file_that_somebody_else_exported(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        answer = cli("compile", hand.exported, "-o", tmp_path / "b", *FAST)

        assert answer.code == 0, answer.err
        assert "compiled" in answer.out
        assert "observe: 4 done" in answer.err
        assert open_bundle(tmp_path / "b").manifest.digest == hand.bundle.manifest.digest

    def test_in_json(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        answer = cli("compile", hand.exported, "-o", tmp_path / "b", "--json", *FAST)

        printed = json.loads(answer.out)
        assert answer.err == ""
        assert printed["integer_kernels"] == INTEGER
        assert printed["digest"] == hand.bundle.manifest.digest

    def test_roles_sizes_and_settings_are_handed_on(self, cli: Cli, tmp_path: Path) -> None:
        proto = hand_written(sample="a", timestep="labels", output="made", size=("h", "w"))
        source = write(proto, tmp_path / "m.onnx")
        roles = ["--input", "sample=a", "--input", "timestep=labels", "--output", "v_prediction=made"]
        settings = ["--set", "choose_scales.activations=minmax", "--set", "observe.groups=2"]

        answer = cli("compile", source, "-o", tmp_path / "b", *roles, *settings, "--size", "8x16", *FAST)

        assert answer.code == 0, answer.err
        bundle = open_bundle(tmp_path / "b")
        assert (bundle.signature.sample, bundle.signature.timestep) == ("a", "labels")
        assert (bundle.signature.output, bundle.signature.prediction) == ("made", "v_prediction")
        assert bundle.sample_shape == (1, 8, 16)
        options = {step["pass"]: step.get("options", {}) for step in bundle.manifest.recipe.data["passes"]}
        assert options["choose_scales"]["activations"] == "minmax"
        assert options["observe"] == {"groups": 2, "channels": "none", "samples": None}

    def test_a_recipe_from_a_file(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        printed = cli("recipes", "w8a8").out
        (tmp_path / "mine.yaml").write_text(printed)

        answer = cli("compile", hand.exported, "-o", tmp_path / "b", *FAST, "--recipe", tmp_path / "mine.yaml")

        assert answer.code == 0, answer.err
        assert open_bundle(tmp_path / "b").manifest.digest == hand.bundle.manifest.digest

    def test_conditions(self, cli: Cli, tmp_path: Path) -> None:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        np.savez(tmp_path / "rows.npz", context=np.ones((4, 6), np.float32))
        given = ["--conditions", tmp_path / "rows.npz"]

        compiled = cli("compile", source, "-o", tmp_path / "b", *given, *FAST)
        drawn = cli("sample", tmp_path / "b", "-o", tmp_path / "x.npy", "-n", 4, *given)
        without = cli("sample", tmp_path / "b", "-o", tmp_path / "y.npy", "-n", 4)

        assert (compiled.code, drawn.code) == (0, 0), (compiled.err, drawn.err)
        assert np.load(tmp_path / "x.npy").shape == (4, 1, 8, 8)
        assert without.code == 2
        assert "conditions [] were given, the model takes ['context']" in without.err

    def test_export(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        words = ["export", hand.exported, "-o", tmp_path / "float.onnx", "--scheduler", "sd"]

        assert cli(*words).code == 0
        onnx.checker.check_model(onnx.load(tmp_path / "float.onnx"))
        refused(cli(*words), "the output exists already", "--force")
        assert cli(*words, "--force").code == 0
        assert [f.name for f in tmp_path.iterdir()] == ["float.onnx"]

    def test_no_correction(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        words = [*FAST, "--recipe", "ptqd-w8a8"]
        assert cli("compile", hand.exported, "-o", tmp_path / "b", *words).code == 0
        printed = []
        for i, option in enumerate(([], ["--no-correction"], ["--correction"])):
            answer = cli("sample", tmp_path / "b", "-o", tmp_path / f"{i}.npy", "-n", 3, "--json", *option)
            printed.append(json.loads(answer.out)["correction"])

        assert printed == [True, False, True]
        images = [np.load(tmp_path / f"{i}.npy") for i in range(3)]
        np.testing.assert_array_equal(images[0], images[2])
        assert np.abs(images[0] - images[1]).max() > 0


class TestDryRun:
    """--dry-run checks, prints a plan and writes nothing."""

    def test_nothing_is_written(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        answer = cli("compile", hand.exported, "-o", tmp_path / "b", "--dry-run", "--json", *FAST)

        printed = json.loads(answer.out)
        assert answer.code == 0
        assert printed["signature"]["timestep"] == "t"
        assert printed["passes"][0] == "normalize"
        assert list(tmp_path.iterdir()) == []

    def test_people_read_a_table(self, cli: Cli, tmp_path: Path) -> None:
        answer = cli("compile", "digits", "-o", tmp_path / "b", "--dry-run")

        assert answer.code == 0
        assert "would compile" in answer.out
        assert "choose_scales" in answer.out
        assert list(tmp_path.iterdir()) == []

    def test_it_refuses_what_compile_refuses(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "letter.txt").write_text("dear")
        words = ["compile", hand.exported, "--dry-run", *FAST]

        refused(cli(*words, "-o", tmp_path / "b"), "exists already")
        refused(cli(*words, "-o", tmp_path / "b", "--force"), "Mezzotint did not write it")
        refused(cli(*words, "-o", tmp_path / "c", "--set", "observe.gruops=2"), "'groups'")


class TestBadInput:
    """Each refusal is one message, and the output that exists stays as it is."""

    @pytest.fixture
    def compile_badly(self, cli: Cli, hand: Compiled, tmp_path: Path) -> Callable[..., Answer]:
        """Compile over an existing bundle with --force, which must survive the refusal; `--debug` adds a traceback."""
        target = tmp_path / "bundle"
        shutil.copytree(hand.bundle.path, target)
        before = contents(target)

        def run(model: object, *options: object) -> Answer:
            words = ["compile", model, "-o", target, "--force", *(FAST if "--scheduler" not in options else FAST[2:])]
            answer = cli(*words, *options)
            debugged = cli("--debug", *words, *options)
            assert contents(target) == before
            assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".") or f.suffix == ".failed"] == []
            assert debugged.code == answer.code
            assert "Traceback" in debugged.err
            return answer

        return run

    def test_a_path_that_does_not_exist(self, compile_badly: Callable[..., Answer], tmp_path: Path) -> None:
        refused(compile_badly(tmp_path / "nowhere.onnx"), "no such model", "nowhere.onnx")

    @pytest.mark.parametrize("content", [b"", b"hello", hand_written().SerializeToString()[:5000]])
    def test_a_file_that_is_no_model(
        self, compile_badly: Callable[..., Answer], tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "m.onnx").write_bytes(content)

        refused(compile_badly(tmp_path / "m.onnx"), "m.onnx", "download it again")

    def test_missing_external_data(self, compile_badly: Callable[..., Answer], tmp_path: Path) -> None:
        source = write(hand_written(), tmp_path / "m.onnx", external="m.weights")
        (tmp_path / "m.weights").unlink()

        refused(compile_badly(source), "external data is missing: m.weights", "m.onnx")

    def test_no_recognisable_timestep(self, compile_badly: Callable[..., Answer], tmp_path: Path) -> None:
        source = write(hand_written(timestep="class_labels"), tmp_path / "m.onnx")

        refused(compile_badly(source), "recognised as the timestep", "--input timestep=NAME", "class_labels")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_weights_that_are_not_finite(
        self, compile_badly: Callable[..., Answer], tmp_path: Path, value: float
    ) -> None:
        proto = hand_written()
        tensor = next(t for t in proto.graph.initializer if t.name == "third.w")
        array = numpy_helper.to_array(tensor).copy()
        array[3, 2, 1, 0] = value
        tensor.CopyFrom(numpy_helper.from_array(array, "third.w"))

        refused(compile_badly(write(proto, tmp_path / "m.onnx")), "'third.w' holds NaN or infinite values")

    def test_a_scheduler_of_another_length(self, compile_badly: Callable[..., Answer], tmp_path: Path) -> None:
        config = tmp_path / "s.json"
        config.write_text(json.dumps({"beta_schedule": "linear", "num_train_timesteps": 100}))

        refused(compile_badly("digits", "--scheduler", config), "100 timesteps", "trained with 1000", "s.json")

    @pytest.mark.parametrize(
        ("text", "word"),
        [
            ('{"beta_schedule": "linear", "prediction_type": "flow"}', "unknown prediction_type 'flow'"),
            ('{"beta_schedule": "linear",', "not readable JSON"),
            ("[]", "not a JSON object"),
            ('{"beta_schedule": "bent"}', "beta_schedule"),
            ('{"shift": 3}', "neither a schedule of betas"),
            ('{"trained_betas": [0.1, 0.2], "num_train_timesteps": 1000}', "trained_betas"),
        ],
    )
    def test_a_scheduler_that_is_not_understood(
        self, compile_badly: Callable[..., Answer], hand: Compiled, tmp_path: Path, text: str, word: str
    ) -> None:
        (tmp_path / "s.json").write_text(text)

        answer = compile_badly(hand.exported, "--scheduler", tmp_path / "s.json")

        assert answer.code == 2
        assert answer.err.count("error: ") == 1
        assert word in answer.err
        assert "s.json" in answer.err

    def test_no_scheduler_at_all(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        refused(
            cli("compile", hand.exported, "-o", tmp_path / "b"), "without a scheduler", "--scheduler", "ddpm-linear"
        )

    @pytest.mark.parametrize(
        ("recipe", "words"),
        [
            ("passes: [normalise]", ("no pass called 'normalise'", "did you mean 'normalize'?")),
            (
                "passes: [{pass: observe, options: {gruops: 2}}]",
                ("observe has no option 'gruops'", "did you mean 'groups'?"),
            ),
            (
                "passes: [{pass: split_layers, options: {parts: 2}}]",
                ("split_layers has no option 'parts'", "it has no options"),
            ),
            (
                "passes: [normalize, choose_scales]",
                ("choose_scales needs 'stats'", "normalize -> choose_scales"),
            ),
            (
                "passes: [normalize, observe, choose_scales, insert_qdq, freeze_time]",
                ("freeze_time must come before 'qdq'", "move it to the front"),
            ),
            ("passes: {a: 1}", ("needs a list `passes`",)),
            ("pases: [normalize]", ("no key 'pases'", "did you mean 'passes'?")),
            ("passes: [[normalize]]", ("not a pass",)),
            ("passes: [{pass: observe, options: {groups: many}}]", ("observe.groups", "many")),
        ],
    )
    def test_a_recipe_that_cannot_work(
        self,
        compile_badly: Callable[..., Answer],
        hand: Compiled,
        tmp_path: Path,
        recipe: str,
        words: tuple[str, ...],
    ) -> None:
        (tmp_path / "r.yaml").write_text(recipe)

        refused(compile_badly(hand.exported, "--recipe", tmp_path / "r.yaml"), *words)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--recipe", "w8a9"), ("no recipe called 'w8a9'", "did you mean 'w8a8'?")),
            (("--set", "choose_scale.weights=mse"), ("no pass 'choose_scale'", "did you mean 'choose_scales'?")),
            (("--set", "choose_scales.wieghts=mse"), ("no option 'wieghts'", "did you mean 'weights'?")),
            (("--set", "choose_scales.weights=best"), ("choose_scales.weights", "'best'")),
            (("--set", "weights"), ("not a setting", "pass.option=value")),
            (("--set", "observe.groups=["), ("not a value",)),
            (("--input", "timestep"), ("not a role", "--input timestep=NAME")),
            (("--input", "timestep=k"), ("no input is called 'k'", "t INT64")),
            (("--output", "bundle"), ("not an output", "-o FOLDER")),
            (("--output", "epsilon=z"), ("no output is called 'z'", "y")),
            (("--size", "8 by 8"), ("not a size", "32x32")),
            (("--size", "9x9"), ("samples are 8x8, not 9x9",)),
            (("--prediction", "noise"), ("unknown prediction type 'noise'", "epsilon")),
            (("--sampler", "leapfrog"), ("unknown sampler 'leapfrog'", "ddim")),
            (("--sampler", "flow-euler"), ("needs a schedule of flow matching",)),
            (("--sampler", "heun", "--steps", "6"), ("heun calls timestep 799.2", "timestep_spacing")),
            (("--sampler", "heun", "--eta", "0.5"), ("heun has no eta",)),
            (("--guidance", "-1"), ("guidance is -1",)),
            (("--eta", "2"), ("eta is 2",)),
            (("--steps", "1001"), ("1001 steps are not possible",)),
            (("--conditions", "random.npz"), ("the conditions cannot be read", "random.npz")),
        ],
    )
    def test_options_that_cannot_be_meant(
        self, compile_badly: Callable[..., Answer], hand: Compiled, options: tuple[str, ...], words: tuple[str, ...]
    ) -> None:
        refused(compile_badly(hand.exported, *options), *words)

    def test_an_output_folder_that_exists(self, cli: Cli, hand: Compiled) -> None:
        before = contents(hand.bundle.path)

        refused(cli("compile", hand.exported, "-o", hand.bundle.path, *FAST), "exists already", "--force")
        assert contents(hand.bundle.path) == before

    def test_an_output_folder_that_is_not_ours(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("dear")

        for words in (["compile", hand.exported, *FAST, "--force"], ["demo"]):
            refused(cli(*words, "-o", tmp_path), "Mezzotint did not write it")
        assert contents(tmp_path) == {"letter.txt": b"dear"}

    def test_messages_with_brackets_are_printed_as_they_are(self, cli: Cli, tmp_path: Path) -> None:
        refused(cli("compile", tmp_path / "[bold]m.onnx", "-o", tmp_path / "b"), "[bold]m.onnx")


class TestBundles:
    """A bundle that is not what was written."""

    @pytest.fixture
    def bundle(self, hand: Compiled, tmp_path: Path) -> Path:
        return Path(shutil.copytree(hand.bundle.path, tmp_path / "bundle"))

    @pytest.mark.parametrize("name", ["unet/model.onnx", "scheduler/scheduler_config.json", "README.md"])
    @pytest.mark.parametrize("command", ["sample", "inspect"])
    def test_a_changed_or_missing_file(self, cli: Cli, bundle: Path, tmp_path: Path, command: str, name: str) -> None:
        words = [command, bundle, *(["-o", tmp_path / "x.png"] if command == "sample" else [])]
        data = bytearray((bundle / name).read_bytes())
        data[len(data) // 2] ^= 1
        (bundle / name).write_bytes(data)

        refused(cli(*words), "changed after the bundle was sealed", Path(name).name)
        (bundle / name).unlink()
        refused(cli(*words), "a file of the bundle is missing", Path(name).name)
        assert "Traceback" in cli("--debug", *words).err
        assert not (tmp_path / "x.png").exists()

    def test_a_changed_manifest(self, cli: Cli, bundle: Path) -> None:
        manifest = json.loads((bundle / "mezzotint.json").read_text())
        (bundle / "mezzotint.json").write_text(json.dumps({**manifest, "deployed_timesteps": [1, 2, 3, 4]}))

        refused(cli("inspect", bundle), "manifest was changed")

    def test_the_blocks_of_the_network(self, cli: Cli, hand: Compiled, tmp_path: Path) -> None:
        printed = json.loads(cli("inspect", hand.bundle.path, "--blocks", "--json").out)["blocks"]
        layers = [("first", ["first"]), ("second", ["second", "third"]), ("last", ["last"])]
        assert [(block["name"].split(" ..")[0], block["layers"]) for block in printed] == layers
        assert all(block["parameters"] > 0 for block in printed) and printed[0]["inputs"] == ["x"]
        assert "second .. third" in cli("inspect", hand.bundle.path, "--blocks").out
        refused(cli("inspect", hand.bundle.path, "--blocks", "--html", tmp_path / "page.html"), "--blocks is a table")

    def test_a_folder_that_is_none(self, cli: Cli, tmp_path: Path) -> None:
        refused(cli("inspect", tmp_path), "no mezzotint.json")
        refused(cli("inspect", tmp_path / "nowhere"), "no such folder")

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            (("--steps", "3"), "these numbers of steps work: 1, 2, 4"),
            (("--sampler", "leapfrog"), "unknown sampler"),
            (("--sampler", "euler"), "4 steps of euler call timestep 999, for which this bundle has no row"),
            (("--guidance", "2"), "guidance needs unconditional rows"),
            (("--sampler", "ddpm", "--eta", "0.5"), "ddpm has no eta"),
            (("--correction",), "this bundle has none"),
        ],
    )
    def test_samples_that_it_cannot_draw(
        self, cli: Cli, bundle: Path, tmp_path: Path, options: tuple[str, ...], word: str
    ) -> None:
        refused(cli("sample", bundle, "-o", tmp_path / "x.png", *options), word)
        assert not (tmp_path / "x.png").exists()

    def test_files_that_it_cannot_write(self, cli: Cli, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        wrong = {"x.jpg": "a .jpg file", "file/x.png": "cannot write", "bundle": "no samples were drawn into it"}
        for name, word in wrong.items():
            refused(cli("sample", bundle, "-o", tmp_path / name), word)


class TestReports:
    """recipes and doctor, as text and as JSON."""

    def test_recipes(self, cli: Cli) -> None:
        listed = cli("recipes").out
        assert all(name in listed for name in RECIPES) and "first, last" in listed
        assert f"Usually {DEFAULT}." in cli("compile", "--help").out
        printed = json.loads(cli("recipes", "--json").out)
        assert [r["name"] for r in printed] == list(RECIPES)
        assert {r["name"]: r["islands"] for r in printed} == {n: list(r.islands) for n, r in RECIPES.items()}
        assert {r["name"]: r["targets"] for r in printed} == {n: list(targets_of(r)) for n, r in RECIPES.items()}

    @pytest.mark.parametrize("name", list(RECIPES))
    def test_a_recipe_is_printed_as_yaml_that_reads_back(self, cli: Cli, tmp_path: Path, name: str) -> None:
        printed = cli("recipes", name).out
        (tmp_path / "r.yaml").write_text(printed)

        assert load_recipe(str(tmp_path / "r.yaml")) == RECIPES[name]
        assert json.loads(cli("recipes", name, "--json").out) == yaml.safe_load(printed)

    @pytest.mark.parametrize("name", pass_names())
    def test_a_pass_explains_itself(self, cli: Cli, name: str) -> None:
        printed = json.loads(cli("recipes", name, "--json").out)

        assert printed["pass"] == name
        assert len(printed["description"]) > 100
        assert cli("recipes", name).code == 0

    def test_an_unknown_name(self, cli: Cli) -> None:
        refused(cli("recipes", "flaot"), "no recipe called 'flaot'", "did you mean 'float'?")

    def test_doctor(self, cli: Cli) -> None:
        printed = json.loads(cli("doctor", "--json").out)
        text = cli("doctor")

        assert printed["packages"]["onnxruntime"] in text.out
        assert text.code == 0
        assert printed["expect"]


class TestSettings:
    """What is written on the command line, as data."""

    def test_set(self) -> None:
        words = ["a.b=1", "a.c=0.5", "a.d=true", "a.e=[x, 2]", "a.f=text", "a.g=", "a.h=x=y"]
        wanted: dict[str, Any] = {"b": 1, "c": 0.5, "d": True, "e": ["x", 2], "f": "text", "g": None, "h": "x=y"}

        assert parse_settings(words) == {f"a.{name}": value for name, value in wanted.items()}

    def test_roles(self) -> None:
        assert parse_roles(["sample=x", "timestep=a=b"]) == {"sample": "x", "timestep": "a=b"}

    @pytest.mark.parametrize(
        ("text", "prediction", "expected"),
        [
            (None, None, (None, None)),
            (None, "sample", (None, "sample")),
            ("epsilon=y", None, ("y", None)),
            ("v_prediction=y", None, ("y", "v_prediction")),
            ("epsilon=y", "v_prediction", ("y", "v_prediction")),
        ],
    )
    def test_output(self, text: str | None, prediction: str | None, expected: tuple[str | None, str | None]) -> None:
        assert parse_output(text, prediction) == expected

    @pytest.mark.parametrize(
        ("text", "size"), [(None, None), ("32", (32,)), ("16x24", (16, 24)), ("8x16x16", (8, 16, 16))]
    )
    def test_size(self, text: str | None, size: tuple[int, ...] | None) -> None:
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["x", "8x", "x8", "8x8x8x8x8x8x8x8", "-8", "8.0", "0", "8x0"])
    def test_odd_sizes(self, text: str) -> None:
        with pytest.raises(CompileError, match="not a size"):
            parse_size(text)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits and SIGKILL are of Unix")
class TestAccidents:
    """A full disk and a kill in the middle of a compilation."""

    def test_a_full_disk(self, hand: Compiled, tmp_path: Path) -> None:
        """A limit on the size of files stands for the end of the disk; it strikes earlier or later in the compile."""
        target = Path(shutil.copytree(hand.bundle.path, tmp_path / "bundle"))
        before = contents(target)
        largest = max(len(data) for data in before.values())
        limits = [0, 512, 4000, 9000, 12000, 16000, largest - 1]
        words = ["compile", hand.exported, "-o", target, "--force", "--json", *FAST]

        full_disk(limits, words)

        assert contents(target) == before
        assert [f.name for f in tmp_path.iterdir()] == ["bundle"]

    def test_a_disk_that_is_full_for_onnxruntime(self, hand: Compiled, tmp_path: Path) -> None:
        """It writes a graph too, and would speak of a model that it cannot open."""
        with pytest.raises(OutputError, match="the disk is full") as caught:
            audit_kernels(hand.bundle.model_path, [], tmp_path / "gone")
        assert caught.value.hint
        with pytest.raises(InputError, match="cannot open the model"):
            audit_kernels(tmp_path / "gone.onnx", [], tmp_path)

    def test_a_kill(self, hand: Compiled, cli: Cli, tmp_path: Path) -> None:
        target = Path(shutil.copytree(hand.bundle.path, tmp_path / "bundle"))
        before = contents(target)
        words = ["compile", hand.exported, "-o", target, "--force", "--calibration-samples", "100000", *FAST[:6]]
        process = subprocess.Popen(
            [sys.executable, "-m", "mezzotint", *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        try:
            while not list(tmp_path.glob(f"{PREFIX}*/bundle/passes/*_lower_norms.txt")):
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()

        assert len(list(tmp_path.iterdir())) == 2, "a killed process cannot clean up"
        assert contents(target) == before
        assert open_bundle(target).manifest.digest == hand.bundle.manifest.digest

        answer = cli("compile", hand.exported, "-o", target, "--force", *FAST)

        assert answer.code == 0, answer.err
        assert [f.name for f in tmp_path.iterdir()] == ["bundle"], "the next compile cleaned up"
        assert open_bundle(target).manifest.digest == hand.bundle.manifest.digest

    def test_a_compile_that_still_runs_is_left_alone(self, hand: Compiled, cli: Cli, tmp_path: Path) -> None:
        stage = leave_stage(tmp_path / "bundle", pid=os.getpid())

        assert cli("compile", hand.exported, "-o", tmp_path / "bundle", *FAST).code == 0

        assert stage.is_dir()

    def test_an_interrupt_cleans_up(self, hand: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from mezzotint import compile_model
        from mezzotint.runtime.progress import silent

        def interrupt(stage: str, done: int, total: int) -> None:
            silent(stage, done, total)
            if stage == "observe":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compile_model(hand.exported, tmp_path / "b", scheduler="sd", steps=4, threads=THREADS, progress=interrupt)

        assert list(tmp_path.iterdir()) == []


def test_our_warnings_are_told_without_a_place_in_the_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[str] = []

    def usual(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        others.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", usual)
        with plain_warnings():
            warnings.warn("tables are interpolated", InterpolatedCorrection, stacklevel=1)
            warnings.warn("somebody else's", UserWarning, stacklevel=1)
        assert warnings.showwarning is usual

    assert capsys.readouterr().err == "warning: tables are interpolated\n"
    assert others == ["somebody else's"]
