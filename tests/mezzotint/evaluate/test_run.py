"""`mezzotint eval`: paired numbers, a folder that continues where it stopped, refusals, the command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mezzotint import Bundle, compile_model, mix_bundles
from mezzotint.bench.pairs import compare
from mezzotint.compiler.bundle.card_figures import METRIC_NAMES
from mezzotint.compiler.errors import OutputError
from mezzotint.evaluate.memory import memory_of_one_call
from mezzotint.evaluate.report import OTHER_WEIGHTS, markdown
from mezzotint.evaluate.result import Evaluation
from mezzotint.evaluate.run import PAGE_FILE, RESULT_FILE, evaluate_bundle
from mezzotint.evaluate.shards import PairSampler
from mezzotint.runtime.errors import InputError
from tests.helpers.feature_nets import feature_net
from tests.helpers.leftovers import leave_stage
from tests.helpers.models import SMALL, THREADS, Cli, Compiled, hand_written, write
from tests.helpers.tiny import tiny_model

N, SHARD = 10, 4
FEW: dict[str, Any] = {"batch": 2, "threads": THREADS, "speed": False, "resamples": 20, "shard_size": SHARD}


class Stopped(Exception):
    """The run was interrupted, as by Ctrl-C."""


@dataclass(frozen=True)
class Case:
    """A bundle, its float model, a feature network, and the evaluation that was never stopped."""

    bundle: Bundle
    reference: Path
    net: str
    folder: Path
    found: Evaluation

    def evaluate(self, folder: Path | None = None, n: int = N, **options: Any) -> Evaluation:
        settings = {**FEW, "features": self.net, **options}
        return evaluate_bundle(self.bundle, self.reference, n, output=folder, **settings)


@pytest.fixture(scope="module")
def case(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("eval")
    net = str(feature_net(folder / "net.onnx"))
    found = evaluate_bundle(hand.bundle, hand.exported, N, output=folder / "whole", **FEW, features=net)
    return Case(hand.bundle, hand.exported, net, folder / "whole", found)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def stopping_after(pictures: int) -> Any:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "pairs of images" and done >= pictures:
            raise Stopped

    return progress


class TestNumbers:
    """The numbers."""

    def test_they_are_those_of_compare(self, case: Case) -> None:
        wanted, metrics = compare(case.bundle, case.reference, N, batch=2, threads=THREADS), case.found.metrics

        assert metrics["eps_sqnr_db"]["value"] == pytest.approx(wanted.sqnr.pooled(), rel=1e-9)
        assert metrics["psnr_db_median"]["value"] == pytest.approx(float(np.median(wanted.psnr)), rel=1e-9)
        assert metrics["psnr_db_p10"]["value"] in wanted.psnr
        assert case.found.worst_step == wanted.sqnr.worst()[0]
        steps = case.found.eps_sqnr_db_per_step
        assert [s["db"] for s in steps] == pytest.approx(list(wanted.sqnr.per_step().values()), rel=1e-9)
        assert [s["timestep"] for s in steps] == list(case.bundle.deployment.calls)

    def test_every_metric_has_a_value_or_a_reason(self, case: Case) -> None:
        metrics = case.found.metrics

        assert set(metrics) == set(METRIC_NAMES)
        for name, metric in metrics.items():
            if metric["value"] is None:
                assert (name, metric["why"]) == ("sfid", f"{case.net} has no spatial features") or (
                    name == "lpips_mean" and "installed" in metric["why"]
                )
            else:
                low, high = metric["interval"]
                assert low <= high and metric["resamples"] == 20
        assert 0 <= metrics["agreement"]["value"] <= 1
        assert metrics["frechet"]["value"] < 0.1 and metrics["precision"]["value"] > 0.8
        assert json.loads(json.dumps(case.found.to_json(), allow_nan=False)) == case.found.to_json()

    def test_the_facts_of_the_measurement(self, case: Case) -> None:
        found, manifest = case.found, case.bundle.manifest

        assert found.reference["same_weights"] is True
        assert found.kernels["integer"] == manifest.kernels.integer > 0
        assert found.kernels["islands"] == manifest.islands
        size = found.size
        assert size["float_bytes"] == case.reference.stat().st_size
        assert size["share"] == pytest.approx(size["bytes"] / size["float_bytes"], abs=1e-6)
        assert (found.speed, found.memory, found.correction) == (None, None, False)

    def test_shards_and_folders_change_nothing(self, case: Case) -> None:
        assert case.evaluate().metrics == case.found.metrics
        whole = case.evaluate(shard_size=64)
        assert whole.metrics == case.found.metrics
        assert case.evaluate(seed=5).metrics != case.found.metrics

    def test_conditions_are_cut_like_the_shards(self, tmp_path: Path) -> None:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        given = {"context": np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)}
        bundle = compile_model(source, tmp_path / "b", conditions=given, **SMALL)

        def found(rows: slice, **options: Any) -> Any:
            here = {"context": given["context"][rows].copy()}
            return evaluate_bundle(bundle, source, 3, **{**FEW, "conditions": here, "batch": 1, **options}).metrics

        parts, whole, other = found(slice(None), shard_size=1), found(slice(None)), found(slice(None, None, -1))
        assert parts == whole
        assert other["eps_sqnr_db"] != whole["eps_sqnr_db"]
        in_turn = {"context": given["context"][[0, 1, 0]]}
        assert found(slice(0, 2)) == found(slice(None), conditions=in_turn)

    def test_guidance(self, tmp_path: Path) -> None:
        """The guided predictions are compared; their errors are larger."""
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        given, empty = ({"context": np.full((1, 6), value, np.float32)} for value in (1, 0))
        rows: dict[str, Any] = {"conditions": given, "unconditional": empty}
        bundle = compile_model(source, tmp_path / "b", guidance=5.0, **rows, **SMALL)

        found = evaluate_bundle(bundle, source, 3, **rows, **FEW)

        wanted = compare(bundle, source, 3, batch=2, threads=THREADS, **rows)
        assert found.metrics["eps_sqnr_db"]["value"] == pytest.approx(wanted.sqnr.pooled(), rel=1e-9)
        with pytest.raises(InputError, match="guidance needs unconditional rows"):
            evaluate_bundle(bundle, source, 3, conditions=given, **FEW)

    def test_the_float_bundle_has_no_difference(self, hand: Compiled, tmp_path: Path) -> None:
        bundle = compile_model(hand.exported, tmp_path / "b", recipe="float", **SMALL)

        metrics = evaluate_bundle(bundle, bundle.model_path, 5, **FEW).metrics

        assert metrics["eps_sqnr_db"] == {"value": None, "why": "there is no difference"}
        assert metrics["psnr_db_median"] == metrics["psnr_db_p10"] == metrics["eps_sqnr_db"]
        assert metrics["ssim_mean"]["value"] == pytest.approx(1)
        assert "no --features were given" in metrics["frechet"]["why"]

    def test_the_correction_affects_the_images_only(self, tmp_path: Path) -> None:
        source = write(hand_written(), tmp_path / "m.onnx")
        bundle = compile_model(source, tmp_path / "b", recipe="ptqd-w8a8", **{**SMALL, "eta": 0.5})

        on, off = (evaluate_bundle(bundle, source, 4, correction=choice, **FEW) for choice in (None, False))

        assert (on.correction, off.correction) == (True, False)
        assert on.metrics["eps_sqnr_db"] == off.metrics["eps_sqnr_db"]
        assert on.metrics["sample_sqnr_db"] != off.metrics["sample_sqnr_db"]

    def test_several_precisions(self, hand: Compiled, tmp_path: Path) -> None:
        exact = compile_model(hand.exported, tmp_path / "float", recipe="float", **SMALL)
        parts = {"float": exact, "w8a8": hand.bundle}
        options: dict[str, Any] = {"costs": {"float": 1.0, "w8a8": 0.5}, "pictures": 2, "threads": THREADS}
        mixed = mix_bundles(parts, tmp_path / "m", reference=hand.exported, budget=0.75, **options)

        found = evaluate_bundle(mixed, hand.exported, 2, **{**FEW, "speed": True})

        by_call = zip(mixed.manifest.require_mixture().calls, found.eps_sqnr_db_per_step, strict=True)
        exact_calls = {name: step["db"] is None or step["db"] > 80 for name, step in by_call}
        assert exact_calls == {"float": True, "w8a8": False}
        assert found.speed is not None and found.memory is not None
        assert found.speed["ratio"]["value"] > 0 and found.memory["bundle"]["added"] > 0

    def test_latents(self, tmp_path: Path) -> None:
        source = write(onnx_of(tiny_model(4)), tmp_path / "m.onnx")
        bundle = compile_model(source, tmp_path / "b", recipe="w8a8", **SMALL)

        metrics = evaluate_bundle(bundle, source, 2, **FEW).metrics

        assert metrics["sample_sqnr_db"]["value"] > 0
        assert "4 channels are latents" in metrics["psnr_db_mean"]["why"]
        with pytest.raises(InputError, match="4 channels are latents"):
            evaluate_bundle(bundle, source, 2, **{**FEW, "features": "tests.helpers.feature_nets:Means"})

    def test_a_torch_extractor(self, case: Case) -> None:
        found = case.evaluate(features="tests.helpers.feature_nets:Means")

        assert found.features is not None and found.features["name"] == "tests.helpers.feature_nets:Means"
        assert found.metrics["agreement"]["why"] == "tests.helpers.feature_nets:Means has no classes"
        assert found.metrics["precision"]["value"] is not None


def other_weights(case: Case, folder: Path) -> Path:
    """The reference with one of its large weights changed."""
    model = onnx.load(case.reference)
    weight = max(model.graph.initializer, key=lambda w: len(w.raw_data))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(model, folder / "other.onnx")
    return folder / "other.onnx"


def onnx_of(model: Any) -> onnx.ModelProto:
    import onnx_ir as ir

    proto: onnx.ModelProto = ir.to_proto(model)
    return proto


class TestFolder:
    """A stopped run continues; a finished one is returned at once."""

    def test_a_run_that_was_stopped(self, case: Case, tmp_path: Path) -> None:
        with pytest.raises(Stopped):
            case.evaluate(tmp_path / "f", progress=stopping_after(2 * SHARD + 1))
        before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "f").iterdir()}
        assert sorted(before) == ["pairs_00000.safetensors", "pairs_00001.safetensors", "sampling.json"]

        found = case.evaluate(tmp_path / "f")

        assert found == case.found
        assert contents(tmp_path / "f") == contents(case.folder)
        assert {name: (tmp_path / "f" / name).stat().st_mtime_ns for name in before} == before

    def test_a_finished_one_is_returned_at_once(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(PairSampler, "sample", lambda *a: pytest.fail("it drew"))
        monkeypatch.setattr("mezzotint.evaluate.metrics.metrics", lambda *a, **k: pytest.fail("it measured"))

        assert case.evaluate(case.folder) == case.found

    def test_other_features_are_measured_on_the_same_images(
        self, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        case.evaluate(tmp_path / "f")
        monkeypatch.setattr(PairSampler, "sample", lambda *a: pytest.fail("it drew"))

        found = case.evaluate(tmp_path / "f", features="none", resamples=9)

        assert found.metrics["frechet"] == {"value": None, "why": "no features were requested"}
        assert found.metrics["eps_sqnr_db"]["resamples"] == 9
        assert json.loads((tmp_path / "f" / RESULT_FILE).read_text()) == found.to_json()

    @pytest.mark.parametrize("fault", ["cut", "changed", "foreign", "lost", "killed"])
    def test_an_incomplete_shard_is_sampled_again(self, case: Case, tmp_path: Path, fault: str) -> None:
        case.evaluate(tmp_path / "f")
        file = tmp_path / "f" / "pairs_00001.safetensors"
        data = file.read_bytes()
        (tmp_path / "f" / RESULT_FILE).unlink()
        if fault == "cut":
            file.write_bytes(data[: len(data) // 2])
        elif fault == "changed":
            file.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        elif fault == "killed":
            file.rename(leave_stage(file) / "written")
        elif fault == "foreign":
            case.evaluate(tmp_path / "other", seed=9)
            file.write_bytes((tmp_path / "other" / file.name).read_bytes())
        else:
            file.unlink()

        assert case.evaluate(tmp_path / "f") == case.found
        assert file.read_bytes() == data
        assert not list((tmp_path / "f").glob(".*"))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"seed": 5}, "seed was .* and is 5 now"),
            ({"n": N + 1}, "pictures was 10 and is 11 now"),
            ({"conditions": {}, "shard_size": 2}, "shard_size was 4 and is 2 now"),
        ],
    )
    def test_other_settings_are_refused(self, case: Case, options: dict[str, Any], words: str) -> None:
        before = contents(case.folder)
        with pytest.raises(InputError, match=words):
            case.evaluate(case.folder, **options)
        assert contents(case.folder) == before

    def test_a_folder_with_other_files(self, case: Case, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match="the folder exists"):
            case.evaluate(tmp_path)
        assert contents(tmp_path) == {"thesis.txt": b"mine"}


class TestRefusals:
    """Refusals and warnings."""

    def test_other_weights(self, case: Case, tmp_path: Path) -> None:
        found = evaluate_bundle(case.bundle, other_weights(case, tmp_path), 2, **FEW)

        assert found.reference["same_weights"] is False
        assert OTHER_WEIGHTS in markdown(found) and OTHER_WEIGHTS not in markdown(case.found)

    def test_another_network(self, case: Case, tmp_path: Path) -> None:
        write(hand_written(sample="other"), tmp_path / "m.onnx")
        with pytest.raises(InputError, match="the signature names"):
            evaluate_bundle(case.bundle, tmp_path / "m.onnx", 2, **FEW)

    def test_no_reference(self, case: Case) -> None:
        with pytest.raises(InputError, match="no such float model"):
            evaluate_bundle(case.bundle, "none.onnx", 2, **FEW)
        with pytest.raises(InputError, match="0 images"):
            case.evaluate(n=0)

    def test_images_with_nan(self, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Bundle, "sample", lambda self, n, **k: np.full((n, 1, 8, 8), np.nan, np.float32))
        with pytest.raises(InputError, match="the bundle makes images that are not finite"):
            case.evaluate(n=2)

    def test_a_batch_that_is_written_into_the_graph(self, tmp_path: Path) -> None:
        source = write(hand_written(batch=2), tmp_path / "m.onnx")
        bundle = compile_model(source, tmp_path / "b", **{**SMALL, "calibration_batch": 2})

        assert evaluate_bundle(bundle, source, 4, **{**FEW, "batch": 16}).pictures == 4
        with pytest.raises(InputError, match="fixed batches of 2, which cannot sample 3") as refusal:
            evaluate_bundle(bundle, source, 3, **FEW)
        assert "a multiple of 2" in str(refusal.value.hint)


class TestCost:
    """Time and memory."""

    def test_one_image_with_its_cost(self, case: Case) -> None:
        found = case.evaluate(n=1, speed=True)

        speed, memory = found.speed, found.memory
        assert speed is not None and memory is not None
        assert speed["ratio"]["low"] <= speed["ratio"]["value"] <= speed["ratio"]["high"]
        assert speed["ratio"]["value"] == pytest.approx(speed["float_call_ms"] / speed["call_ms"], rel=0.01)
        assert (speed["batch"], speed["threads"], speed["blocks"], speed["calls"]) == (2, THREADS, 4, 28)
        for who in ("bundle", "float"):
            assert memory[who]["peak"] - memory[who]["before"] == memory[who]["added"] > 0
            assert memory[who]["before"] < 300e6, "the process begins with little"
        assert found.metrics["psnr_db_mean"]["interval"] is None, "one image"
        assert "28 calls in 4 blocks" in markdown(found)

    def test_memory_grows_with_the_batch(self, case: Case) -> None:
        small, large = (memory_of_one_call(case.bundle, [case.reference], batch, threads=1) for batch in (1, 4000))

        assert large.added > small.added + 4000 * 16 * 64 * 4, "at least one activation of 16 channels"

    def test_a_process_that_fails(self, case: Case) -> None:
        with pytest.raises(InputError, match=r"memory of a call cannot be measured: .*none.onnx"):
            memory_of_one_call(case.bundle, [Path("none.onnx")], 1)


class TestCommand:
    """`mezzotint eval`."""

    def line(self, case: Case, *more: object) -> tuple[object, ...]:
        options = ("-n", N, "--batch", 2, "--threads", THREADS, "--resamples", 20, "--no-speed")
        return ("eval", case.bundle.path, "--reference", case.reference, *options, *more)

    def test_for_people(self, cli: Cli, case: Case, tmp_path: Path) -> None:
        answer = cli(*self.line(case, "--features", case.net, "-o", tmp_path / "f"))

        assert answer.code == 0, answer.err
        for word in ("SQNR of epsilon", "PSNR", "resamples", "worst", "not measured (--no-speed)", "islands"):
            assert word in answer.out, (word, answer.out)
        page = (tmp_path / "f" / PAGE_FILE).read_text()
        assert page.startswith(f"# Evaluation of {case.bundle.path.name}\n")
        assert "| recall | 1.000 | " in page and "lpips" in page
        assert "| 3 | " in page and str(tmp_path) not in page

    def test_in_json(self, cli: Cli, case: Case) -> None:
        answer = cli(*self.line(case, "--features", case.net, "--json"))

        found = json.loads(answer.out)
        assert found["metrics"]["eps_sqnr_db"] == case.found.metrics["eps_sqnr_db"]
        assert answer.err == ""

    def test_other_weights_are_warned_about(self, cli: Cli, case: Case, tmp_path: Path) -> None:
        other = other_weights(case, tmp_path)
        line = ["eval", case.bundle.path, "--reference", other, "-n", 1, "--no-speed", "--json"]

        assert OTHER_WEIGHTS in " ".join(cli(*line).err.split())

    def test_a_refusal(self, cli: Cli, case: Case) -> None:
        answer = cli(*self.line(case, "--features", "nonsense"))

        assert (answer.code, answer.out) == (2, "")
        assert "no feature extractor is called 'nonsense'" in answer.err


class TestResult:
    """`eval.json` and back."""

    def test_a_file_gives_the_same_evaluation(self, case: Case) -> None:
        assert Evaluation.load(case.folder / RESULT_FILE) == case.found

    @pytest.mark.parametrize("text", [None, "", "[1]", "{}", '{"key": 1, "more": 2}'])
    def test_other_files_give_none(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / RESULT_FILE).write_text(text)
        assert Evaluation.load(tmp_path / RESULT_FILE) is None
