"""Every finished file is run beside its float model: its figures are in the manifest, and what is wrong is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from mezzotint import compile_model, open_bundle
from mezzotint.compiler.acceptance.effort import call_groups, choose_effort, float_call_seconds
from mezzotint.compiler.bundle import writer
from mezzotint.compiler.core.program import Plan, Program
from mezzotint.compiler.errors import AcceptanceError, RecipeError
from mezzotint.runtime.bundle.bundle import MANIFEST, MODEL, Bundle
from mezzotint.runtime.bundle.manifest import TIME_KEYS, Manifest
from mezzotint.runtime.compare import PEAK, StepSQNR, psnr_db
from mezzotint.runtime.errors import CompileWarning, LowFidelity
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.streams import SeedOffset
from tests.helpers.models import FAST, SMALL, Cli, hand_written
from tests.helpers.tiny import tiny_program


def compiled(folder: Path, **options: Any) -> Bundle:
    onnx.save(hand_written(), folder / "net.onnx")
    return compile_model(folder / "net.onnx", folder / "bundle", **{**SMALL, "recipe": "w8a8", **options})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("accepted")
    return compiled(folder, export=folder / "float.onnx")


def test_the_figures_are_those_of_both_files_on_noise_of_their_own(bundle: Bundle) -> None:
    accepted = bundle.manifest.acceptance
    assert accepted is not None and not accepted.warning and not accepted.note
    assert accepted.seed == SeedOffset.ACCEPTANCE.after(0)
    exact = Denoiser(bundle.path.parent / "float.onnx", bundle.signature, threads=2)
    mine = bundle.denoiser(2)
    sqnr = StepSQNR()
    x = samplers.initial_noise(accepted.seed, (1, *bundle.sample_shape))
    images = samplers.sample(
        exact,
        x,
        bundle.schedule,
        bundle.deployment,
        callback=lambda info: sqnr.add(info.index, info.output, mine(info.x, info.timestep)),
    )
    drawn = bundle.sample(1, seed=accepted.seed)
    psnr = psnr_db(np.clip(images, -1, 1), np.clip(drawn, -1, 1), peak=PEAK)

    assert [group.sqnr_db for group in accepted.groups] == pytest.approx(list(sqnr.per_step().values()), abs=0.02)
    assert list(accepted.psnr_db) == pytest.approx(psnr.tolist(), abs=0.02)
    assert {"float_call", "call", "batch", "acceptance"} == set(accepted.seconds)


def test_the_figures_are_in_the_card_and_times_are_in_no_hash(bundle: Bundle) -> None:
    accepted = bundle.manifest.acceptance
    assert accepted is not None
    card = (bundle.path / "README.md").read_text(encoding="utf-8")
    data = json.loads((bundle.path / MANIFEST).read_text(encoding="utf-8"))

    assert accepted.sqnr_text() in card and accepted.psnr_text() in card and "ms against" not in card
    assert "seconds" in TIME_KEYS and "seconds" in data["acceptance"]
    assert Manifest.from_json(data, "here").acceptance == accepted
    del data["acceptance"]
    assert Manifest.from_json(data, "a bundle of an earlier version").acceptance is None


def spoiled(change: Callable[[onnx.ModelProto], None]) -> Callable[[ir.Model, Path], None]:
    """Return a `save_model` that changes the finished file as a fault of the compiler would."""
    save = writer.save_model

    def saved(model: ir.Model, path: Path) -> None:
        save(model, path)
        if path.as_posix().endswith(MODEL):
            proto = onnx.load(path)
            change(proto)
            onnx.save(proto, path)

    return saved


def not_finite(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 1:
            tensor.CopyFrom(numpy_helper.from_array(np.full(tensor.dims, np.nan, np.float32), tensor.name))


def refused(proto: onnx.ModelProto) -> None:
    scale = next(node.input[1] for node in proto.graph.node if node.op_type == "QuantizeLinear")
    for tensor in proto.graph.initializer:
        if tensor.name == scale:
            tensor.CopyFrom(numpy_helper.from_array(np.ones(3, np.float32), scale))


def wrong_shape(proto: onnx.ModelProto) -> None:
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    wrong = numpy_helper.to_array(weight)[:, :-1]
    weight.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(wrong), weight.name))


@pytest.mark.parametrize(
    ("change", "words"), [(not_finite, "not finite"), (refused, "does not run"), (wrong_shape, "does not run")]
)
def test_a_file_that_is_not_right_is_an_error_and_no_bundle(
    change: Callable[[onnx.ModelProto], None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "save_model", spoiled(change))

    with pytest.raises(AcceptanceError, match=words) as caught:
        compiled(tmp_path)
    assert caught.value.where and caught.value.hint
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_low_fidelity_names_layers_and_what_helps(tmp_path: Path) -> None:
    with pytest.warns(LowFidelity, match=r"SQNR of the prediction .* below the 90 dB"):
        bundle = compiled(tmp_path, min_sqnr=90.0)
    accepted = bundle.manifest.acceptance
    assert accepted is not None and accepted.layers
    quantized = {name for name, layer in bundle.manifest.kernels.layers.items() if layer.integer}
    assert {layer.layer for layer in accepted.layers} <= quantized
    for layer in accepted.layers:
        assert layer.layer in accepted.warning.partition("What helps")[2]

    with pytest.raises(AcceptanceError, match="below the 90 dB"):
        compile_model(tmp_path / "net.onnx", tmp_path / "strict", recipe="w8a8", min_sqnr=90.0, strict=True, **SMALL)
    assert not (tmp_path / "strict").exists()


def test_the_command_warns_in_one_line_and_strict_is_an_error(cli: Cli, tmp_path: Path) -> None:
    onnx.save(hand_written(), tmp_path / "net.onnx")
    line = ("compile", tmp_path / "net.onnx", "-o", tmp_path / "b", *FAST, "--min-sqnr", "90", "--quiet")
    roles = ("--set", "insert_qdq.islands=[first, attention]")
    with warnings.catch_warnings():
        warnings.simplefilter("default", LowFidelity)
        warnings.simplefilter("default", CompileWarning)
        warned, refused = cli(*line, *roles), cli(*line, "--strict", "--force")

    assert warned.code == 0 and warned.err.count("warning: the compiled file is inaccurate") == 1
    assert "What helps: " in warned.err and "SQNR of the prediction" in warned.out
    assert refused.code == 2 and "error: the compiled file is inaccurate" in refused.err
    assert "what to do: " in refused.err and "Traceback" not in refused.err
    manifest = open_bundle(tmp_path / "b").manifest  # that of the first command, still whole
    assert manifest.acceptance is not None

    missing = "insert_qdq: no layer has the role 'attention'"
    assert warned.err.count(f"warning: {missing}; name the layers") == 1 and "role 'attention'" not in refused.err
    assert [text.partition(";")[0] for text in manifest.warnings] == [missing]
    assert missing in (tmp_path / "b" / "README.md").read_text(encoding="utf-8")
    assert cli("inspect", tmp_path / "b").out.count("no layer has the role") == 1


def test_the_options_of_the_warning_keep_those_layers_in_float(bundle: Bundle, tmp_path: Path) -> None:
    layer = next(name for name, kernel in bundle.manifest.kernels.layers.items() if kernel.integer)
    islands = [*("first", "second", "penultimate", "last"), layer]
    other = compiled(tmp_path, settings={"insert_qdq.islands": islands}, recipe="w8a8")
    assert not other.manifest.kernels.layers[layer].integer


@pytest.mark.parametrize(("layer", "factor"), [("second", 300.0), ("second", 60.0)])
def test_outlier_channels_are_named_with_the_recipes_that_help(layer: str, factor: float, tmp_path: Path) -> None:
    model = hand_written()
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor).copy()
        if tensor.name == f"{layer}.w":
            array[3] *= factor
        elif tensor.name == "third.w":
            array[:, 3] /= factor
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, tmp_path / "net.onnx")
    options: dict[str, Any] = {**SMALL, "min_sqnr": 90.0, "settings": {"insert_qdq.islands": ["first", "last"]}}

    accepted = compile_model(tmp_path / "net.onnx", tmp_path / "b", recipe="w8a8", **options).manifest.acceptance
    assert accepted is not None
    found = next(layer for layer in accepted.layers if layer.layer == "third")
    assert "times as large as most" in found.why and "smoothquant, repq or ditas" in accepted.warning


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_limits_are_numbers(value: float, tmp_path: Path) -> None:
    for name in ("min_sqnr", "acceptance_seconds"):
        with pytest.raises(RecipeError, match=name.replace("_", "-")):
            compiled(tmp_path, **{name: value})


def test_the_float_recipe_is_run_too(tmp_path: Path) -> None:
    accepted = compiled(tmp_path, recipe="float").manifest.acceptance
    assert accepted is not None
    assert all(group.sqnr_db is None or group.sqnr_db > 60 for group in accepted.groups)


def test_a_small_budget_measures_less_and_says_so(tmp_path: Path) -> None:
    accepted = compiled(tmp_path, acceptance_seconds=0.0).manifest.acceptance
    assert accepted is not None and "budget of 0 s" in accepted.note
    assert accepted.psnr_db == () and all(group.sqnr_db is not None for group in accepted.groups)
    again = open_bundle(tmp_path / "bundle")
    assert again.manifest.acceptance == accepted


@pytest.mark.parametrize("steps", [1, 7, 10, 23])
@pytest.mark.parametrize("rows", [1, 3, 23])
def test_groups_cover_every_call_once(steps: int, rows: int) -> None:
    program = tiny_program(steps=steps)
    groups = tuple(k * min(rows, steps) // steps for k in range(len(program.deployment.timesteps)))
    for planned in (program, replace(program, plan=Plan(groups=groups))):
        spans = call_groups(planned)
        assert [call for first, last in spans for call in range(first, last + 1)] == list(range(steps))
        assert len(spans) <= 10


def test_effort_grows_with_the_budget_and_the_calibration() -> None:
    program = tiny_program(steps=20)
    quantized: Program = replace(program, float_model=program.model)
    call = float_call_seconds(quantized)
    assert call > 0
    efforts = [choose_effort(quantized, 64, call * calls) for calls in (1, 35, 50, 90, 1000)]
    assert [effort.images for effort in efforts] == [1, 1, 1, 2, 4]
    assert [effort.draws for effort in efforts] == [False, True, True, True, True]
    assert [len(effort.compared) for effort in efforts] == [10, 10, 20, 20, 20]
    assert [bool(effort.note) for effort in efforts] == [True, True, True, True, False]
    assert choose_effort(quantized, 8, 1e9).images == 1
