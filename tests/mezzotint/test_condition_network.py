"""Conditions that another network computes at each call: drawn, calibrated on and evaluated with the same values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.bench.pairs import compare
from mezzotint.compiler.calibration.calibrate import LockStep, follow_trajectories
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import ConditionError
from mezzotint.debug.diagnose import diagnose
from mezzotint.evaluate.cost import first_rows
from mezzotint.evaluate.run import evaluate_bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.condition_network import ConditionNetwork, Conditions
from mezzotint.runtime.sampling.guidance import combine, doubled
from mezzotint.runtime.sampling.samplers import initial_noise, sample, seeded_noise
from mezzotint.runtime.signature import Images, Timestep
from mezzotint.shards.shards import sample_to_folder
from tests.helpers.models import CONTEXT, SMALL, hand_written, write

HINTS = np.random.default_rng(1).standard_normal((3, CONTEXT)).astype(np.float32)
EMPTY = np.zeros((1, CONTEXT), np.float32)
GUIDED: dict[str, Any] = {"guidance": 2.0, "unconditional": {"hint": EMPTY}}


def compute(x: Images, t: Timestep, rows: Conditions) -> Conditions:
    """A context that depends on the sample, on the timestep, and on a fixed hint."""
    share = x.reshape(len(x), -1).mean(axis=1, keepdims=True) + t / 250
    return {"context": (rows["hint"] * (1 + share)).astype(np.float32)}


NETWORK = ConditionNetwork(compute, ("context",), own=("hint",), rows={"hint": HINTS}, digest="shares")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(hand_written(context="context"), tmp_path_factory.mktemp("fed") / "model.onnx")


@pytest.fixture(scope="module")
def bundle(file: Path) -> Bundle:
    options: dict[str, Any] = {**SMALL, **GUIDED, "recipe": "w8a8-best", "condition_network": NETWORK}
    return compile_model(file, file.parent / "bundle", **options).fed_by(NETWORK)


def test_each_call_of_the_sampler_has_conditions_of_its_own(bundle: Bundle) -> None:
    n, denoiser, plan = 4, bundle.denoiser(1), bundle.deployment
    hints = np.concatenate([np.repeat(EMPTY, n, axis=0), HINTS[np.arange(n) % 3]])

    def by_hand(x: Images, t: Timestep) -> Images:
        both = doubled(x)
        return combine(denoiser(both, t, **compute(both, t, {"hint": hints})), plan.guidance)

    x = initial_noise(5, (n, *bundle.sample_shape))
    expected = sample(by_hand, x, bundle.schedule, plan, noise=seeded_noise(5))
    drawn = bundle.sample(n, seed=5, unconditional={"hint": EMPTY}, threads=1)
    np.testing.assert_array_equal(drawn, expected)
    other = bundle.sample(n, seed=5, unconditional={"hint": EMPTY}, conditions={"hint": HINTS[:1]}, threads=1)
    assert np.abs(other - drawn)[1:3].max() > 1e-2
    constant = replace(NETWORK, compute=lambda x, t, rows: compute(np.zeros_like(x), 0, rows), digest="constant")
    still = bundle.fed_by(constant).sample(n, seed=5, unconditional={"hint": EMPTY}, threads=1)
    assert np.abs(still - drawn).max() > 1e-2


def test_calibration_sees_what_the_network_computes(tiny: Program, context: Context) -> None:
    shared = ConditionNetwork(
        lambda x, t, rows: {"hint": rows["prompt"] * t + x.mean(axis=(1, 2, 3))[:, None]}, ("hint",), ("prompt",)
    )
    signature = replace(tiny.signature, conditions=("prompt", "hint"))
    program = replace(tiny, signature=signature, deployment=replace(tiny.deployment, guidance=3.0))
    program = _with_inputs(program)
    prompts = {"prompt": np.arange(10, dtype=np.float32).reshape(5, 2)}
    context = replace(
        context,
        samples=5,
        batch=2,
        conditions=prompts,
        unconditional={"prompt": EMPTY[:, :2]},
        condition_network=shared,
    )
    seen: list[Images] = []

    def keep(x: Images, t: Timestep, conditions: Conditions) -> Images:
        assert set(conditions) == {"prompt", "hint"}
        np.testing.assert_array_equal(conditions["hint"], shared.compute(x, t, conditions)["hint"])
        assert not conditions["prompt"][: len(x) // 2].any()  # the unconditional half comes first
        seen.append(conditions["hint"].copy())
        return np.asarray(np.sin(x + t / 300), np.float32)

    follow_trajectories(program, context, keep, "test")
    in_turn, calls = seen[:], len(program.deployment.calls)
    seen.clear()
    walk = LockStep(program, context)
    for _ in range(calls):
        walk.advance(keep)
    for i in range(len(walk)):
        for call in range(calls):
            np.testing.assert_array_equal(in_turn[i * calls + call], seen[call * len(walk) + i])


def _with_inputs(program: Program) -> Program:
    import onnx_ir as ir

    model = program.model.clone()
    for name in ("prompt", "hint"):
        value = ir.Value(name=name, shape=ir.Shape(["batch", 2]), type=ir.TensorType(ir.DataType.FLOAT))
        model.graph.inputs.append(value)
    return replace(program, model=model)


def test_it_is_evaluated_beside_the_float_model(bundle: Bundle, file: Path, tmp_path: Path) -> None:
    rows: dict[str, Any] = {"unconditional": {"hint": EMPTY}}
    mine = compare(bundle, file, 4, threads=1, **rows)
    assert 20 < mine.sqnr.pooled() < 80 and np.median(mine.psnr) > 20
    found = evaluate_bundle(bundle, file, 3, features="none", threads=1, speed=False, resamples=100, **rows)
    assert found.metrics["eps_sqnr_db"]["value"] > 20
    timed = first_rows(bundle, 2, {"hint": HINTS})
    assert set(timed) == {"context"} and timed["context"].shape == (2, CONTEXT)
    assert diagnose(bundle, file, calls=1, threads=1, **rows).layers
    sample_to_folder(bundle, tmp_path / "shards", 5, shard_size=2, threads=1, **rows)
    files = sorted((tmp_path / "shards").glob("*.npz"))
    shards = np.concatenate([next(iter(np.load(part).values())) for part in files])
    np.testing.assert_array_equal(shards, bundle.sample(5, threads=1, **rows))
    with pytest.raises(InputError, match="condition_network"):  # another network draws other images
        sample_to_folder(bundle.fed_by(replace(NETWORK, digest="other")), tmp_path / "shards", 5, shard_size=2, **rows)


def test_a_network_is_called_once_for_two_that_are_compared() -> None:
    calls: list[Timestep] = []

    def counting(x: Images, t: Timestep, rows: Conditions) -> Conditions:
        calls.append(t)
        return compute(x, t, rows)

    network = replace(NETWORK, compute=counting)
    x, rows = initial_noise(1, (3, 1, 8, 8)), {"hint": HINTS}
    first = network.at(x, 500, rows)
    assert network.at(x.copy(), 500, rows)["context"] is first["context"] and calls == [500]
    others = (x + 1, 500, rows), (x, 499, rows), (x, 500, {"hint": HINTS.copy()})
    assert all(network.at(*other)["context"] is not first["context"] for other in others)
    assert calls == [500, 500, 499, 500]


@pytest.mark.parametrize(
    ("network", "conditions", "words"),
    [
        (replace(NETWORK, rows={}), {}, "reads 'hint', of which there are no rows"),
        (NETWORK, {"context": HINTS}, "a network computes it at each call"),
        (replace(NETWORK, outputs=("residual",)), {}, "no condition 'residual'"),
        (NETWORK.with_rows({"hint": HINTS * np.nan}), {}, "NaN or infinite values in row 0"),
        (replace(NETWORK, own=()), {"hint": HINTS}, "the model has no condition 'hint'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    file: Path, tmp_path: Path, network: ConditionNetwork, conditions: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConditionError, match=words):
        compile_model(file, tmp_path / "out", condition_network=network, conditions=conditions, recipe="w8a8", **SMALL)
    assert not list(tmp_path.iterdir())


def test_a_network_that_gives_something_else_is_told(bundle: Bundle) -> None:
    rows: dict[str, Any] = {"unconditional": {"hint": EMPTY}, "threads": 1}
    for wrong, words in (
        (lambda x, t, rows: {}, "gave the conditions none"),
        (lambda x, t, rows: {"context": HINTS[:1]}, r"shape \[1, \d+\] for 4 samples"),
    ):
        with pytest.raises(InputError, match=words):
            bundle.fed_by(replace(NETWORK, compute=wrong)).sample(2, **rows)
    with pytest.raises(InputError, match="no condition 'other'"):
        bundle.fed_by(replace(NETWORK, outputs=("other",)))
    with pytest.raises(InputError, match="of which there are no rows"):
        bundle.fed_by(replace(NETWORK, rows={})).sample(2, **rows)


def test_recipes_that_train_refuse_it(file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, **GUIDED, "condition_network": NETWORK}
    with pytest.raises(ConditionError, match="recipe without training"):
        compile_model(file, tmp_path / "out", recipe="efficientdm", **options)
