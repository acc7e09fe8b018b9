"""Which piece comes next, and when one is given up; files that travel; kinds of processors. No cluster is started."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mezzotint.cluster import connection
from mezzotint.cluster.connection import check_cluster, open_cluster
from mezzotint.cluster.driver import Cluster
from mezzotint.cluster.ledger import ATTEMPTS, LOSSES, Ledger
from mezzotint.cluster.pace import Pace
from mezzotint.cluster.placement import CarriedFolder, cache_place, mixed_kinds, placed_folder, this_computer
from mezzotint.cluster.record import MACHINES, MachineRecord, MixedProcessors
from mezzotint.cluster.spread import ClusterSpread, _FolderWork, folder_digest
from mezzotint.cluster.tasks import Stamp
from mezzotint.runtime.errors import InputError
from tests.helpers.spreads import ClusterHere
from tests.test_architecture import loaded_after


class TestLedger:
    def test_each_piece_is_taken_once(self) -> None:
        ledger = Ledger(3)
        assert [ledger.take() for _ in range(4)] == [0, 1, 2, None]
        for piece in (2, 0, 1):
            assert not ledger.is_over
            ledger.done(piece)
        assert ledger.is_over and ledger.failures == {}

    def test_a_piece_that_failed_comes_first_and_is_given_up_the_third_time(self) -> None:
        ledger = Ledger(3)
        assert ledger.take() == 0
        for _ in range(ATTEMPTS - 1):
            assert ledger.failed(0, "broken")
            assert ledger.take() == 0
        assert not ledger.failed(0, "broken again")
        assert ledger.failures == {0: "broken again"}
        assert [ledger.take(), ledger.take(), ledger.take()] == [1, 2, None]

    def test_a_lost_machine_is_not_the_fault_of_the_piece(self) -> None:
        ledger = Ledger(1)
        for _ in range(LOSSES - 1):
            assert ledger.take() == 0
            assert ledger.failed(0, "lost", lost=True)
        assert ledger.take() == 0
        assert ledger.failed(0, "its own error")
        assert not ledger.failed(0, "lost", lost=True)

    def test_a_window_waits_for_the_first_piece(self) -> None:
        ledger = Ledger(6, window=2)
        assert [ledger.take(), ledger.take(), ledger.take()] == [0, 1, None]
        ledger.done(1)
        assert ledger.take() is None
        ledger.done(0)
        assert [ledger.take(), ledger.take(), ledger.take()] == [2, 3, None]

    def test_nothing_to_do(self) -> None:
        assert Ledger(0).is_over


def test_progress_counts_all_workers() -> None:
    said: list[tuple[str, int, int]] = []
    pace = Pace([4, 2], "images", "sample", 2, lambda *words: said.append(words))
    pace.done(1, 1800.0)
    pace.done(0, 1800.0)

    assert [(done, total) for _, done, total in said] == [(0, 6), (2, 6), (6, 6)]
    assert said[1][0].startswith("sample | ") and "s left" in said[1][0]
    assert said[2][0].endswith("images/s, 2 core-hours")


class TestPlacement:
    @pytest.fixture(autouse=True)
    def place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        return tmp_path

    @staticmethod
    def digest(folder: Path) -> str:
        return (folder / "a" / "name").read_text()

    def test_a_folder_at_its_path_is_read_there(self, tmp_path: Path) -> None:
        (tmp_path / "own" / "a").mkdir(parents=True)
        (tmp_path / "own" / "a" / "name").write_text("d1")
        folder = CarriedFolder(str(tmp_path / "own"), "d1", {"a/name": "key"})

        assert placed_folder(folder, self.digest, lambda key: pytest.fail("it was fetched")) == tmp_path / "own"

    def test_it_is_fetched_once_for_all_workers(self, tmp_path: Path) -> None:
        (tmp_path / "own" / "a").mkdir(parents=True)
        (tmp_path / "own" / "a" / "name").write_text("of another bundle")
        fetched: list[str] = []

        def fetch(key: str) -> bytes:
            fetched.append(key)
            return key.encode()

        folder = CarriedFolder(str(tmp_path / "own"), "d1", {"a/name": "d1", "model": "weights"})
        places = [placed_folder(folder, self.digest, fetch) for _ in range(2)]
        assert places[0] == places[1] and places[0].name == "d1"
        assert (places[0] / "model").read_bytes() == b"weights"
        assert fetched == ["d1", "weights"]
        assert [path.name for path in places[0].parent.iterdir()] == ["d1"], "nothing else is left"

        (places[0] / "a" / "name").write_text("damaged")
        assert self.digest(placed_folder(folder, self.digest, fetch)) == "d1"

    def test_a_folder_without_files(self, tmp_path: Path) -> None:
        """The work has its data in its pieces."""
        place = placed_folder(CarriedFolder(str(tmp_path / "none"), "d2", {}), lambda folder: "d2", str.encode)
        assert (place.name, list(place.iterdir())) == ("d2", [])

    def test_a_machine_without_the_files_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not have the folder"):
            placed_folder(CarriedFolder(str(tmp_path / "none"), "d1"), self.digest, str.encode)

    def test_kinds_of_processors(self) -> None:
        here = this_computer()
        other = replace(here, host="elsewhere", features=("avx2",))

        assert mixed_kinds({"a": here, "b": replace(here, host="second")}) is None
        assert "2 kinds of processors" in (mixed_kinds({"a": here, "b": other}) or "")

    def test_the_record_is_continued_and_tells_mixed_kinds(self, tmp_path: Path) -> None:
        here = this_computer()
        record = MachineRecord(tmp_path, "run")
        record.add(3, Stamp("0123456789", here, 11, 0.5, 1))
        record.close()

        again = MachineRecord(tmp_path, "run")
        again.add(1, Stamp("abcdefghij", replace(here, features=("avx2",)), 12, 0.25, 2))
        with pytest.warns(MixedProcessors, match="2 kinds"):
            again.close()

        facts = json.loads((tmp_path / MACHINES).read_text())
        assert list(facts["pieces"]) == ["1", "3"]
        assert facts["pieces"]["3"] == {"machine": f"{here.host}:01234567", "process": 11, "threads": 1, "seconds": 0.5}
        assert facts["machines"][f"{here.host}:abcdefgh"]["features"] == ["avx2"]
        MachineRecord(tmp_path, "another").close()
        assert json.loads((tmp_path / MACHINES).read_text()) == facts


@dataclass(frozen=True)
class Lengths:
    """The length of each file that a piece names."""

    def open(self, folder: Path, threads: int) -> Callable[[str], int]:
        return lambda name: (folder / name).stat().st_size


class TestSpread:
    def test_there_is_one_warning_of_another_kind_of_processor(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"123")
        here = this_computer()
        for machine, warned in ((here, 0), (replace(here, host="elsewhere", features=("avx2",)), 1)):
            spread = ClusterSpread(ClusterHere(machine))  # type: ignore[arg-type]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(2):
                    assert list(spread.in_order(Lengths(), tmp_path, ["a", "a"], "lengths")) == [3, 3]
            assert [warning.category for warning in caught] == [MixedProcessors] * warned

    def test_files_of_a_stage_that_is_over_go(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """In the store, when the driver's folder is gone, and on a machine that fetched them, with its next work."""
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        objects: dict[int, bytes] = {}
        store = SimpleNamespace(put=lambda array: objects.setdefault(len(objects), array.tobytes()))
        cluster = Cluster(store, 1)
        places: list[list[str]] = []
        for text in ("first", "second", "second"):
            folder = tmp_path / "driver" / str(len(places))
            folder.mkdir(parents=True)
            (folder / "a").write_text(text)
            cluster.drop_missing()
            keys = cluster.stored(folder, ["a"])
            assert list(cluster._files) == list(keys.values())
            carried = CarriedFolder(str(folder), folder_digest(folder, ("a",)), keys)
            shutil.rmtree(folder)
            perform = _FolderWork(carried, ("a",), Lengths(), 1).open(lambda key: cluster._files[key])
            assert perform("a") == len(text)
            places.append(sorted(path.name for path in cache_place().iterdir()))
        assert [len(names) for names in places] == [1, 1, 1]
        assert places[0] != places[1] == places[2]


