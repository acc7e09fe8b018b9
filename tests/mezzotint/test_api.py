"""compile_model, export_model, sample: from a model to pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import mezzotint
from mezzotint import Bundle, compile_model, export_model, open_bundle, sample
from mezzotint.compiler import frontend
from mezzotint.compiler.audit.kernels import INTEGER_KERNELS
from mezzotint.compiler.core.verify import relative_difference
from mezzotint.compiler.errors import ConditionError, ModelError, OutputError, RecipeError
from mezzotint.compiler.stages import OLD
from mezzotint.runtime.bundle.bundle import MANIFEST
from mezzotint.runtime.bundle.manifest import TIME_KEYS
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import InputError, TimestepNotDeployed
from mezzotint.runtime.session import Denoiser, open_session
from tests.helpers.leftovers import leave_stage
from tests.helpers.models import (
    CONTEXT,
    CONVS,
    FAST,
    INTEGER,
    SCHEDULER,
    SMALL,
    THREADS,
    TIME_LAYERS,
    Cli,
    Compiled,
    hand_written,
    prompts,
    write,
)

ROOT = Path(__file__).parents[2]
EXACT_DB = 60.0  # a float bundle compared with the float export: rounding of float32 only
Files = Mapping[str, bytes]


def noise(*shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def files(folder: Path) -> Files:
    """Every file of a folder by its relative path; times are taken out of the manifest."""
    found = {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    if MANIFEST in found:
        found[MANIFEST] = json.dumps(without_times(json.loads(found[MANIFEST]))).encode()
    return found


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if k not in TIME_KEYS}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def same(one: Files, other: Files) -> None:
    assert sorted(one) == sorted(other)
    assert [name for name in one if one[name] != other[name]] == []


def hidden(folder: Path) -> list[str]:
    """What a compilation leaves next to its target: stage folders, reproducers."""
    return [f.name for f in folder.iterdir() if f.name.startswith(".") or f.name.endswith(".failed")]


@pytest.fixture(scope="module")
def floating(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return compile_model(hand.exported, tmp_path_factory.mktemp("float") / "bundle", recipe="float", **SMALL)


@pytest.fixture(scope="module")
def corrected(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("ptqd")
    return compile_model(hand.exported, folder / "bundle", recipe="ptqd-w8a8", **{**SMALL, "eta": 0.5})


def pictures(model: Path, bundle: Bundle, n: int = 4) -> npt.NDArray[np.float32]:
    """Drawn by an ONNX file as the bundle would draw them."""
    from mezzotint.runtime.sampling import samplers

    net = Denoiser(model, bundle.signature, threads=THREADS)
    x, noise = samplers.initial_noise(0, (n, *bundle.sample_shape)), samplers.seeded_noise(0)
    return samplers.sample(net, x, bundle.schedule, bundle.deployment, noise=noise)


class TestEndToEnd:
    """Sources of all kinds become bundles that draw."""

    def test_a_hand_written_file(self, hand: Compiled) -> None:
        images = hand.bundle.sample(5, batch=2, threads=THREADS)

        assert images.shape == (5, 1, 8, 8)
        assert np.isfinite(images).all()
        np.testing.assert_array_equal(images, sample(hand.bundle.path, 5, batch=3, threads=THREADS))
        kernels = hand.bundle.manifest.kernels
        assert (kernels.integer, kernels.floating) == (INTEGER, CONVS - INTEGER)
        assert hand.bundle.manifest.source.name == "hand.onnx"

    def test_a_unet(self, unet: Compiled) -> None:
        images = unet.bundle.sample(3, batch=2, threads=THREADS)

        assert images.shape == (3, 1, 8, 8)
        assert np.isfinite(images).all()
        assert unet.bundle.deployed_timesteps == (0, 250, 500, 750)

    def test_a_conditional_unet(self, conditional: Compiled) -> None:
        given = {"encoder_hidden_states": prompts(3)}
        images = conditional.bundle.sample(3, batch=2, threads=THREADS, conditions=given)
        other = conditional.bundle.sample(
            3, threads=THREADS, conditions={"encoder_hidden_states": 3 * given["encoder_hidden_states"]}
        )

        assert images.shape == (3, 4, 8, 8)
        assert np.isfinite(images).all()
        assert np.abs(images - other).max() > 1e-3, "the prompt still matters"

    def test_every_layer_but_the_islands_runs_as_integers(
        self, unet: Compiled, conditional: Compiled, tmp_path: Path
    ) -> None:
        for number, compiled in enumerate((unet, conditional)):
            kernels, islands = compiled.bundle.manifest.kernels, compiled.bundle.manifest.islands
            assert {n for n, row in kernels.layers.items() if not row.integer} == set(islands)
            assert len(islands) == 2
            built = tmp_path / f"{number}.onnx"
            open_session(compiled.bundle.model_path, optimized=built)  # counted once more, by other means
            names = [node.op_type for node in onnx.load(built, load_external_data=False).graph.node]
            integer = sum(name in INTEGER_KERNELS for name in names)
            assert integer == kernels.integer >= len(kernels.layers) - len(islands)

    def test_the_prediction_stays_close(self, unet: Compiled, conditional: Compiled) -> None:
        given = {"encoder_hidden_states": prompts(2)}
        for compiled, conditions in ((unet, {}), (conditional, given)):
            bundle = compiled.bundle
            x, t = noise(2, *bundle.sample_shape), bundle.deployment.timesteps[1]
            want = Denoiser(compiled.exported, bundle.signature, threads=THREADS)(x, t, **conditions)
            assert relative_difference(want, bundle.denoiser(THREADS)(x, t, **conditions)) < 0.1

    def test_a_batch_that_is_written_into_the_graph(self, tmp_path: Path) -> None:
        source = write(hand_written(batch=3), tmp_path / "m.onnx")

        bundle = compile_model(source, tmp_path / "bundle", recipe="ptqd-w8a8", **SMALL)

        free = compile_model(write(hand_written(), tmp_path / "free.onnx"), tmp_path / "other", recipe="w8a8", **SMALL)
        assert bundle.manifest.kernels.integer == INTEGER
        images, expected = (b.sample(4, threads=THREADS, correction=False) for b in (bundle, free))
        assert float(np.median(psnr_db(expected, images, peak=2.0))) > 30

    def test_a_size_that_is_open_stays_open(self, tmp_path: Path) -> None:
        source = write(hand_written(size=("h", "w")), tmp_path / "m.onnx")

        bundle = compile_model(source, tmp_path / "bundle", size=(8, 16), **SMALL)

        assert bundle.sample_shape == (1, 8, 16)
        assert bundle.denoiser(THREADS)(noise(2, 1, 12, 10), 0).shape == (2, 1, 12, 10)

    def test_roles_can_be_said(self, tmp_path: Path) -> None:
        source = write(hand_written(sample="a", timestep="class_labels"), tmp_path / "m.onnx")

        bundle = compile_model(
            source,
            tmp_path / "bundle",
            inputs={"sample": "a", "timestep": "class_labels"},
            output_name="y",
            prediction="v_prediction",
            **SMALL,
        )

        assert bundle.signature.to_json() == {
            "sample": "a",
            "timestep": "class_labels",
            "output": "y",
            "conditions": [],
            "prediction": "v_prediction",
        }
        with pytest.raises(ModelError, match="roles of inputs"):
            compile_model("digits", tmp_path / "digits", output_name="y")

    def test_progress_is_reported(self, hand: Compiled, tmp_path: Path) -> None:
        calls: list[tuple[str, int, int]] = []

        compile_model(hand.exported, tmp_path / "b", progress=lambda *a: calls.append(a), **SMALL)

        last = {stage: (done, total) for stage, done, total in calls}
        assert {"import hand.onnx", "passes", "observe", "freeze_time"} <= set(last)
        assert all(done == total for done, total in last.values())


class TestPlainOnnxruntime:
    """BUNDLE/unet/model.onnx is an ordinary file that runs without us."""

    def run(self, bundle: Bundle, t: float, x: npt.NDArray[np.float32], **more: Any) -> npt.NDArray[Any]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        session = ort.InferenceSession(str(bundle.model_path), options, providers=["CPUExecutionProvider"])
        first, second = bundle.signature.sample, bundle.signature.timestep
        return np.asarray(session.run(None, {first: x, second: np.full(len(x), t), **more})[0])

    def test_inputs_keep_their_names(self, hand: Compiled, unet: Compiled, conditional: Compiled) -> None:
        names = []
        for compiled in (hand, unet, conditional):
            model = onnx.load(compiled.bundle.model_path)
            onnx.checker.check_model(model)
            names.append([v.name for v in model.graph.input])
        assert names == [["x", "t"], ["sample", "timestep"], ["sample", "timestep", "encoder_hidden_states"]]

    def test_it_computes_what_our_runtime_computes(self, unet: Compiled, conditional: Compiled) -> None:
        given = {"encoder_hidden_states": prompts(2)}
        for bundle, more in ((unet.bundle, {}), (conditional.bundle, given)):
            x, t = noise(2, *bundle.sample_shape), bundle.deployment.timesteps[0]
            np.testing.assert_array_equal(self.run(bundle, t, x, **more), bundle.denoiser(THREADS)(x, t, **more))

    @pytest.mark.parametrize(("t", "row"), [(260, 250), (999, 750), (1, 0), (374, 250), (375, 250), (376, 500)])
    def test_a_timestep_outside_the_table_takes_the_nearest_row(self, hand: Compiled, t: int, row: int) -> None:
        x = noise(2, 1, 8, 8)

        found = self.run(hand.bundle, t, x)

        np.testing.assert_array_equal(found, self.run(hand.bundle, row, x))
        for other in {0, 250, 500, 750} - {row}:
            assert np.abs(found - self.run(hand.bundle, other, x)).max() > 0

    def test_our_runtime_refuses_it(self, hand: Compiled) -> None:
        with pytest.raises(TimestepNotDeployed, match=r"260 has no row .* nearest are 250, 500"):
            hand.bundle.denoiser(THREADS)(noise(2, 1, 8, 8), 260)
        with pytest.raises(TimestepNotDeployed, match="5 steps of ddim call timestep"):
            hand.bundle.sample(1, steps=5)

    def test_a_batch_that_mixes_timesteps_is_refused(self, hand: Compiled) -> None:
        with pytest.raises(InputError, match="one call has one timestep"):
            hand.bundle.denoiser(THREADS)(noise(2, 1, 8, 8), np.array([0, 250]))

    def test_its_readme_names_them(self, conditional: Compiled) -> None:
        text = (conditional.bundle.path / "README.md").read_text()

        assert "`sample`, `timestep`, `encoder_hidden_states`" in text
        assert "tables for 4 timesteps" in text


class TestReproducible:
    """The same compilation gives the same bytes."""

    def test_twice_in_one_process(self, hand: Compiled, tmp_path: Path) -> None:
        again = compile_model(hand.exported, tmp_path / "elsewhere", recipe="w8a8", dump_passes=False, **SMALL)

        same(files(hand.bundle.path), files(again.path))
        assert again.manifest.digest == hand.bundle.manifest.digest

    def test_another_seed_is_another_bundle(self, hand: Compiled, tmp_path: Path) -> None:
        other = compile_model(hand.exported, tmp_path / "b", recipe="w8a8", seed=1, **SMALL)

        assert other.manifest.digest != hand.bundle.manifest.digest
        assert files(other.path)["unet/model.onnx"] != files(hand.bundle.path)["unet/model.onnx"]

    def test_in_two_processes(self, unet: Compiled, corrected: Bundle, hand: Compiled, tmp_path: Path) -> None:
        seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # not the one of this process
        code = (
            "import sys; from mezzotint import compile_model; from tests.helpers.models import SMALL, small_unet\n"
            "compile_model(small_unet(), sys.argv[1], recipe='w8a8', **SMALL)\n"
            "compile_model(sys.argv[2], sys.argv[3], recipe='ptqd-w8a8', **{**SMALL, 'eta': 0.5})\n"
        )
        arguments = [str(tmp_path / "unet"), str(hand.exported), str(tmp_path / "hand")]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, check=True, timeout=300)

        same(files(unet.bundle.path), files(tmp_path / "unet"))
        same(files(corrected.path), files(tmp_path / "hand"))
        assert open_bundle(tmp_path / "unet").manifest.digest == unet.bundle.manifest.digest


class TestRecipes:
    """Recipes differ as they say."""

    def test_float_is_exact(self, hand: Compiled, floating: Bundle) -> None:
        psnr = psnr_db(pictures(hand.exported, floating), floating.sample(4, threads=THREADS), peak=2.0)

        assert float(psnr.min()) > EXACT_DB
        assert floating.manifest.quantizers == ()
        assert floating.manifest.kernels.integer == 0
        assert floating.manifest.kernels.floating == CONVS, f"{TIME_LAYERS} time layers became tables"

    def test_one_weight_off_by_one_per_cent_is_seen(self, hand: Compiled, floating: Bundle, tmp_path: Path) -> None:
        model = onnx.load(hand.exported)
        tensor = next(t for t in model.graph.initializer if t.name == "second.w")
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), "second.w"))

        psnr = psnr_db(pictures(write(model, tmp_path / "m.onnx"), floating), floating.sample(4), peak=2.0)

        assert float(psnr.max()) < EXACT_DB

    def test_ptqd_brings_a_correction_that_is_applied(self, corrected: Bundle) -> None:
        assert corrected.correction is not None
        assert corrected.correction.deployment == corrected.deployment
        assert corrected.correction_for(corrected.deployment) is corrected.correction
        assert [row["timestep"] for row in corrected.manifest.noise["calls"]] == list(corrected.deployment.calls)
        with_it = corrected.sample(3, threads=THREADS)
        without = corrected.sample(3, threads=THREADS, correction=False)
        np.testing.assert_array_equal(corrected.sample(3, threads=THREADS, correction=True), with_it)
        assert 0 < np.abs(with_it - without).max() < 0.5

    def test_readers_are_told_of_the_noise(self, corrected: Bundle, hand: Compiled) -> None:
        card, plain = ((bundle.path / "README.md").read_text() for bundle in (corrected, hand.bundle))
        assert corrected.manifest.noise["summary"] in card and "Quantization noise" not in plain
        assert f"It was made for {corrected.deployment}." in card
        picture = (corrected.path / "noise.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and b"matplotlib" not in picture.lower()
        assert not (hand.bundle.path / "noise.png").exists()

    def test_the_correction_is_for_one_sampler_only(self, corrected: Bundle, hand: Compiled) -> None:
        np.testing.assert_array_equal(
            corrected.sample(2, eta=0.0, threads=THREADS),
            corrected.sample(2, eta=0.0, threads=THREADS, correction=False),
        )
        with pytest.raises(InputError, match="fitted for"):
            corrected.sample(2, eta=0.0, correction=True)
        with pytest.raises(InputError, match="this bundle has none"):
            hand.bundle.sample(2, correction=True)

    def test_settings_reach_the_pass(self, hand: Compiled, tmp_path: Path) -> None:
        settings: dict[str, Any] = dict.fromkeys(("choose_scales.activation_bits", "choose_scales.output_bits"), 4)
        settings["choose_scales.activations"] = "minmax"
        coarse = compile_model(hand.exported, tmp_path / "b", recipe="w8a8", settings=settings, **SMALL)

        want = pictures(hand.exported, coarse)
        good, bad = (float(np.median(psnr_db(want, b.sample(4), peak=2.0))) for b in (hand.bundle, coarse))
        assert good > bad + 10
        assert {q.format for q in coarse.manifest.quantizers} == {"uint4", "int8"}

    @pytest.mark.parametrize(
        "settings",
        [
            {"choose_scales.activation_bits": 0},
            {"choose_scales.weight_bits": 9},
            {"choose_scales.percentile": 20},
            {"observe.groups": -1},
            {"observe.groups": "many"},
        ],
    )
    def test_values_out_of_range_are_refused(self, hand: Compiled, tmp_path: Path, settings: dict[str, Any]) -> None:
        with pytest.raises(RecipeError):
            compile_model(hand.exported, tmp_path / "b", settings=settings, **SMALL)


class TestConditions:
    """A conditional model is calibrated on given conditions."""

    @pytest.fixture
    def refuse(self, tmp_path: Path) -> Callable[..., ConditionError]:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")

        def run(conditions: Any, **options: Any) -> ConditionError:
            with pytest.raises(ConditionError) as caught:
                compile_model(source, tmp_path / "b", conditions=conditions, **{**SMALL, **options})
            assert sorted(f.name for f in tmp_path.iterdir() if f.suffix != ".npz") == ["m.onnx"], "nothing is left"
            return caught.value

        return run

    @pytest.mark.parametrize("recipe", ["w8a8", "float"])
    def test_missing(self, refuse: Callable[..., ConditionError], recipe: str) -> None:
        error = refuse(None, recipe=recipe)

        assert "'context'" in error.what
        assert "--conditions" in (error.hint or "")

    @pytest.mark.parametrize("shape", [(2, 5), (2,), (2, CONTEXT, 1), (0, CONTEXT)])
    def test_of_a_wrong_shape(self, refuse: Callable[..., ConditionError], shape: tuple[int, ...]) -> None:
        assert f"shape {list(shape)}" in refuse({"context": np.zeros(shape, np.float32)}).what

    def test_of_a_wrong_type(self, refuse: Callable[..., ConditionError]) -> None:
        error = refuse({"context": np.zeros((2, CONTEXT))})

        assert "float64; the model wants float32" in error.what
        assert "astype" in (error.hint or "")

    def test_unknown(self, refuse: Callable[..., ConditionError]) -> None:
        rows = np.zeros((2, CONTEXT), np.float32)

        error = refuse({"context": rows, "contxt": rows})

        assert "no condition 'contxt'" in error.what
        assert "context" in (error.hint or "")

    def test_for_a_model_without_any(self, hand: Compiled, tmp_path: Path) -> None:
        with pytest.raises(ConditionError, match="no condition 'context'"):
            compile_model(hand.exported, tmp_path / "b", conditions={"context": np.zeros((1, 1))}, **SMALL)

    @pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off", None])
    def test_files_that_hold_none(
        self, refuse: Callable[..., ConditionError], tmp_path: Path, content: bytes | None
    ) -> None:
        path = tmp_path / "given.npz"
        if content is not None:
            path.write_bytes(content)

        error = refuse(path)

        assert error.where == str(path)
        assert "numpy.savez" in (error.hint or "")

    def test_a_single_array_is_no_archive(self, refuse: Callable[..., ConditionError], tmp_path: Path) -> None:
        with (tmp_path / "given.npz").open("wb") as file:
            np.save(file, np.zeros((2, CONTEXT), np.float32))

        assert "cannot read the conditions" in refuse(tmp_path / "given.npz").what

    def test_from_a_file_and_random(self, tmp_path: Path) -> None:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        rows = np.random.default_rng(0).standard_normal((3, CONTEXT)).astype(np.float32)
        np.savez(tmp_path / "given.npz", context=rows)

        one = compile_model(source, tmp_path / "a", conditions={"context": rows}, **SMALL)
        two = compile_model(source, tmp_path / "b", conditions=tmp_path / "given.npz", **SMALL)
        three = compile_model(source, tmp_path / "c", conditions="random", **SMALL)

        assert one.manifest.digest == two.manifest.digest != three.manifest.digest
        assert one.sample(2, conditions={"context": rows[:1]}).shape == (2, 1, 8, 8)


class TestOutput:
    """What exists stays as it is until all is written."""

    def test_an_existing_output_is_refused_and_untouched(self, hand: Compiled) -> None:
        before = files(hand.bundle.path)

        with pytest.raises(OutputError, match="exists already") as caught:
            compile_model(hand.exported, hand.bundle.path, **SMALL)

        assert caught.value.where == str(hand.bundle.path)
        same(before, files(hand.bundle.path))

    def test_force_replaces_a_bundle(self, hand: Compiled, tmp_path: Path) -> None:
        first = compile_model(hand.exported, tmp_path / "b", recipe="float", **SMALL)
        (first.path / "note.txt").write_text("from before")
        with pytest.raises(OutputError, match="a file that Mezzotint did not write"):
            compile_model(hand.exported, tmp_path / "b", recipe="w8a8", force=True, **SMALL)
        (first.path / "note.txt").unlink()

        second = compile_model(hand.exported, tmp_path / "b", recipe="w8a8", force=True, **SMALL)

        same(files(second.path), files(hand.bundle.path))
        assert hidden(tmp_path) == []

    def test_force_replaces_nothing_but_bundles(self, hand: Compiled, tmp_path: Path) -> None:
        folder = tmp_path / "documents"
        folder.mkdir()
        (folder / "letter.txt").write_text("dear")
        for target in (folder, folder / "letter.txt"):
            with pytest.raises(OutputError, match="Mezzotint did not write it"):
                compile_model(hand.exported, target, force=True, **SMALL)

        assert (folder / "letter.txt").read_text() == "dear"
        (folder / "letter.txt").unlink()
        assert compile_model(hand.exported, folder, force=True, **SMALL).path == folder, "an empty folder is no loss"

    def test_a_failure_with_force_keeps_the_old_bundle(self, hand: Compiled, tmp_path: Path) -> None:
        first = compile_model(hand.exported, tmp_path / "b", recipe="float", **SMALL)
        before = files(first.path)
        source = write(hand_written(context="context"), tmp_path / "m.onnx")

        with pytest.raises(ConditionError):
            compile_model(source, tmp_path / "b", force=True, **SMALL)

        same(before, files(first.path))
        assert hidden(tmp_path) == []

    def test_a_folder_that_cannot_be_made(self, hand: Compiled, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        with pytest.raises(OutputError, match="cannot write") as caught:
            compile_model(hand.exported, tmp_path / "file" / "b", **SMALL)

        assert caught.value.hint

    def test_a_swap_that_was_killed_is_undone(self, hand: Compiled, tmp_path: Path) -> None:
        """Between two renames the old bundle lies in the stage folder only."""
        old = compile_model(hand.exported, tmp_path / "b", recipe="float", **SMALL)
        before = files(old.path)
        old.path.rename(leave_stage(tmp_path / "b") / OLD)

        broken = hand_written()
        weight = next(t for t in broken.graph.initializer if t.name == "first.w")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.nan), "first.w"))
        with pytest.raises(ModelError, match="NaN"):
            compile_model(write(broken, tmp_path / "m.onnx"), tmp_path / "b", force=True, **SMALL)

        same(before, files(tmp_path / "b"))
        assert hidden(tmp_path) == []

    def test_the_module_is_left_as_it_was(self, unet: Compiled, conditional: Compiled) -> None:
        assert unet.module.training
        assert not conditional.module.training


class TestExport:
    """export_model writes what a compilation starts from."""

    def test_it_is_what_compile_exports(self, unet: Compiled, hand: Compiled, tmp_path: Path) -> None:
        path = export_model(hand.exported, tmp_path / "float.onnx", scheduler="ddpm-linear")

        x, signature = noise(2, 1, 8, 8), hand.bundle.signature
        want = Denoiser(hand.exported, signature, threads=THREADS)(x, 5)
        np.testing.assert_array_equal(Denoiser(path, signature, threads=THREADS)(x, 5), want)
        assert [v.name for v in onnx.load(unet.exported).graph.input] == ["sample", "timestep"]

    def test_a_file_that_is_there_is_refused_before_anything_runs(
        self, cli: Cli, hand: Compiled, tmp_path: Path
    ) -> None:
        kept = tmp_path / "float.onnx"
        kept.write_bytes(b"mine")
        words = ["compile", hand.exported, "-o", tmp_path / "b", "--export", kept, *FAST]
        for more in ([], ["--dry-run"]):
            said = cli(*words, *more)
            assert said.code != 0 and "float.onnx" in said.err and "passes" not in said.err
        assert kept.read_bytes() == b"mine" and not (tmp_path / "b").exists()
        assert cli(*words, "--force").code == 0
        assert [v.name for v in onnx.load(kept).graph.input] == [v.name for v in onnx.load(hand.exported).graph.input]

    def test_it_takes_what_compile_has_to_be_said(self, cli: Cli, tmp_path: Path) -> None:
        """Names of inputs and outputs, extra channels, a unit of the timestep: the file is that of the compilation."""
        model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[batch,9,8,8] latents, float[batch] when) => (float[batch,1,1,1] other, float[batch,4,8,8] wanted) {
          other = Reshape (when, column) warm = Add (latents, other)
          wanted = Conv <pads = [1,1,1,1]> (warm, w) }""")
        weight = np.random.default_rng(1).standard_normal((4, 9, 3, 3)).astype(np.float32) / 9
        constants = {"w": weight, "column": np.array([-1, 1, 1, 1])}
        model.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in constants.items())
        path = write(model, tmp_path / "m.onnx")
        said: tuple[Any, ...] = (
            "--input",
            "sample=latents",
            "--input",
            "timestep=when",
            "--output-name",
            "sample=wanted",
        )
        said += ("--timestep-unit", "fraction", "--channels", "4", "--scheduler", SCHEDULER)

        refused = cli("export", path, "-o", tmp_path / "a.onnx", *said[:4], *said[6:])
        assert refused.code == 2 and "--output-name epsilon=NAME" in refused.err and not (tmp_path / "a.onnx").exists()
        assert cli("export", path, "-o", tmp_path / "a.onnx", *said).code == 0
        wrong = cli("export", path, "-o", tmp_path / "c.onnx", *said, "--output-name", "wanted")
        assert wrong.code == 2 and "--output-name epsilon=NAME" in wrong.err

        roles: dict[str, Any] = {"inputs": {"sample": "latents", "timestep": "when"}, "output_name": "wanted"}
        roles |= {"prediction": "sample", "timestep_unit": "fraction", "channels": 4, "conditions": "random"}
        exported = tmp_path / "b.onnx"
        bundle = compile_model(path, tmp_path / "bundle", recipe="float", export=exported, **roles, **SMALL)
        assert (tmp_path / "a.onnx").read_bytes() == exported.read_bytes()
        conditions = {name: np.zeros((2, 5, 8, 8), np.float32) for name in bundle.signature.conditions}
        assert len(conditions) == 1
        x, t = noise(2, 4, 8, 8), bundle.deployment.timesteps[1]
        want = Denoiser(tmp_path / "a.onnx", bundle.signature, threads=THREADS)(x, t, **conditions)
        np.testing.assert_allclose(bundle.denoiser(THREADS)(x, t, **conditions), want, atol=1e-5)

    def test_an_existing_file_is_kept(self, hand: Compiled, tmp_path: Path) -> None:
        (tmp_path / "float.onnx").write_bytes(b"mine")

        with pytest.raises(OutputError, match="exists already"):
            export_model(hand.exported, tmp_path / "float.onnx", scheduler="ddpm-linear")
        assert (tmp_path / "float.onnx").read_bytes() == b"mine"
        export_model(hand.exported, tmp_path / "float.onnx", scheduler="ddpm-linear", force=True)
        onnx.checker.check_model(onnx.load(tmp_path / "float.onnx"))

    def test_a_place_that_cannot_be_written(self, hand: Compiled, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")

        with pytest.raises(OutputError, match="cannot write"):
            export_model(hand.exported, tmp_path / "file" / "float.onnx", scheduler="ddpm-linear")


def test_without_torch_diffusers_models_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(frontend, "from_torch", raising=False)
    monkeypatch.delitem(sys.modules, "mezzotint.compiler.frontend.from_torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)

    stages: list[tuple[str, int, int]] = []

    with pytest.raises(ModelError, match="needs torch, which is not installed") as caught:
        compile_model("digits", tmp_path / "b", progress=lambda *call: stages.append(call))

    assert stages == [("load torch", 0, 1)], "reported before the import, which takes seconds"
    assert "mezzotint[torch]" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_the_door_is_what_it_says() -> None:
    assert sorted(mezzotint.__all__) == dir(mezzotint)
    assert all(getattr(mezzotint, name) is not None for name in mezzotint.__all__)
    with pytest.raises(AttributeError, match="no attribute 'compile'"):
        _ = mezzotint.compile


@pytest.mark.parametrize("budget", [{"calibration_samples": 0}, {"calibration_batch": 0}])
def test_nothing_to_calibrate_on_is_refused(hand: Compiled, tmp_path: Path, budget: dict[str, int]) -> None:
    with pytest.raises(ConditionError, match="nothing to calibrate on"):
        compile_model(hand.exported, tmp_path / "bundle", scheduler="ddpm-linear", **budget)  # type: ignore[arg-type]
    assert not (tmp_path / "bundle").exists()
