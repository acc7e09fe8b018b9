"""What `mezzotint bench` measures, and the warning about versions of onnxruntime that nobody tested."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mezzotint import compile_model, doctor
from mezzotint.bench import bench, peers
from mezzotint.bench.beside_peers import PeerResult, advice
from mezzotint.bench.pairs import compare, paired_run, unseen_seed
from mezzotint.bench.trace import GROUPS, INTEGER_GROUP, Breakdown, group_of, read_trace
from mezzotint.compiler.audit.kernels import audit_kernels
from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.latency import Latency, Ratio, ratio
from mezzotint.runtime.session import TESTED_ONNXRUNTIME, Denoiser, untested_version
from mezzotint.runtime.signature import Signature
from tests.helpers.models import FAST, SMALL, THREADS, Cli, Compiled, hand_written, write
from tests.helpers.models import INTEGER as INTEGER_LAYERS

UNTESTED = "1.99.0"


@pytest.fixture(scope="module")
def measured(hand: Compiled) -> bench.Bench:
    return bench.run_bench(hand.bundle, batch=2, threads=THREADS, float_model=hand.exported, repeats=3)


def built_operations(bundle: Bundle, folder: Path) -> Counter[str]:
    """The operations of the graph that onnxruntime built, from the file that it saved: not from the profiler."""
    found: Counter[str] = Counter()
    for op, count in audit_kernels(bundle.model_path, [], folder, threads=THREADS).operations.items():
        found[op.rpartition(".")[2]] += count
    return found


def check_breakdown(found: Breakdown, built: Mapping[str, int]) -> None:
    """Every node of the built graph is counted, in one group, and the times add up."""
    assert {o.op: o.nodes for o in found.operations} == built
    assert all(o.group in GROUPS and o.seconds >= 0 for o in found.operations)
    groups = found.groups()
    assert sum(nodes for nodes, _ in groups.values()) == sum(built.values())
    assert math.isclose(sum(seconds for _, seconds in groups.values()), found.kernel_seconds, rel_tol=1e-9)
    assert 0 < found.integer_share < 1
    assert math.isclose(found.integer_share * found.kernel_seconds, groups[INTEGER_GROUP][1], rel_tol=1e-9)
    assert 0 < found.kernel_seconds <= found.call_seconds


class TestBreakdown:
    """Which operations take the time."""

    def test_it_is_the_graph_that_onnxruntime_built(
        self, hand: Compiled, measured: bench.Bench, tmp_path: Path
    ) -> None:
        check_breakdown(measured.breakdown, built_operations(hand.bundle, tmp_path))

        assert measured.breakdown.groups()[INTEGER_GROUP][0] == INTEGER_LAYERS
        assert measured.breakdown.calls == 3
        times = [o.seconds for o in measured.breakdown.operations]
        assert times == sorted(times, reverse=True)

    @pytest.mark.parametrize("fault", ["an operation is lost", "a node is counted twice", "a group is lost"])
    def test_a_planted_fault_is_found(
        self, hand: Compiled, measured: bench.Bench, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        built, found = built_operations(hand.bundle, tmp_path), measured.breakdown
        first, *others = found.operations
        if fault == "an operation is lost":
            found = replace(found, operations=tuple(others))
        elif fault == "a node is counted twice":
            found = replace(found, operations=(replace(first, nodes=first.nodes + 1), *others))
        else:
            monkeypatch.setattr("mezzotint.bench.trace.GROUPS", tuple(g for g in GROUPS if g != first.group))

        with pytest.raises(AssertionError):
            check_breakdown(found, built)

    def test_a_time_that_is_one_percent_off_is_found(self, measured: bench.Bench) -> None:
        class Wrong(Breakdown):
            def groups(self) -> dict[str, tuple[int, float]]:
                return {group: (nodes, seconds * 1.01) for group, (nodes, seconds) in super().groups().items()}

        found = measured.breakdown
        built = {o.op: o.nodes for o in found.operations}
        check_breakdown(found, built)
        with pytest.raises(AssertionError):
            check_breakdown(Wrong(found.operations, found.calls, found.call_seconds), built)

    def test_a_float_bundle_has_no_integer_kernels(self, hand: Compiled, tmp_path: Path) -> None:
        bundle = compile_model(hand.exported, tmp_path / "b", recipe="float", **SMALL)

        result = bench.run_bench(bundle, threads=THREADS, repeats=1).to_json()

        assert result["floor"] == {"integer_kernels_ms": 0.0, "share": 0.0, "call_ms": 0.0}
        assert INTEGER_GROUP not in [row["group"] for row in result["groups"]]

    @pytest.mark.parametrize(
        ("op", "group"),
        [
            ("QLinearConv", INTEGER_GROUP),
            ("QLinearMatMul", INTEGER_GROUP),
            ("FusedConv", "float kernels"),
            ("ReorderInput", "layout"),
            ("QLinearConcat", "layout"),
            ("DequantizeLinear", "quantize and dequantize"),
            ("InstanceNormalization", "norms"),
            ("QLinearAdd", "elementwise"),
            ("QuickGelu", "elementwise"),
            ("QLinearSoftmax", "attention softmax"),
            ("Resize", "other"),
        ],
    )
    def test_groups(self, op: str, group: str) -> None:
        assert group_of(op) == group


class TestTrace:
    """Traces with known numbers."""

    @staticmethod
    def node(op: str, start: int, duration: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{op}_0_kernel_time", "ts": start, "dur": duration, "args": {"op_name": op}}

    @staticmethod
    def call(start: int, duration: int) -> dict[str, Any]:
        return {"cat": "Session", "name": "model_run", "ts": start, "dur": duration, "args": {}}

    def test_medians_over_the_calls_after_the_first(self, tmp_path: Path) -> None:
        events = [{"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9000, "args": {}}]
        for start, conv in ((10_000, 5000), (20_000, 300), (30_000, 100), (40_000, 200)):
            inner = [self.node("QLinearConv", start + 1, conv), self.node("Add", start + 6000, 40)]
            events += [*inner, self.node("Add", start + 7000, 60), self.call(start, 8000)]
        events.append(self.node("If", 40_001, 7000))  # holds nodes that are in the trace themselves
        (tmp_path / "t.json").write_text(json.dumps(events))

        found = read_trace(tmp_path / "t.json")

        assert [(o.op, o.nodes) for o in found.operations] == [("QLinearConv", 1), ("Add", 2)]
        assert [o.seconds for o in found.operations] == pytest.approx([200e-6, 100e-6], rel=1e-9)
        assert found.calls == 3
        assert found.call_seconds == pytest.approx(8e-3, rel=1e-9)
        assert found.integer_share == pytest.approx(2 / 3, rel=1e-9)

    def test_nodes_are_found_by_the_names_that_they_had(self) -> None:
        spent = {"a_branch_up_nchwc": 1.0, "b_branch_up": 2.0, "b_branch_up_2": 4.0, "a": 8.0}
        found = Breakdown((), 1, 15.0, spent)
        assert found.named({"a_branch_up", "b_branch_up", "gone"}) == (2, 3.0)

    @pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[1]", '[{"name": "model_run", "ts": 1}]'])
    def test_a_trace_that_was_cut_off(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "t.json").write_text(text)

        with pytest.raises(OutputError, match="profile cannot be read"):
            read_trace(tmp_path / "t.json")
        with pytest.raises(OutputError, match="profile cannot be read"):
            read_trace(tmp_path / "none.json")


class TestMeasure:
    """The latency, and what is handed in."""

    def test_the_latency_is_measured_without_the_profiler(self, measured: bench.Bench) -> None:
        result = measured.to_json()

        assert json.loads(json.dumps(result)) == result
        assert result["call_ms"]["median"] >= result["call_ms"]["minimum"] > 0
        assert result["float_call_ms"]["median"] >= result["float_call_ms"]["minimum"] > 0
        assert measured.floating is not None
        assert len(measured.floating.seconds) == len(measured.quantized.seconds) == 2 * 2 * 3
        assert len(measured.floating.blocks) == len(measured.quantized.blocks) == 2 * 2
        ratio = measured.floating.median / measured.quantized.median
        assert result["speedup"] == pytest.approx(ratio, abs=1e-4)
        low, high = result["speedup_range"]
        each = [s / q for s, q in zip(measured.floating.blocks, measured.quantized.blocks, strict=True)]
        assert (low, high) == pytest.approx((min(*each, ratio), max(*each, ratio)), abs=1e-4)
        assert (result["peers"], result["fidelity"]) == ([], None)
        assert result["floor"]["call_ms"] < result["call_ms"]["median"]
        assert result["timestep"] == measured.bundle.deployment.timesteps[2]
        assert result["inputs"] == {"x": "float32 [2, 1, 8, 8], random normal"}
        assert any("without the profiler" in note for note in result["notes"])
        timed = measured.bundle.denoiser(THREADS).session
        assert not timed.get_session_options().enable_profiling

    def test_no_trace_is_left_behind(self, hand: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

        found = bench.run_bench(hand.bundle, threads=THREADS, repeats=1)

        assert found.floating is None
        assert found.to_json()["speedup"] is found.to_json()["speedup_range"] is None
        assert list(tmp_path.iterdir()) == []

    def test_conditions_are_random(self, tmp_path: Path) -> None:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        given = {"context": np.ones((2, 6), np.float32)}
        bundle = compile_model(source, tmp_path / "b", conditions=given, **SMALL)

        found = bench.run_bench(bundle, batch=3, threads=THREADS, float_model=source, repeats=1)

        assert found.inputs["context"] == "float32 [3, 6], random normal"

    def test_conditions_of_every_kind(self) -> None:
        inputs: dict[str, tuple[np.dtype[Any], tuple[int | str | None, ...]]] = {
            "x": (np.dtype(np.float32), ("batch", 4, "height", "width")),
            "labels": (np.dtype(np.int64), ("batch",)),
            "prompt": (np.dtype(np.float32), ("rows", "tokens", 16)),
            "mask": (np.dtype(np.bool_), (2, None)),
            "hint": (np.dtype(np.float32), ("batch", 3, "height", "width")),
        }
        names = tuple(inputs)[1:]
        signature = SimpleNamespace(sample="x", conditions=names)
        manifest = SimpleNamespace(calibration=SimpleNamespace(sizes={}))
        bundle: Any = SimpleNamespace(signature=signature, sample_shape=(4, 8, 16), manifest=manifest)
        net: Any = SimpleNamespace(inputs=inputs)

        made = bench.make_conditions(net, bundle, 2)

        assert {name: (list(array.shape), how) for name, (array, how) in made.items()} == {
            "labels": ([2], "zeros"),
            "prompt": ([2, bench.OPEN_SIZE, 16], "random normal"),
            "mask": ([2, bench.OPEN_SIZE], "all true"),
            "hint": ([2, 3, 8, 16], "random normal"),
        }
        assert all(array.dtype == inputs[name][0] for name, (array, _) in made.items())
        assert made["prompt"][0].std() > 0.5

    def test_a_batch_that_is_written_into_the_graph(self, tmp_path: Path) -> None:
        source = write(hand_written(batch=2), tmp_path / "m.onnx")
        bundle = compile_model(source, tmp_path / "b", **{**SMALL, "calibration_batch": 2})

        assert bench.run_bench(bundle, threads=THREADS, repeats=1).batch == 2
        with pytest.raises(InputError, match="batch size 2 is written into the graph") as refused:
            bench.run_bench(bundle, batch=3, threads=THREADS, repeats=1)
        assert "--batch 2" in str(refused.value.hint)


class TestPeers:
    """Other quantizers of the same float model."""

    @pytest.fixture(scope="class")
    def result(self, hand: Compiled) -> dict[str, Any]:
        options: dict[str, Any] = {"batch": 2, "threads": THREADS, "repeats": 2, "rounds": 1, "calibration": 6}
        return bench.run_bench(hand.bundle, float_model=hand.exported, peers=peers.PEERS, **options).to_json()

    def test_each_has_speed_size_and_fidelity(self, result: dict[str, Any], hand: Compiled) -> None:
        peer = next(p for p in result["peers"] if p["peer"] == peers.ONNXRUNTIME)

        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert peer["error"] is None
        low, high = peer["speedup_range"]
        assert 0 < low <= peer["speedup"] <= high
        assert peer["speedup"] == pytest.approx(result["float_call_ms"]["median"] / peer["call_ms"]["median"], rel=0.01)
        assert peer["bytes"] > 0 and result["float_bytes"] == hand.exported.stat().st_size
        for fidelity in (peer["fidelity"], result["fidelity"]):
            assert fidelity["pictures"] == 4 and 5 < fidelity["eps_sqnr_db_worst_step"] <= fidelity["eps_sqnr_db"]

    def test_the_fidelity_is_that_of_a_paired_run(self, result: dict[str, Any], hand: Compiled) -> None:
        exact = Denoiser(hand.exported, hand.bundle.signature, threads=THREADS)
        nets = hand.bundle.denoisers(threads=THREADS)
        _, sqnr = paired_run(exact, nets, hand.bundle, 4, seed=unseen_seed(hand.bundle), batch=2)

        assert result["fidelity"]["eps_sqnr_db"] == pytest.approx(sqnr.pooled(), rel=1e-6)
        images = compare(hand.bundle, exact, 4, batch=2, threads=THREADS).to_json()
        for key in ("psnr_db_median", "psnr_db_p10"):
            assert result["fidelity"][key] == pytest.approx(images[key], rel=1e-6)

    @pytest.mark.parametrize(
        ("seconds", "db", "words"),
        [
            (0.2, 50.0, "is the better choice"),
            (0.2, None, "inf dB"),
            (0.2, 30.0, "farther from float"),
            (0.5, 50.0, ""),
        ],
    )
    def test_plain_bfloat16_is_recommended_where_it_is_better(
        self, seconds: float, db: float | None, words: str
    ) -> None:
        peer = PeerResult(peers.OPENVINO_BF16, latency=Latency((seconds,)), fidelity={"psnr_db_median": db})
        said = " ".join(advice(2.5, {"psnr_db_median": 40.0}, [peer], Latency((1.0,))))
        assert words in said and bool(said) == bool(words)
        assert not words or ("5.00x" in said and "this bundle 2.50x and 40.0 dB" in said)

    @pytest.mark.parametrize("name", peers.PEERS[1:])
    def test_what_is_not_installed_is_reported(self, result: dict[str, Any], name: str) -> None:
        if name in peers.available():
            pytest.skip(f"{name} is installed")
        peer = next(p for p in result["peers"] if p["peer"] == name)

        assert peer["error"] == "not installed"
        assert peer["call_ms"] is peer["speedup"] is peer["fidelity"] is None

    def test_one_that_fails_does_not_stop_the_others(
        self, cli: Cli, hand: Compiled, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prepare_peer = peers.prepare_peer

        def fail(peer: str, *rest: Any) -> Any:
            if peer != peers.ONNXRUNTIME:
                raise RuntimeError("unsupported operation Foo\nat line 7")
            return prepare_peer(peer, *rest)

        monkeypatch.setattr(peers, "available", lambda: list(peers.PEERS))
        monkeypatch.setattr(peers, "prepare_peer", fail)
        words = ("--float", hand.exported, "--peers", "--repeats", 1, "--rounds", 1, "--calibration", 2, "--json")

        result = json.loads(cli("bench", hand.bundle.path, *words).out)

        assert [p["error"] for p in result["peers"]] == [None, *["RuntimeError: unsupported operation Foo"] * 4]
        assert result["peers"][0]["speedup"] > 0

    def test_conditions_are_calibrated_on(self, tmp_path: Path) -> None:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        bundle = compile_model(source, tmp_path / "b", conditions={"context": np.ones((2, 6), np.float32)}, **SMALL)
        options: dict[str, Any] = {"threads": THREADS, "repeats": 1, "rounds": 1, "calibration": 3}

        found = bench.run_bench(bundle, float_model=source, peers=[peers.ONNXRUNTIME], **options)

        assert found.peers[0].error is None and found.peers[0].latency is not None
        assert found.peers[0].fidelity is not None and found.peers[0].fidelity["eps_sqnr_db"] > 10

    def test_calls_without_their_conditions_are_refused(self, tmp_path: Path) -> None:
        source = write(hand_written(context="context"), tmp_path / "m.onnx")
        signature = Signature("x", "t", "y", ("context",))
        x = np.zeros((1, 1, 8, 8), np.float32)
        with pytest.raises(InputError, match=r"have conditions \[\], the model \['context'\]"):
            peers.prepare_peer(peers.ONNXRUNTIME, source, signature, [(x, 3, {})], tmp_path, THREADS)
        with pytest.raises(InputError, match="no calls to calibrate on"):
            peers.prepare_peer(peers.ONNXRUNTIME, source, signature, [], tmp_path, THREADS)

    def test_refusals(self, hand: Compiled) -> None:
        with pytest.raises(InputError, match="start from the float model"):
            bench.run_bench(hand.bundle, peers=[peers.ONNXRUNTIME])
        with pytest.raises(InputError, match="no peer is called 'tflite'"):
            bench.run_bench(hand.bundle, float_model=hand.exported, peers=["tflite"])
        with pytest.raises(InputError, match="0 rounds"):
            bench.run_bench(hand.bundle, rounds=0)

    def test_for_people(self, cli: Cli, hand: Compiled) -> None:
        words = ("--float", hand.exported, "--peers", "--repeats", 1, "--rounds", 1, "--calibration", 2)
        answer = cli("bench", hand.bundle.path, *words)

        assert answer.code == 0, answer.err
        for word in ("fp32", "this bundle", "openvino", "SQNR", "2 blocks in turns"):
            assert word in answer.out, (word, answer.out)


def test_ratios_of_known_times() -> None:
    slow = Latency((4.0, 4.0, 6.0, 6.0), (4.0, 6.0))
    fast = Latency((1.0, 1.0, 3.0, 3.0), (1.0, 3.0))

    assert ratio(slow, fast) == Ratio(2.5, 2.0, 4.0)
    assert ratio(slow, slow) == Ratio(1.0, 1.0, 1.0)


class TestCommand:
    """`mezzotint bench`."""

    def test_for_people(self, cli: Cli, hand: Compiled) -> None:
        answer = cli("bench", hand.bundle.path, "--float", hand.exported, "--repeats", "2")

        assert answer.code == 0, answer.err
        assert answer.err == ""
        assert "beside peers" not in answer.out
        for word in ("2, pinned", "random normal", "QLinearConv", "speed-up", *GROUPS[:2], "without the profiler"):
            assert word in answer.out, (word, answer.out)

    def test_in_json(self, cli: Cli, hand: Compiled) -> None:
        answer = cli("bench", hand.bundle.path, "--batch", 2, "--threads", 1, "--repeats", 2, "--json")

        result = json.loads(answer.out)
        assert (result["batch"], result["threads"], result["repeats"]) == (2, 1, 2)
        assert (result["float_call_ms"], result["speedup"]) == (None, None)
        assert 0 < result["floor"]["share"] < 1
        for rows in (result["groups"], result["operations"]):
            assert sum(row["nodes"] for row in rows) == result["profile"]["nodes"]
            assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-4)
            assert sum(row["ms"] for row in rows) == pytest.approx(result["profile"]["kernels_ms"], abs=2e-3)

    @pytest.mark.parametrize("name", ["none.onnx", "text.onnx"])
    def test_a_float_model_that_is_none(self, cli: Cli, hand: Compiled, tmp_path: Path, name: str) -> None:
        (tmp_path / "text.onnx").write_text("no model")

        answer = cli("bench", hand.bundle.path, "--float", tmp_path / name, "--repeats", 1)

        assert answer.code == 2
        assert answer.out == ""
        assert answer.err.startswith("error: ")
        assert name in answer.err


class TestUntestedVersion:
    """Fusion rules change with the versions of onnxruntime."""

    @pytest.fixture
    def pretend(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        return lambda version: monkeypatch.setattr("onnxruntime.__version__", version)

    @pytest.mark.parametrize(
        ("version", "tested"),
        [*((v, True) for v in TESTED_ONNXRUNTIME), ("1.31.0", True), ("1.3.1", False), ("1.33.0", False)],
    )
    def test_minor_versions_count(self, pretend: Callable[[str], None], version: str, tested: bool) -> None:
        pretend(version)

        assert untested_version() == (None if tested else version)
        assert (doctor.untested_onnxruntime() is None) == tested
        assert doctor.examine()["onnxruntime_tested"] == tested

    @pytest.mark.parametrize("command", ["bench", "doctor", "compile"])
    @pytest.mark.parametrize("version", [UNTESTED, TESTED_ONNXRUNTIME[-1]])
    def test_commands_warn_on_standard_error(
        self, cli: Cli, hand: Compiled, tmp_path: Path, pretend: Callable[[str], None], command: str, version: str
    ) -> None:
        pretend(version)
        words: dict[str, list[object]] = {
            "bench": [hand.bundle.path, "--repeats", 1],
            "doctor": [],
            "compile": [hand.exported, "-o", tmp_path / "b", "--dry-run", *FAST],
        }

        answer = cli(command, *words[command], "--json")

        assert answer.code == 0, answer.err
        assert json.loads(answer.out)
        if version == UNTESTED:
            assert answer.err.startswith("warning: ")
            for word in (UNTESTED, *TESTED_ONNXRUNTIME, "fusion rules", "were not tested", "mezzotint inspect"):
                assert word in answer.err
        else:
            assert answer.err == ""
