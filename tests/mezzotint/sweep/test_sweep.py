"""`mezzotint bench --sweep`: calls timed at every batch size and number of threads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mezzotint import compile_model
from mezzotint.cluster.ledger import ClusterError
from mezzotint.cluster.placement import Place, this_computer
from mezzotint.cluster.tasks import Answer, Stamp
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.latency import Latency, in_turns
from mezzotint.runtime.signature import Images, Predict, Timestep
from mezzotint.sweep.points import SweepPoints
from mezzotint.sweep.sweep import FailedMachines, SweepTimer, SweptCall, run_sweep
from tests.helpers.models import SMALL, Cli, Compiled, hand_written, write
from tests.helpers.spreads import ClusterHere


class TestPoints:
    def test_what_is_missing_has_one_number(self) -> None:
        assert SweepPoints.parse(["batch=1,4,4,2"], batch=None, threads=3) == SweepPoints((1, 4, 2), (3,))
        assert SweepPoints.parse(["threads=2,1"], batch=8, threads=3) == SweepPoints((8,), (2, 1))
        assert SweepPoints.parse(["threads=2", "batch=3"], batch=None, threads=1) == SweepPoints((3,), (2,))
        assert SweepPoints.parse(["threads=2"], batch=None, threads=1).batches is None

    @pytest.mark.parametrize(
        ("texts", "words"),
        [
            (["size=1"], "'size=1' is no part of a sweep"),
            (["batch"], "'batch' is no part of a sweep"),
            (["batch=1", "batch=2"], "'batch=2' is no part of a sweep"),
            (["batch="], "'batch=' has no numbers"),
            (["batch=1,,2"], "'batch=1,,2' has no numbers"),
            (["batch=1,0"], "'batch=1,0' has 0"),
            (["threads=513"], "'threads=513' has 513"),
            (["batch=" + ",".join(map(str, range(1, 102))), "threads=1,2,3,4,5,6,7,8,9,10"], "has 1010 points"),
        ],
    )
    def test_what_is_no_sweep_is_refused(self, texts: list[str], words: str) -> None:
        with pytest.raises(InputError, match=words):
            SweepPoints.parse(texts, batch=None, threads=1)


class TestSweep:
    def test_every_pair_is_timed(self, hand: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both networks get the same x of the batch size, and run on the number of threads."""
        seen: list[int] = []

        def noted(nets: Sequence[Predict], x: Images, t: Timestep, **how: Any) -> list[Latency]:
            seen.append(len(x))
            return in_turns(nets, x, t, **how)

        monkeypatch.setattr("mezzotint.sweep.sweep.in_turns", noted)
        said: list[tuple[str, int, int]] = []
        timer = SweepTimer(SweepPoints((2, 1), (1, 3)), repeats=2, rounds=1)
        (found,) = run_sweep(hand.bundle, timer, float_model=hand.exported, progress=lambda *words: said.append(words))

        assert [(call.threads, call.batch) for call in found.calls] == [(1, 2), (1, 1), (3, 2), (3, 1)]
        assert seen == [2, 1, 2, 1]
        assert said == [("sweep", i, 4) for i in (1, 2, 3, 4)]
        for call in found.calls:
            assert call.floating is not None
            assert len(call.quantized.seconds) == len(call.floating.seconds) == 4
            assert min(call.quantized.seconds) > 0
        plain = run_sweep(hand.bundle, SweepTimer(SweepPoints((1,), (1,)), repeats=1, rounds=1))
        assert plain[0].calls[0].floating is None

    def test_the_numbers_of_a_row(self) -> None:
        row = SweptCall(4, 1, Latency((0.02, 0.01, 0.03), (0.02,)), Latency((0.05,), (0.05,))).to_json()
        assert row == {
            "batch": 4,
            "threads": 1,
            "call_ms": {"median": 20.0, "minimum": 10.0},
            "samples_per_second": 200.0,
            "float_call_ms": {"median": 50.0, "minimum": 50.0},
            "speedup": 2.5,
            "speedup_range": [2.5, 2.5],
        }
        guided = SweptCall(4, 1, Latency((0.02,)), None, rows_of_sample=2).to_json()
        assert guided["samples_per_second"] == 100.0 and guided["speedup"] is None

    def test_a_batch_that_the_graph_does_not_take(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = write(hand_written(batch=2), tmp_path / "m.onnx")
        bundle = compile_model(source, tmp_path / "b", **{**SMALL, "calibration_batch": 2})
        timer = SweepTimer(SweepPoints((2, 1), (1,)), repeats=1, rounds=1)
        monkeypatch.setattr("mezzotint.sweep.sweep.in_turns", lambda *_, **__: pytest.fail("a call was timed"))
        with pytest.raises(InputError, match="the batch size 2 is written into the graph, it cannot run 1"):
            run_sweep(bundle, timer)
        monkeypatch.undo()
        (own,) = run_sweep(bundle, SweepTimer(SweepPoints(None, (1,)), repeats=1, rounds=1))
        assert [call.batch for call in own.calls] == [2], "the graph's own"

    def test_the_command(self, hand: Compiled, cli: Cli) -> None:
        words = ["bench", str(hand.bundle.path), "--sweep", "batch=1,2", "--sweep", "threads=1", "--repeats", "1"]
        found = json.loads(cli(*words, "--float", hand.exported, "--rounds", "1", "--json").out)
        (machine,) = found["machines"]
        assert [(call["threads"], call["batch"]) for call in machine["calls"]] == [(1, 1), (1, 2)]
        assert machine["engine"]["engine"] == "cpu" and machine["processor"] and found["rounds"] == 1
        table = cli(*words, "--rounds", "1").out
        assert "samples/s" in table and "speed-up" not in table and "median of 2 calls" in table

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--sweep", "batch=1", "--peers"], "a sweep measures no peers"),
            (["--cluster", "local"], "workers that share a machine slow each other down"),
            (["--sweep", "batch=none"], "has no numbers"),
            (["--sweep", "batch=1", "--batch", "4"], "batch sizes are given twice"),
        ],
    )
    def test_what_does_not_go_together_is_refused_before_work(self, words: list[str], said: str, cli: Cli) -> None:
        refused = cli("bench", "no-such-folder", *words)
        assert refused.code == 2 and said in refused.err


def test_machines_that_fail_cost_no_other_their_figures(hand: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a warning; where all failed it is their error."""
    timer = SweepTimer(SweepPoints((1,), (1,)), repeats=1, rounds=1)
    (measured,) = run_sweep(hand.bundle, timer)
    failing = iter([[measured], []])

    class Cluster(ClusterHere):
        def places(self) -> list[Place]:
            return [Place(name, name, 1) for name in "ab"]

        def answers(self, work: Any, pieces: Any, **_: Any) -> Any:
            assert pieces == ["a", "b"]
            for sweep in next(failing):
                yield 1, Answer(Stamp("b", this_computer(), 1, 0.0, 1), sweep)
            raise ClusterError("sweep a: no memory")

    @contextmanager
    def opened(spec: str, threads: int) -> Iterator[Cluster]:
        yield Cluster()

    monkeypatch.setattr("mezzotint.sweep.sweep.open_cluster", opened)
    with pytest.warns(FailedMachines, match="sweep a: no memory"):
        assert run_sweep(hand.bundle, timer, cluster="local") == [measured]
    with pytest.raises(ClusterError, match="sweep a: no memory"):
        run_sweep(hand.bundle, timer, cluster="local")
