"""prune_weights: so many zeros, in their pattern, and outputs nearer than those of magnitude pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.bundle.writer import save_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.lowering.lower import lower, lower_float
from mezzotint.compiler.rounding.weights import find_weights
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.prune_weights import PruneWeights
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.session import open_session
from tests.conftest import Check
from tests.helpers.tiny import tiny_program


@pytest.fixture
def program(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(), [Normalize()], context)


def pruned(program: Program, context: Context, **options: Any) -> Program:
    return pipeline.run_passes(program, [PruneWeights(**{"calls": 3, "columns": 2048, **options})], context)


def weights(program: Program) -> dict[str, np.ndarray[Any, Any]]:
    return {layer.name: numpy_of(layer.weight) for layer in layers(program.graph) if layer.weight is not None}


def zeros(program: Program) -> dict[str, float]:
    return {name: float(np.mean(values == 0)) for name, values in weights(program).items()}


def sqnr(before: Program, after: Program, context: Context) -> float:
    """Of epsilon in dB on noise."""
    x = np.random.default_rng(7).standard_normal((8, *before.shape)).astype(np.float32)
    outputs = []
    for each in (before, after):
        with Executor(each.model, context.folder, threads=1) as executor:
            outputs.append(
                executor.call(each.signature, x, before.deployment.timesteps[1])["epsilon"].astype(np.float64)
            )
    error = np.sum((outputs[0] - outputs[1]) ** 2)
    return float(10 * np.log10(np.sum(outputs[0] ** 2) / error)) if error else np.inf


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"pattern": "2:4", "sparsity": 0.5}, {"pattern": "blocks", "sparsity": 0.5}]
)
def test_outputs_are_nearer_than_those_of_magnitude_pruning(
    program: Program, context: Context, options: dict[str, Any]
) -> None:
    after, simple = (pruned(program, context, method=method, **options) for method in ("obs", "magnitude"))
    shares = zeros(after)
    islands = [share for share in shares.values() if share == 0]
    assert len(islands) >= 2 and all(share == pytest.approx(0.5, abs=0.02) for share in shares.values() if share)
    assert sqnr(program, after, context) > sqnr(program, simple, context) + 2
    blocked = pruned(program, context, exact_inputs=1, block=16, **options)
    assert sqnr(program, blocked, context) > sqnr(program, simple, context) + 1
    if options.get("pattern") == "2:4":
        up = weights(after)["up"]
        assert (np.count_nonzero(up.reshape(len(up), -1, 4, 9), axis=2) == 2).all()
        q = weights(after)["q"]  # a MatMul holds [inputs, outputs]
        assert (np.count_nonzero(q.reshape(-1, 4, q.shape[1]), axis=1) == 2).all()


@pytest.mark.parametrize("kind", ["size", "flops", "bops"])
def test_budgets_are_kept_and_layers_differ(program: Program, context: Context, kind: str) -> None:
    amount = {"size": 0.7, "flops": 0.55, "bops": 0.6}[kind]
    options = {kind: amount, "bits": 8 if kind == "bops" else 32, "levels": (0, 0.3, 0.6), "samples": 2}
    after = pruned(program, context, **options)
    note = after.history[-1].note
    taken = float(note.split("; ")[-1].split(" ")[0])
    assert amount * 0.8 < taken <= amount
    assert len({round(share, 1) for share in zeros(after).values()}) > 2


def test_two_of_four_by_magnitude(check_golden: Check) -> None:
    after = check_golden(PruneWeights(pattern="2:4", method="magnitude"), "two_of_four")
    assert after.history[-1].note.startswith("1 of 4 weights pruned, 2:4: 4 of 8 values are 0")


def test_pruned_weights_stay_zero_in_four_bits_and_the_file_holds_what_is_left(
    context: Context, tmp_path: Path
) -> None:
    recipe = RECIPES["obc-compound"].passes
    after = pipeline.run_passes(tiny_program(), recipe, context)
    assert after.float_model is not None
    floats = {layer.name: layer for layer in layers(after.float_model.graph)}
    for weight in find_weights(after.graph):
        original = floats[weight.name].weight
        assert original is not None
        kept = numpy_of(original) != 0
        assert kept.mean() == pytest.approx(0.5, abs=0.01)
        assert not numpy_of(weight.value)[~kept].any()
    save_model(lower(after), tmp_path / "model.onnx")
    open_session(tmp_path / "model.onnx", threads=1)


def test_a_pruned_float_model_is_smaller_and_the_same(program: Program, context: Context, tmp_path: Path) -> None:
    after = pruned(program, context, sparsity=0.9)
    stored = lower_float(after)
    assert lower_float(program) is program.model
    save_model(after.model, tmp_path / "dense.onnx")
    save_model(stored, tmp_path / "sparse.onnx")
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("sparse", "dense")]
    assert sizes[0] < 0.75 * sizes[1]
    assert sqnr(after, after.with_model(stored), context) == np.inf


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "has 0 budgets"),
    ({"sparsity": 1.0}, "a sparsity is 1"),
    ({"sparsity": 0.0}, "sparsity is 0.0"),
    ({"sparsity": 0.5, "flops": 0.5}, "has 2 budgets: sparsity, flops"),
    ({"pattern": "2:4", "sparsity": 0.6}, "the pattern 2:4 has a sparsity of 0.5, and 0.6 is given"),
    ({"pattern": "3:2"}, "pattern is '3:2'"),
    ({"pattern": "7:11"}, "no multiple of 11"),
    ({"flops": 0.01}, "cannot be met"),
    ({"sparsity": 0.5, "damp": float("nan")}, "damp is nan"),
    ({"sparsity": 0.5, "levels": (0.5, 0.5)}, "levels are not different"),
    ({"sparsity": 0.5, "islands": ("*",)}, "island"),
]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_cannot_be_done_is_refused(
    program: Program, context: Context, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        pruned(program, context, **{"levels": (0, 0.5), "samples": 1, **options})
