"""Pieces on a real cluster of Ray: one for the whole file, of two nodes in the end, joined at its address.

It is started in a folder with modules that must not be imported.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import psutil
import pytest

pytest.importorskip("ray", reason="pip install 'mezzotint[cluster]'")

from mezzotint import compile_model, open_bundle, read_shards, sample_to_folder
from mezzotint.cluster.connection import open_cluster
from mezzotint.cluster.driver import Cluster
from mezzotint.cluster.ledger import ClusterError
from mezzotint.cluster.placement import CarriedFolder, Place, cache_place, this_computer
from mezzotint.cluster.ray_library import ray_library
from mezzotint.cluster.record import MACHINES
from mezzotint.compiler.core.pipeline import Recipe
from mezzotint.compiler.correction.noise_runs import NoiseNetworks
from mezzotint.compiler.rounding.rounder import WeightRounder
from mezzotint.compiler.training.rounding_of_unit import RoundingTrainer
from mezzotint.debug.diagnose import diagnose
from mezzotint.evaluate.run import evaluate_bundle
from mezzotint.io.objects import ObjectFolder
from mezzotint.passes.fit_noise import FitNoise
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.reconstruct import Reconstruct
from mezzotint.passes.round_weights import RoundWeights
from mezzotint.runtime.errors import InputError, TimestepNotDeployed
from mezzotint.runtime.sampling.condition_network import ConditionNetwork
from mezzotint.shards.carried import CarriedBundle
from mezzotint.sweep.points import SweepPoints
from mezzotint.sweep.sweep import SweepTimer, run_sweep
from tests.helpers.cluster_work import Square, Surroundings
from tests.helpers.feature_nets import feature_net
from tests.helpers.models import SMALL, Cli, Compiled
from tests.helpers.object_server import object_server, set_endpoint
from tests.helpers.tiny import tiny_model
from tools import experiment

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # of Ray's own processes
ROOT = Path(__file__).parents[3]
CORES = 7
OBJECTS_PORT = 20000 + os.getpid() % 10000
CONFIG = {"worker_niceness": 0}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A cluster of one node with seven cores, whatever the machine has."""
    from ray.cluster_utils import Cluster as Nodes

    planted = tmp_path_factory.mktemp("planted")
    for name in ("numpy", "onnxruntime", "mezzotint"):
        (planted / f"{name}.py").write_text("raise ImportError('it was imported from the current folder')\n")
    with pytest.MonkeyPatch.context() as patch:
        set_endpoint(patch, f"http://127.0.0.1:{OBJECTS_PORT}")  # of the workers
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.chdir(planted)
        started = Nodes()
        started.add_node(num_cpus=CORES, object_store_memory=100 << 20, include_dashboard=False, _system_config=CONFIG)
        try:
            yield started
        finally:
            started.shutdown()  # type: ignore[no-untyped-call,unused-ignore]
            vars(started).clear()
            with warnings.catch_warnings():  # Ray leaves files of its logs open
                warnings.simplefilter("ignore")
                gc.collect()


@pytest.fixture(scope="module")
def cluster(nodes: Any) -> Iterator[Cluster]:
    with open_cluster(nodes.address, 1) as opened:
        yield opened


def squares(cluster: Cluster, work: Square, count: int, **options: Any) -> list[tuple[int, Any]]:
    answers = cluster.answers(work, list(range(count)), stage="square", **options)
    return [(piece, answer.result) for piece, answer in answers]