class TestNames:
    @pytest.mark.parametrize("spec", ["lokal", "local:", "local:0", "local:x", "local:9999", "host", "host:port", ""])
    def test_texts_that_name_no_cluster(self, spec: str) -> None:
        with pytest.raises(InputError) as caught:
            check_cluster(spec)
        assert caught.value.where == "--cluster"

    def test_without_ray_the_extra_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> Any:
            raise ImportError(f"No module named {name!r}")

        monkeypatch.setattr(connection, "find_spec", lambda name: None)
        monkeypatch.setattr("mezzotint.cluster.ray_library.import_module", missing)
        with pytest.raises(InputError, match="needs Ray") as caught, open_cluster("local"):
            pass
        assert "mezzotint[cluster]" in (caught.value.hint or "")

    def test_nothing_of_ray_is_imported_without_a_cluster(self) -> None:
        loaded = loaded_after("import mezzotint.cli.app, mezzotint.shards.draw, mezzotint.cluster.connection")
        assert "numpy" in loaded and not loaded & {"ray", "s3fs", "fsspec", "aiobotocore"}


def test_an_address_that_refuses_is_an_answer_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(InputError, match="no cluster answers"), open_cluster("127.0.0.1:1"):
        pass
    assert time.monotonic() - started < 15  # Ray by itself tries for minutes
