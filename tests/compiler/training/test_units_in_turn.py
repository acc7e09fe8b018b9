"""Units that are trained from the start of the pass: in any order, on any worker, and each known by its cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.cluster.driver import Cluster
from mezzotint.cluster.ledger import ClusterError
from mezzotint.cluster.spread import ClusterSpread
from mezzotint.cluster.tasks import Answer
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import StatsError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.compiler.training import units_in_turn
from mezzotint.compiler.training.rounding_of_unit import RoundingTrainer
from mezzotint.passes.learn_scales import LearnScales
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.reconstruct import Reconstruct
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import DETAIL
from tests.helpers.spreads import Backwards, ClusterHere
from tests.helpers.tiny import context_in, tiny_program

QUICK: dict[str, Any] = {"held_out": 0, "iterations": 6, "calls": 2, "samples": 2, "batch": 2}
ROUNDING: dict[str, Any] = {**QUICK, "unit": "layer", "learning_rate": 0.3, "drop": 0.2, "curvature": "fisher"}
TRAININGS = ("reconstruct", "learn_scales")


def training(name: str, **options: Any) -> Pass:
    if name == "reconstruct":
        return Reconstruct(**{**ROUNDING, **options})
    return LearnScales(**{**QUICK, "through": "layer", **options})


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The tiny denoiser, with weights and activations of 4 bits."""
    narrow = {"choose_scales.weight_bits": 4, "choose_scales.activation_bits": 4}
    steps = with_options(RECIPES["w8a8"], narrow).passes
    return pipeline.run_passes(tiny_program(steps=3), steps, context_in(tmp_path_factory.mktemp("program")))


def after(step: Pass, program: Program, context: Context, **parts: Any) -> Program:
    return pipeline.run_passes(program, [step], replace(context, threads=1, **parts))


def constants(program: Program) -> dict[str, Any]:
    return {name: numpy_of(value) for name, value in program.graph.initializers.items()}


def assert_same(one: Program, other: Program) -> None:
    a, b = constants(one), constants(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("name", TRAININGS)
def test_workers_train_the_same_units(name: str, program: Program, context: Context) -> None:
    step = training(name, behind="start")
    here = after(step, program, context)
    spread = Backwards()
    there = after(step, program, context, spread=spread)
    assert spread.pieces == {name: len(here.training)} and len(here.training) > 2
    assert there.training == here.training and there.history[-1].note == here.history[-1].note
    assert_same(there, here)
    assert any(fit.kept for fit in here.training)

    turns = Backwards()
    behind = after(training(name), program, context, spread=turns)
    assert turns.pieces == {}, "a unit that reads what another one learned waits for it"
    first, *others = zip(here.training, behind.training, strict=True)
    assert first[0] == first[1], "nothing is trained before the first unit"
    assert any(apart.start != later.start for apart, later in others)


@pytest.mark.parametrize("name", TRAININGS)
def test_each_unit_is_known_by_itself(name: str, program: Program, context: Context, tmp_path: Path) -> None:
    """A cache of some units, in whatever order they were trained, serves them all."""
    seen: list[str] = []
    cached: dict[str, Any] = {"cache": Cache(tmp_path / "cache"), "progress": lambda stage, *_: seen.append(stage)}

    def trained() -> set[str]:
        units = {stage.partition(DETAIL)[0].removeprefix(f"{name}: ") for stage in seen if f"{name}: " in stage}
        seen.clear()
        return units

    whole = after(training(name, behind="start"), program, context)
    units = [fit.unit for fit in whole.training]
    some: Sequence[str] = (units[-1], units[1])
    after(training(name, behind="start", units=some), program, context, **cached)
    assert trained() == set(some)
    spread = Backwards()
    again = after(training(name, behind="start"), program, context, spread=spread, **cached)
    assert spread.pieces == {name: len(units) - len(some)}
    assert again.training == whole.training
    assert_same(again, whole)
    assert_same(after(training(name, behind="start"), program, context, **cached), whole)
    assert trained() == set()


def test_another_torch_is_refused(program: Program, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver asks for its version first, the worker for its own then."""
    versions = iter(["2.13.0", "2.12.1"])
    monkeypatch.setattr(units_in_turn, "version", lambda package: next(versions))
    with pytest.raises(InputError, match=r"has torch 2\.12\.1, and the driver 2\.13\.0"):
        after(Reconstruct(**ROUNDING, behind="start"), program, context, spread=Backwards())


def test_a_unit_that_fails_gives_no_other_its_fit(
    program: Program, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept behind it would be the fit of its neighbour. The same command goes on with what is right."""
    whole = after(Reconstruct(**ROUNDING, behind="start"), program, context)
    cluster = ClusterHere()
    real = cluster.answers

    def failing(work: Any, pieces: Sequence[Any], **how: Any) -> Iterator[tuple[int, Answer]]:
        given_up = 1
        for index, answer in real(work, pieces, **how):
            if index == given_up and how.get("needs_all"):
                break
            if index != given_up:
                yield index, answer
        raise ClusterError("reconstruct failed 3 times")

    monkeypatch.setattr(cluster, "answers", failing)
    spread, cache = ClusterSpread(cast(Cluster, cluster)), Cache(tmp_path / "cache")
    with pytest.raises(ClusterError):
        after(Reconstruct(**ROUNDING, behind="start"), program, context, spread=spread, cache=cache)
    assert len(list((tmp_path / "cache").glob("unit-*"))) == 1
    again = after(Reconstruct(**ROUNDING, behind="start"), program, context, cache=cache)
    assert again.training == whole.training
    assert_same(again, whole)

    one, other, *_ = sorted((tmp_path / "cache").glob("unit-*"))
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(StatsError, match=r"the entry of the unit .* is that of"):
        after(Reconstruct(**ROUNDING, behind="start"), program, context, cache=cache)


def test_integers_of_another_grid_are_not_written(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a unit before it raised the scale of its weight, a unit keeps its start."""
    step = Reconstruct(**ROUNDING, behind="start")
    plain = after(step, program, context)
    kept = [fit.unit for fit in plain.training if fit.kept]
    real = RoundingTrainer.written

    def raising(self: RoundingTrainer, before: Program, *rest: Any) -> Program:
        found = real(self, before, *rest)
        (weight,) = (weight for weight in find_weights(found.graph) if weight.name == kept[1])
        scale = weight.quantize.inputs[1]
        assert scale is not None
        scale.const_value = ir.tensor(numpy_of(scale) * 1.5, name=scale.name)
        return found

    monkeypatch.setattr(RoundingTrainer, "written", raising)
    fits = {fit.unit: fit.kept for fit in after(step, program, context).training}
    assert fits[kept[0]] and not fits[kept[1]]