class TestPieces:
    def test_each_result_comes_with_its_piece_and_its_machine(self, cluster: Cluster, tmp_path: Path) -> None:
        said: list[tuple[str, int, int]] = []
        answers = dict(
            cluster.answers(
                Square(str(tmp_path)), range(20), stage="square", sizes=[2] * 20, progress=lambda *w: said.append(w)
            )
        )

        assert {piece: answer.result for piece, answer in answers.items()} == {i: i * i for i in range(20)}
        stamps = [answer.stamp for answer in answers.values()]
        assert {stamp.threads for stamp in stamps} == {1}
        assert all(stamp.process != os.getpid() and stamp.machine.processor for stamp in stamps)
        assert (said[0][1:], said[-1][1:]) == ((0, 40), (40, 40))

    def test_overhead_of_a_piece(self, nodes: Any, cluster: Cluster, tmp_path: Path) -> None:
        """With one worker at a time; the best of some runs, because the machine does other things."""
        seconds = []
        with open_cluster(nodes.address, CORES) as opened:
            work = Square(str(tmp_path), threads=CORES)
            for _ in range(6):
                started = time.perf_counter()
                squares(opened, work, 20)
                seconds.append((time.perf_counter() - started) / 20)
        assert min(seconds) < 0.05

    def test_modules_do_not_come_from_the_current_folder(self, nodes: Any, cluster: Cluster) -> None:
        with open_cluster(nodes.address, 2) as opened:
            (_, answer), (_, other) = opened.answers(Surroundings(), ["numpy", "mezzotint"], stage="s", ordered=True)

        assert "planted" not in answer.result[0]
        assert other.result == (str(ROOT / "mezzotint" / "__init__.py"), "2")

    def test_any_order_of_completion_gives_one_order(self, cluster: Cluster, tmp_path: Path) -> None:
        work = Square(str(tmp_path), delays=(0.2, 0.0, 0.0, 0.05))
        completed = [piece for piece, _ in squares(cluster, work, 40)]
        ordered = squares(cluster, work, 40, ordered=True)

        assert completed != sorted(completed)
        assert ordered == [(i, i * i) for i in range(40)]

    def test_a_piece_that_always_fails_is_named_and_the_others_are_kept(self, cluster: Cluster, tmp_path: Path) -> None:
        found: list[int] = []
        work = Square(str(tmp_path), failing=(3,), fatal=(5,), once=(1,))
        with pytest.raises(ClusterError, match="2 of 8 pieces failed 3 times") as caught:
            for piece, _ in cluster.answers(work, range(8), stage="square", ordered=True):
                found.append(piece)

        assert found == [0, 1, 2, 4, 6, 7]
        assert "square 3: OSError: no luck with 3" in caught.value.what
        assert "square 5: its worker ended (WorkerCrashedError)" in caught.value.what
        assert [len(list(tmp_path.glob(f"{i}-*"))) for i in (0, 1, 3, 5)] == [1, 2, 3, 3]

    def test_where_all_are_needed_nothing_comes_behind_a_gap(self, cluster: Cluster, tmp_path: Path) -> None:
        """Neither the result of a later piece in the place of the failed one, nor work that nothing would use."""
        found: list[int] = []
        options: dict[str, Any] = {"stage": "square", "ordered": True, "needs_all": True}
        with pytest.raises(ClusterError, match="square 3: OSError: no luck with 3") as caught:
            for piece, answer in cluster.answers(Square(str(tmp_path), failing=(3,)), range(500), **options):
                assert answer.result == piece**2
                found.append(piece)
        assert found == [0, 1, 2]
        assert caught.value.hint == "run the command again when the cause is gone"
        assert len(list(tmp_path.iterdir())) < 400

    def test_a_refusal_ends_the_run_as_it_is(
        self, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray ends the process of a driver that cancels a task at the wrong moment.

        Every piece from the third on is refused: one alone may wait for a worker that starts, while others do the rest.
        """
        monkeypatch.setattr(ray_library(), "cancel", lambda *_, **__: pytest.fail("a task was cancelled"))
        with pytest.raises(InputError, match=r"piece \d+ cannot be") as caught:
            squares(cluster, Square(str(tmp_path), refused=tuple(range(2, 500))), 500)
        assert (caught.value.where, caught.value.hint) == ("here", "leave it out")
        assert len(list(tmp_path.iterdir())) < 100, "no more pieces are handed out"

    def test_more_threads_than_any_machine_has(self, nodes: Any, cluster: Cluster, tmp_path: Path) -> None:
        with open_cluster(nodes.address, CORES + 1) as opened, pytest.raises(InputError, match="has 8 cores"):
            squares(opened, Square(str(tmp_path)), 1)


N, SIZE = 40, 4
OPTIONS: dict[str, Any] = {"shard_size": SIZE, "sampler": "ddpm", "seed": 3}


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MACHINES)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "f"
    sample_to_folder(hand.bundle, folder, N, threads=1, **OPTIONS)
    return folder


@pytest.mark.usefixtures("cluster")
class TestShards:
    """The same bytes as one process."""

    @pytest.mark.parametrize("workers", [7, 2, 1])
    def test_any_number_of_workers(self, hand: Compiled, nodes: Any, whole: Path, tmp_path: Path, workers: int) -> None:
        """A piece that asks for more cores leaves room for fewer workers."""
        threads = CORES // workers
        drawn = sample_to_folder(hand.bundle, tmp_path, N, cluster=nodes.address, threads=threads, **OPTIONS)

        assert (drawn.made, drawn.skipped, drawn.pictures) == (tuple(range(10)), (), N)
        assert contents(tmp_path) == contents(whole)

    def test_a_killed_worker(
        self, hand: Compiled, nodes: Any, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """A worker dies in the middle, by a signal from outside."""
        killed: list[int] = []

        def kill(stage: str, done: int, total: int) -> None:
            if stage.startswith("sample") and 0 < done < total and len(killed) < 2:
                for process in _a_worker_of(nodes):
                    killed.append(process)
                    os.kill(process, signal.SIGKILL)

        drawn = sample_to_folder(hand.bundle, tmp_path, N, cluster=nodes.address, threads=3, progress=kill, **OPTIONS)

        assert killed, "no worker was killed"
        time.sleep(0.5)
        assert capfd.readouterr().out == "", "standard output belongs to the command"
        assert drawn.made == tuple(range(10))
        assert contents(tmp_path) == contents(whole)

    def test_resumed_and_the_record_of_machines(
        self, hand: Compiled, cli: Cli, nodes: Any, whole: Path, tmp_path: Path
    ) -> None:
        words = ["sample", hand.bundle.path, "-o", tmp_path / "f", "-n", N, "--shard-size", SIZE, "--seed", 3]
        words += ["--sampler", "ddpm", "--cluster", nodes.address]
        assert cli(*words, "--shards", "2:4", "--json").code == 0
        second = cli(*words, "--json")

        assert second.code == 0, second.err
        printed = json.loads(second.out)
        assert (printed["made"], printed["skipped"]) == ([0, 1, *range(4, 10)], [2, 3])
        assert contents(tmp_path / "f") == contents(whole)
        facts = json.loads((tmp_path / "f" / MACHINES).read_text())
        assert list(facts["pieces"]) == [str(i) for i in range(10)]
        (machine,) = facts["machines"].values()
        assert machine["processor"] and machine["onnxruntime"]
        assert {piece["threads"] for piece in facts["pieces"].values()} == {1}
        np.testing.assert_array_equal(
            np.concatenate([images for _, images in read_shards(tmp_path / "f")]),
            np.concatenate([images for _, images in read_shards(whole)]),
        )

    def test_workers_write_to_an_object_store(
        self, hand: Compiled, nodes: Any, whole: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with object_server(monkeypatch, OBJECTS_PORT) as bucket:
            url = f"{bucket}/run"
            sample_to_folder(hand.bundle, url, N, shards=[4], **OPTIONS, threads=1)
            drawn = sample_to_folder(hand.bundle, url, N, cluster=nodes.address, threads=3, **OPTIONS)
            place = ObjectFolder(url)
            found = {name: place.read(name) for name in place.names()}

        assert (len(drawn.made), drawn.skipped) == (9, (4,))
        pieces = json.loads(found.pop(MACHINES) or b"")["pieces"]
        assert found == contents(whole)
        assert sorted(map(int, pieces)) == [*range(4), *range(5, 10)]

    def test_files_of_a_bundle_that_travel(
        self, hand: Compiled, cluster: Cluster, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The path that the driver names is no folder on the workers' machine."""
        copy = shutil.copytree(hand.bundle.path, tmp_path / "moved")
        bundle = open_bundle(copy)

        def carried(self: Cluster, folder: Path, names: list[str], digest: str) -> CarriedFolder:
            files = self.stored(folder, names)
            shutil.rmtree(copy)
            return CarriedFolder(str(folder), digest, files)

        monkeypatch.setattr(Cluster, "carried", carried)
        place = cache_place() / bundle.manifest.digest
        shutil.rmtree(place, ignore_errors=True)
        try:
            sample_to_folder(bundle, tmp_path / "f", N, cluster="auto", **OPTIONS)
            assert contents(tmp_path / "f") == contents(whole)
            assert (place / "mezzotint.json").is_file()
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def test_the_same_refusals_as_in_one_process(self, hand: Compiled, cli: Cli, nodes: Any, tmp_path: Path) -> None:
        with pytest.raises(TimestepNotDeployed):
            sample_to_folder(hand.bundle, tmp_path / "f", N, cluster=nodes.address, **OPTIONS, steps=3)
        assert not (tmp_path / "f").exists()
        answer = cli("sample", hand.bundle.path, "-o", tmp_path / "x.png", "--cluster", "local")
        assert (answer.code, "--cluster is for folders" in answer.err) == (2, True)

    def test_a_bundle_that_cannot_travel(self, hand: Compiled, nodes: Any, tmp_path: Path) -> None:
        fed = copy.copy(hand.bundle)
        fed.condition_network = ConditionNetwork(lambda x, t, rows: {"context": x}, ("context",))
        with pytest.raises(InputError, match="a function of this process"), open_cluster(nodes.address) as opened:
            CarriedBundle.of(fed, opened)


def _a_worker_of(nodes: Any) -> list[int]:
    """The number of one process that performs a piece; none if there is none just now."""
    raylets = [info.process.pid for node in nodes.list_all_nodes() for info in node.all_processes["raylet"]]
    for child in (child for raylet in raylets for child in psutil.Process(raylet).children()):
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            if child.name() == "ray::enter" and child.status() != "zombie":
                return [child.pid]
    return []


@pytest.mark.usefixtures("cluster")
def test_an_evaluation_has_the_same_bytes(hand: Compiled, nodes: Any, tmp_path: Path) -> None:
    """Pairs are sampled and measured by workers; what a folder has already is measured by the driver."""
    net = feature_net(tmp_path / "features.onnx", size=8)
    options: dict[str, Any] = {
        "features": str(net),
        "speed": False,
        "resamples": 4,
        "batch": 2,
        "shard_size": 2,
        "correction": False,
    }
    more: dict[str, Any] = {"cluster": nodes.address, "threads": 3}
    alone = evaluate_bundle(hand.bundle, hand.exported, 14, threads=3, output=tmp_path / "one", **options)
    spread = evaluate_bundle(hand.bundle, hand.exported, 14, output=tmp_path / "f", **more, **options)
    assert spread.to_json() == alone.to_json()
    assert contents(tmp_path / "f") == contents(tmp_path / "one")
    assert len(json.loads((tmp_path / "f" / MACHINES).read_text())["pieces"]) == 7

    for name in ("eval.json", "pairs_00003.safetensors"):
        (tmp_path / "f" / name).unlink()
    again = evaluate_bundle(hand.bundle, hand.exported, 14, output=tmp_path / "f", **more, **options)
    assert again.to_json() == alone.to_json()
    assert contents(tmp_path / "f") == contents(tmp_path / "one")
    loose = evaluate_bundle(hand.bundle, hand.exported, 14, **more, **options)
    assert loose.to_json() == alone.to_json()


@pytest.mark.usefixtures("cluster")
def test_a_compilation_has_the_same_digest(
    hand: Compiled, nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of floats are added in the order of one process, whoever computed them and whenever they come.

    What workers do is forbidden to this process.
    """
    options = {**SMALL, "threads": 3, "calibration_samples": 10, "calibration_batch": 2}
    training = Reconstruct(unit="layer", behind="start", iterations=3, calls=2, samples=2, held_out=0)
    options["recipe"] = Recipe("all-pieces", "", (*RECIPES["w8a8"].passes, RoundWeights(), training, FitNoise()))
    options["settings"] = {"observe.groups": 0, "observe.channels": "all"}
    said: list[str] = []
    alone = compile_model(hand.exported, tmp_path / "alone", **options, cache=tmp_path / "c1")
    with monkeypatch.context() as patch:
        patch.setattr(RoundingTrainer, "train", lambda *_: pytest.fail("it was trained here"))
        patch.setattr(WeightRounder, "round", lambda self, weight: pytest.fail("it was rounded here"))
        patch.setattr(NoiseNetworks, "follow", lambda *_: pytest.fail("it was followed here"))
        spread = compile_model(
            hand.exported,
            tmp_path / "spread",
            **options,
            cache=tmp_path / "c2",
            cluster=nodes.address,
            progress=lambda stage, done, total: said.append(f"{stage}: {done} of {total}"),
        )

    assert any(line.startswith("observe | ") and line.endswith("5 of 5") for line in said), said
    assert spread.manifest.digest == alone.manifest.digest
    assert "gptq: 2 of 2 weights" in alone.manifest.history[-3].note and alone.manifest.noise
    assert spread.manifest.training == alone.manifest.training and len(alone.manifest.training) == 2
    one, other = ({file.name: file.read_bytes() for file in tmp_path.glob(f"{c}/*/*")} for c in ("c1", "c2"))
    assert one == other and len(one) == 4
    few = compile_model(hand.exported, tmp_path / "few", **{**options, "calibration_samples": 8})
    assert few.manifest.digest != alone.manifest.digest
    costs = [diagnose(alone, hand.exported, threads=3, cluster=where).to_json() for where in (None, nodes.address)]
    assert costs[0] == costs[1]

    timer = SweepTimer(SweepPoints((1, 2), (1,)), repeats=1, rounds=1)
    (swept,) = run_sweep(alone, timer, float_model=hand.exported, cluster=nodes.address)
    assert swept.machine == this_computer() and [call.batch for call in swept.calls] == [1, 2]


@pytest.mark.usefixtures("cluster")
def test_rows_of_an_experiment_are_continued_and_the_same(
    nodes: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are those of leaderboards: tools/leaderboard.py measures its own in the same way."""
    ir.save(tiny_model(), tmp_path / "unet.onnx")
    text = "name: small\nmodels: [{model: unet.onnx, scheduler: cosine}]\nrecipes: [w8a8]\nwidths: [w8a8]\n"
    text += "seeds: [0, 1]\nimages: 2\ncalibration: 2\nsteps: 3\nbatch: 2\nthreads: 3\n"
    (tmp_path / "e.yaml").write_text(text, encoding="utf-8")
    found = []
    for name, how in (("one", []), ("spread", ["--cluster", nodes.address])):
        words = [str(tmp_path / "e.yaml"), "--folder", str(tmp_path / name), *how]
        assert experiment.main(words) == 0
        if how:
            assert capsys.readouterr().out.count(" s on ") == 2
            (tmp_path / name / "unet" / "rows" / "w8a8-w8a8-seed1.json").unlink()
            assert experiment.main(words) == 0
            assert capsys.readouterr().out.count(" s on ") == 1
        rows = [cell["row"] for cell in json.loads((tmp_path / name / "results.json").read_text())["rows"]]
        found.append([{key: value for key, value in row.items() if key != "seconds"} for row in rows])
    assert len(found[0]) == 2 and found[0] == found[1]


def _second_node(nodes: Any) -> Any:
    """A second node. Ray gives a node 30 seconds to start, which a busy machine may need twice."""
    try:
        return nodes.add_node(num_cpus=CORES, object_store_memory=100 << 20)
    except Exception as error:  # of class Exception itself
        if "timed out during startup" not in str(error):
            raise
        return nodes.add_node(num_cpus=CORES, object_store_memory=100 << 20)


def test_a_lost_machine(nodes: Any, cluster: Cluster, tmp_path: Path) -> None:
    """A node dies with the piece that it works on; it is done again on another one."""
    second = _second_node(nodes)
    homes: dict[int, str] = {}
    assert [place.cores for place in cluster.places()] == [CORES], "two nodes of one machine are one place"
    one, other = (Place("", node["NodeID"], CORES) for node in ray_library().nodes() if node["Alive"])
    (tmp_path / "pinned").mkdir()
    places = [one, other, other] * 2
    pinned = cluster.answers(Square(str(tmp_path / "pinned")), range(6), stage="square", places=places)
    assert {piece: answer.stamp.node for piece, answer in pinned} == {i: place.node for i, place in enumerate(places)}
    lost = ""
    with open_cluster(nodes.address, CORES) as opened:  # one piece at a time on each node
        work = Square(str(tmp_path), delays=(0.2,), threads=CORES)
        for piece, answer in opened.answers(work, range(40), stage="square"):
            assert answer.result == piece * piece and piece not in homes
            homes[piece] = answer.stamp.node
            if not lost and len(set(homes.values())) == 2:
                lost = answer.stamp.node
                deadline = time.monotonic() + 3
                while len(list(tmp_path.iterdir())) < len(homes) + 2 and time.monotonic() < deadline:
                    time.sleep(0.01)  # until both nodes have begun another piece
                nodes.remove_node(second, allow_graceful=False)

    assert lost and sorted(homes) == list(range(40))
    assert homes[max(homes)] != lost


def test_a_killed_driver_of_a_local_cluster(hand: Compiled, whole: Path, tmp_path: Path) -> None:
    """The command's own cluster ends with it, and the same command goes on where it stopped."""
    words = ["sample", hand.bundle.path, "-o", tmp_path / "f", "-n", N, "--shard-size", SIZE, "--seed", 3]
    words += ["--sampler", "ddpm", "--cluster", "local:1", "--json"]
    command = [sys.executable, "-m", "mezzotint", *map(str, words)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**kept, "TMPDIR": str(tmp_path / "t"), "HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    (tmp_path / "t").mkdir()
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "f").glob("shard_*.npz")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.name() in ("raylet", "gcs_server", "ray::IDLE") or child.name() == "ray::enter"
    ]
    assert len(workers) >= 3
    process.kill()
    process.communicate()
    made = len(list((tmp_path / "f").glob("shard_*.npz")))
    assert 1 <= made < 10, "it was killed in the middle"
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, [child.name() for child in alive]
    assert not (tmp_path / "home").exists(), "no token is left in the user's home"

    drawn = sample_to_folder(hand.bundle, tmp_path / "f", N, cluster="local", **OPTIONS)
    assert len(drawn.skipped) == made
    assert contents(tmp_path / "f") == contents(whole)
