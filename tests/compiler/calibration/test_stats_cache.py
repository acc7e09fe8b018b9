"""stats_cache: the same calibration is measured once, and anything that changes it is measured again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.calibration.stats_cache import measured_once
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import StatsError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.runtime.sampling.deployment import Deployment

Change = Callable[[Program, Context], tuple[Program, Context]]


def other_weight(program: Program) -> Program:
    model = program.model.clone()
    value = model.graph.initializers["down_w"]
    value.const_value = ir.tensor(numpy_of(value) * np.float32(1.01), name="down_w")
    return replace(program, model=model)


CHANGES: dict[str, Change] = {
    "samples": lambda p, c: (p, replace(c, samples=3)),
    "threads": lambda p, c: (p, replace(c, threads=7)),
    "seed": lambda p, c: (p, replace(c, seed=1)),
    "batch": lambda p, c: (p, replace(c, batch=1)),
    "conditions": lambda p, c: (p, replace(c, conditions={"label": np.zeros(2)})),
    "steps": lambda p, c: (replace(p, deployment=Deployment.of(p.schedule, "ddim", 4)), c),
    "allocation": lambda p, c: (replace(p, allocation=(1, 1, 1)), c),
    "weights": lambda p, c: (other_weight(p), c),
}


@pytest.fixture
def cached(context: Context, tmp_path: Path) -> Context:
    return replace(context, cache=Cache(tmp_path / "cache"))


def measured(program: Program, context: Context) -> tuple[Stats, str]:
    after = pipeline.run_passes(program, [Normalize(), Observe(groups=0)], context)
    assert after.stats is not None
    return after.stats, after.history[-1].note


def test_the_second_time_comes_from_the_cache(tiny: Program, cached: Context) -> None:
    first, said = measured(tiny, cached)
    stages: list[str] = []
    again, note = measured(tiny, replace(cached, progress=lambda stage, done, total: stages.append(stage)))
    assert note == said
    assert "statistics from the cache" in stages and "observe" not in stages
    assert again.digest == first.digest and again.timesteps == first.timesteps and again.calls == first.calls
    assert list(again.summaries) == list(first.summaries)
    for key, summary in first.summaries.items():
        assert np.array_equal(again.summaries[key].histogram, summary.histogram)
        assert (again.summaries[key].total, again.summaries[key].low) == (summary.total, summary.low)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_statistics_is_measured_again(change: str, tiny: Program, cached: Context) -> None:
    made = Stats("d", 1, 1, {})
    assert measured_once(tiny, cached, {}, lambda: made) == (made, False)
    assert measured_once(tiny, cached, {}, pytest.fail)[1]
    program, context = CHANGES[change](tiny, cached)
    assert not measured_once(program, context, {}, lambda: made)[1]
    assert not measured_once(tiny, cached, {"groups": 2}, lambda: made)[1]


def test_stored_weights_count_by_their_contents(tiny: Program, cached: Context, tmp_path: Path) -> None:
    """Two models whose weights lie at the same places of two files have the same text."""
    made = Stats("d", 1, 1, {})
    for i, program in enumerate((tiny, other_weight(tiny))):
        folder = tmp_path / str(i)
        folder.mkdir()
        store.adopt(program.model, folder)
        assert not measured_once(program, cached, {}, lambda: made)[1]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": lambda entry: (entry / "stats.json").write_text("{"),
    "another type": lambda entry: (entry / "stats.json").write_text("[]"),
    "a changed number": lambda entry: (entry / "stats.json").write_text(
        (entry / "stats.json").read_text().replace('"calls": ', '"calls": 1')
    ),
    "no arrays": lambda entry: (entry / "stats.safetensors").unlink(),
    "cut arrays": lambda entry: (entry / "stats.safetensors").write_bytes(b"hello"),
    "a changed byte": lambda entry: (entry / "stats.safetensors").write_bytes(
        (entry / "stats.safetensors").read_bytes()[:-1] + b"?"
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_named(tiny: Program, cached: Context, damage: str) -> None:
    measured(tiny, cached)
    assert cached.cache is not None
    (entry,) = cached.cache.folder.iterdir()
    DAMAGE[damage](entry)
    with pytest.raises(StatsError, match="cannot be read") as caught:
        measured(tiny, cached)
    assert caught.value.where == str(entry) and "delete" in (caught.value.hint or "")


def test_a_failed_measurement_leaves_nothing(tiny: Program, cached: Context) -> None:
    def fails() -> Stats:
        raise StatsError("planted")

    with pytest.raises(StatsError, match="planted"):
        measured_once(tiny, cached, {}, fails)
    assert cached.cache is not None and not cached.cache.folder.exists()
