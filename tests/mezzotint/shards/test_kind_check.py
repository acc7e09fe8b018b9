"""Kinds of processors that join a run: a cluster without Ray, whose worker says that it has another kind."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mezzotint.cluster.driver import Cluster
from mezzotint.cluster.placement import CarriedFolder, Machine, this_computer
from mezzotint.cluster.record import MACHINES, InaccurateProcessor, MixedProcessors
from mezzotint.cluster.tasks import Answer, Stamp
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.options import SamplingOptions
from mezzotint.shards import drawing, kind_check
from mezzotint.shards.drawing import draw_on_cluster
from mezzotint.shards.shards import ShardOptions, plan_shards
from tests.helpers.models import Compiled

OPTIONS = SamplingOptions(steps=2)
FOREIGN = replace(this_computer(), host="elsewhere", features=("avx2",))


@dataclass
class OneByOne:
    """The workers of a cluster as far as drawing uses them: one on this kind of processor, one on FOREIGN."""

    patch: pytest.MonkeyPatch
    threads: int = 1

    def carried(self, folder: Path, names: Sequence[str], digest: str) -> CarriedFolder:
        return CarriedFolder(str(folder.absolute()), digest)

    def answers(self, work: Any, pieces: Sequence[Any], **rest: Any) -> Iterator[tuple[int, Answer]]:
        machines = [this_computer(), FOREIGN]
        workers = [self._opened(work, machine) for machine in machines]
        for i, piece in enumerate(pieces):
            machine = machines[i % 2]
            yield i, Answer(Stamp(f"node000{i % 2}", machine, i % 2, 0.1, 1), workers[i % 2](piece))

    def _opened(self, work: Any, machine: Machine) -> Any:
        with self.patch.context() as patch:
            for module in (drawing, kind_check):
                patch.setattr(module, "this_computer", lambda: machine)
            return pickle.loads(pickle.dumps(work)).open(lambda key: None)


def draw(hand: Compiled, folder: Path, patch: pytest.MonkeyPatch, shards: range) -> dict[str, Any]:
    """Draw shards of one image, and return the record."""
    bundle = hand.bundle
    plan = plan_shards(bundle, folder, 8, OPTIONS, ShardOptions(shard_size=1, format="npz", shards=tuple(shards)))
    cluster = cast(Cluster, OneByOne(patch))
    draw_on_cluster(cluster, bundle, plan.run, plan.missing, plan.options, lambda *_: None)
    return cast(dict[str, Any], json.loads((folder / MACHINES).read_text()))


def test_each_kind_makes_the_fixed_call_once(hand: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args)
        return kind_check.fixed_call(*args)

    monkeypatch.setattr(drawing, "fixed_call", counted)
    with pytest.warns(MixedProcessors, match="2 kinds"):
        facts = draw(hand, tmp_path, monkeypatch, range(4))
    (kind, check), *others = facts["checks"].items()
    assert not others and kind == FOREIGN.kind and check["machine"] == "elsewhere:node0001"
    assert check["against"] == this_computer().kind
    assert (check["sqnr_db"], check["largest_difference"], check["warning"]) == (None, 0, ""), "the same kernels"
    accepted = hand.bundle.manifest.acceptance
    assert accepted is not None and check["expected_sqnr_db"] == accepted.worst().sqnr_db
    with pytest.warns(MixedProcessors):
        again = draw(hand, tmp_path, monkeypatch, range(4, 8))
    assert len(calls) == 1 and again["checks"] == facts["checks"] and len(again["pieces"]) == 8


def test_there_is_a_warning_of_a_kind_with_other_kernels(
    hand: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error and that of the accepted file add up; there is no warning above the limit."""
    rng = np.random.default_rng(0)
    for share, is_warned in ((0.01, False), (0.5, True)):

        def elsewhere(*args: Any, share: float = share) -> Any:
            t, x = kind_check.fixed_call(*args)
            return t, x + np.float32(share * x.std()) * rng.standard_normal(x.shape).astype(np.float32)

        monkeypatch.setattr(drawing, "fixed_call", elsewhere)
        with pytest.warns() as caught:
            facts = draw(hand, tmp_path / str(share), monkeypatch, range(2))
        words = [str(warning.message) for warning in caught if warning.category is InaccurateProcessor]
        check = facts["checks"][FOREIGN.kind]
        assert check["sqnr_db"] == pytest.approx(-20 * np.log10(share), abs=2) and check["largest_difference"] > 0
        assert check["expected_sqnr_db"] <= check["sqnr_db"] and bool(check["warning"]) == is_warned
        assert len(words) == int(is_warned) and all("below the 15 dB of --min-sqnr" in word for word in words)


def test_values_that_are_not_finite_are_refused(
    hand: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kind_check, "predictors", lambda *args: [lambda x, t: np.full_like(x, np.nan)] * 2)
    with pytest.raises(InputError, match="values that are not finite") as refused:
        draw(hand, tmp_path, monkeypatch, range(2))
    assert "elsewhere" in str(refused.value) and not any(tmp_path.iterdir()), "no shard was drawn"
