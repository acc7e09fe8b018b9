"""distill: a network that is trained as a whole draws images nearer to those of the float network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.trial import compare_programs
from mezzotint.compiler.errors import PassError, RecipeError, StatsError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.layer_inputs import Inputs
from mezzotint.compiler.rounding.weights import QuantizedWeight, find_weights
from mezzotint.compiler.training import network_loss, torch_check, training_pass
from mezzotint.compiler.training.distillation import outputs_of_blocks
from mezzotint.passes.distill import Distill
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from tests.helpers.tiny import context_in, tiny_program

QUICK: dict[str, Any] = {
    "iterations": 40,
    "weight_steps": 5e-3,
    "float_shares": 5e-3,
    "scale_shares": 5e-3,
    "samples": 8,
    "held_out": 8,
    "checks": 2,
    "unroll": 1,
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The tiny denoiser with weights of 3 bits."""
    options = {"choose_scales.weight_bits": 3, "choose_scales.weights": "minmax"}
    steps = with_options(RECIPES["w8a8-steps"], options).passes
    return pipeline.run_passes(tiny_program(steps=3), steps, context_in(tmp_path_factory.mktemp("program")))


@pytest.fixture
def unjudged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last state is kept. A few images of a random network would judge by chance."""
    rising = iter(range(100))
    monkeypatch.setattr(network_loss.NetworkLoss, "image_db", lambda *_: float(next(rising)))
    monkeypatch.setattr(training_pass, "judged", lambda before, after, context, samples, note, by: after.noted(note))


def trained(program: Program, context: Context, **options: Any) -> Program:
    return pipeline.run_passes(program, [Distill(**{**QUICK, **options})], replace(context, threads=1))


def constants(program: Program) -> dict[str, np.ndarray]:
    return {name: numpy_of(value) for name, value in program.graph.initializers.items()}


def moved(before: Program, after: Program) -> set[str]:
    old, new = constants(before), constants(after)
    return {name for name in old if name not in new or not np.array_equal(old[name], new[name])}


def test_images_are_better(program: Program, context: Context) -> None:
    """Those of held-out noise, which decide."""
    after = trained(program, context)
    assert "; kept: on held-out noise" in after.history[-1].note
    fit = after.training[-1]
    assert fit.kept and fit.hard < fit.start and min(fit.losses) < 0.9
    assert moved(program, after)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "adapters", "rank": 2},
        {"scales": "both"},
        {"unroll": 2},
        {"blocks": 0.3, "relations": 0.3},
    ],
    ids=["adapters", "scales", "unroll", "inside"],
)
@pytest.mark.usefixtures("unjudged")
def test_predictions_are_better(program: Program, context: Context, options: dict[str, Any]) -> None:
    """On noise of another seed, by the lowered graphs."""
    after = trained(program, context, **options)
    old, new = compare_programs((program, after), replace(context, seed=context.seed + 50), 8, "test")
    assert new.prediction_db > old.prediction_db + 0.2
    assert any("scale" in name for name in moved(program, after)) == ("scales" in options)


def test_only_what_has_a_row_for_each_sample_is_compared_between_blocks(program: Program) -> None:
    """Blocks share rows of tables and the ones of norms too."""
    model = program.require_float_model().clone()
    shared = next(v for node in model.graph for v in node.outputs if v.name == "down")
    assert {"down", "b1_out"} <= set(outputs_of_blocks(program))
    shared.shape = ir.Shape([4])
    assert "down" not in outputs_of_blocks(replace(program, float_model=model))


def integers_of(weight: QuantizedWeight) -> np.ndarray:
    return np.asarray(np.rint(weight.rows() / weight.scale()[:, None]))


@pytest.mark.parametrize("scales", ["none", "both"])
@pytest.mark.usefixtures("unjudged")
def test_quantized_weights_are_on_their_grids(program: Program, context: Context, scales: Any) -> None:
    """Their scales move with `both` only."""
    after = trained(program, context, floats=False, scales=scales)
    for old, new in zip(find_weights(program.graph), find_weights(after.graph), strict=True):
        assert np.array_equal(old.scale(), new.scale()) == (scales == "none")
        integers = new.rows() / new.scale()[:, None]
        np.testing.assert_allclose(integers, np.rint(integers), atol=1e-4)
        assert np.abs(integers).max() < 3.01
    changed = moved(program, after)
    of_weights = tuple(w.value.name or "?" for w in find_weights(program.graph))
    others = [name for name in changed if not name.startswith(of_weights)]
    assert bool(others) == (scales == "both")


@pytest.mark.parametrize("rate", ["weight_steps", "float_shares", "scale_shares"])
@pytest.mark.usefixtures("unjudged")
def test_a_rate_moves_what_it_is_named_after(program: Program, context: Context, rate: str) -> None:
    """The two other rates are too small for float32."""
    rates = {"weight_steps": 1e-12, "float_shares": 1e-12, "scale_shares": 1e-12, rate: 0.3}
    after = trained(program, context, **rates, scales="activations", iterations=3, checks=1)
    weights = {w.value.name for w in find_weights(program.graph)}  # they are written on their grids
    old, new = constants(program), constants(after)
    rest = [n for n in moved(program, after) - weights if not np.allclose(old[n], new[n], rtol=1e-5)]
    kinds = {"scale_shares" if "scale" in name or "zero" in name else "float_shares" for name in rest}
    pairs = zip(find_weights(program.graph), find_weights(after.graph), strict=True)
    kinds |= {"weight_steps" for a, b in pairs if (integers_of(a) != integers_of(b)).any()}
    assert kinds == {rate}


@pytest.mark.usefixtures("unjudged")
def test_only_critical_rows_move(program: Program, context: Context) -> None:
    after = trained(program, context, critical=0.25, weight_steps=0.5, floats=False, iterations=3, checks=1)
    floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
    some = 0
    for old, new in zip(find_weights(program.graph), find_weights(after.graph), strict=True):
        rows = Inputs.of(old, floats, "here").rows()
        critical = np.argsort(-np.abs(rows).mean(axis=1))[: max(1, round(0.25 * len(rows)))]
        changed = np.flatnonzero((integers_of(old) != integers_of(new)).reshape(len(rows), -1).any(axis=1))
        assert set(changed) <= set(critical)
        some += len(changed)
    assert some > 5


def test_only_layers_of_the_kind_move(program: Program, context: Context) -> None:
    after = trained(program, context, kinds=("linear",), floats=False, iterations=4, unroll=9)  # of three calls
    convolutions = [w for w in find_weights(program.graph) if w.readers[0].op_type == "Conv"]
    assert convolutions
    old, new = constants(program), constants(after)
    for weight in convolutions:
        name = weight.value.name or ""
        np.testing.assert_array_equal(old[name], new[name])


def test_the_same_training_twice_gives_the_same_bytes(program: Program, context: Context) -> None:
    one, two = (trained(program, context, iterations=6, checks=1, held_out=2) for _ in range(2))
    for (name, a), b in zip(constants(one).items(), constants(two).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_the_fit_has_as_many_iterations_as_fit_into_the_minutes(program: Program, context: Context) -> None:
    """And with that number of iterations, without minutes, it gives the same weights."""
    after = trained(program, context, minutes=1e-6, iterations=500)
    assert "; 2 of 500 iterations fit into 1e-06 minutes" in after.history[-1].note  # one for each check
    assert len(after.training[-1].losses) == 2
    again = trained(program, context, iterations=2)
    assert after.training == again.training
    whole = trained(program, context, minutes=60.0, iterations=3)
    assert len(whole.training[-1].losses) == 3 and "minutes" not in whole.history[-1].note


def test_a_fit_that_was_stopped_goes_on_behind_its_last_check(
    program: Program, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"branch_rank": 2, "scales": "both", "freeze_below": 0.6, "freeze_window": 7}
    whole = trained(program, context, **options)
    cached = replace(context, cache=Cache(tmp_path / "cache"))
    seen = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal seen
        seen += "loss" in stage
        if seen == 25:  # behind the check at 20
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(program, replace(cached, progress=stop), **options)
    assert sorted(p.name[-2:] for p in (tmp_path / "cache").iterdir()) == ["-0", "-1"]

    losses: list[int] = []
    monkeypatch.setattr(network_loss.NetworkLoss, "draw", _counted(network_loss.NetworkLoss.draw, losses))
    resumed = trained(program, cached, **options)
    assert len(losses) == 20
    assert resumed.training == whole.training
    for (name, a), b in zip(constants(whole).items(), constants(resumed).values(), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    trained(program, cached, **options, float_shares=4e-3)
    assert len(losses) == 60, "other options train anew"


def _counted(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return counted


def test_a_network_with_worse_images_is_thrown_away(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks draw with torch; the written graph has the last word."""
    better = iter(range(100))
    monkeypatch.setattr(network_loss.NetworkLoss, "image_db", lambda *_: float(next(better)))
    after = trained(program, context, weight_steps=0.5, iterations=8, checks=1)
    assert "thrown away" in after.history[-1].note
    assert not after.training[-1].kept
    assert not moved(program, after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"blocks": -1.0}, "blocks is -1"),
        ({"minutes": 0.0}, "minutes is 0"),
        ({"weights": "none", "floats": False}, "nothing moves"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Distill(**options)


def test_a_missing_torch_is_refused_at_once(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_check, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="torch, which is not installed"):
        Distill().check((), program.deployment)


def test_without_a_float_graph_there_is_nothing_to_learn_from(program: Program, context: Context) -> None:
    with pytest.raises(StatsError, match="float graph"):
        trained(replace(program, float_model=None), context)


def test_a_loss_that_is_not_finite_names_the_options_to_lower(program: Program, context: Context) -> None:
    with pytest.raises(PassError, match=r"loss is (nan|inf)"):
        trained(program, context, weight_steps=1e30, float_shares=1e30, iterations=20)
