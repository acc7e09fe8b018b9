"""Trajectories in turn and in lock-step: the same latents, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from mezzotint import compile_model
from mezzotint.compiler.calibration.calibrate import LockStep, batch_spans, follow_trajectories
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import ConditionError, ModelError
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.sampling.deployment import SAMPLERS, Deployment
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.samplers import initial_noise, run_solver
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import open_session
from mezzotint.runtime.signature import EXTRA_CHANNELS, Images, Timestep
from tests.helpers.models import SMALL, hand_written, write
from tests.helpers.tiny import program_of, tiny_program

Seen = list[list[Images]]
CONTEXT_ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)
EMPTY_ROW = np.full((1, 2), -1, np.float32)


def denoise(x: Images, t: Timestep, conditions: Conditions, factor: float = 1.0) -> Images:
    output = np.float32(factor) * np.sin(1.3 * x + t / 300)
    for rows in conditions.values():
        output = output + rows.mean(axis=1)[:, None, None, None] / 10
    return np.asarray(output, np.float32)


def in_turn(program: Program, context: Context) -> Seen:
    """The latents of all samples at each call, batch after batch."""
    calls = program.deployment.calls
    seen: Seen = [[] for _ in calls]
    count = 0

    def keep(x: Images, t: Timestep, conditions: Conditions) -> Images:
        nonlocal count
        assert t == calls[count % len(calls)]
        seen[count % len(calls)].append(x.copy())
        count += 1
        return denoise(x, t, conditions)

    assert follow_trajectories(program, context, keep, "test") == count
    return seen


def in_step(program: Program, context: Context, factor: float = 1.0) -> Seen:
    walk = LockStep(program, context)
    seen: Seen = []
    for _ in program.deployment.calls:
        seen.append([x.copy() for x, _ in walk.batches()])
        walk.advance(lambda x, t, c: denoise(x, t, c, factor))
    return seen


def check_same(a: Seen, b: Seen) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert len(one) == len(other)
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)


CHOICES = [("ddim", 0.0), ("ddim", 0.7), *((sampler, 0.0) for sampler in SAMPLERS if sampler not in ("ddim",))]


@pytest.mark.parametrize(("sampler", "eta"), CHOICES)
def test_lock_step_sees_the_latents_of_the_trajectories(context: Context, sampler: str, eta: float) -> None:
    program = tiny_program(steps=5)
    if sampler == "flow-euler":
        program = replace(program, schedule=Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    program = replace(program, deployment=Deployment.of(program.schedule, sampler, 5, eta))
    five = replace(context, samples=5)
    check_same(in_turn(program, five), in_step(program, five))
    with pytest.raises(AssertionError):
        check_same(in_turn(program, five), in_step(program, five, factor=1.01))


def conditional(context: Context, guidance: float) -> tuple[Program, Context]:
    """A program with a condition `[batch, 2]`; its graph reads nothing, calibration here has denoisers of its own."""
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,1,8,8] sample, int64[batch] timestep, float[batch,2] prompt) => (float[batch,1,8,8] epsilon)
    { epsilon = Identity (sample) }""")
    program = program_of(model, conditions=("prompt",), steps=4)
    program = replace(program, deployment=replace(program.deployment, guidance=guidance))
    given = replace(context, conditions={"prompt": CONTEXT_ROWS}, unconditional={"prompt": EMPTY_ROW})
    return program, replace(given, samples=5)


def test_both_halves_of_a_guided_call(context: Context) -> None:
    program, five = conditional(context, 3.0)
    seen: list[tuple[Images, Conditions]] = []

    def keep(x: Images, t: Timestep, conditions: Conditions) -> Images:
        seen.append((x.copy(), conditions))
        return denoise(x, t, conditions)

    calls = follow_trajectories(program, five, keep, "test")
    assert calls == 3 * 4 == len(seen)
    for i, (x, conditions) in enumerate(seen):
        first = 2 * (i // 4)
        rows = min(2, 5 - first)
        assert x.shape == (2 * rows, 1, 8, 8)
        np.testing.assert_array_equal(x[:rows], x[rows:])
        np.testing.assert_array_equal(conditions["prompt"][:rows], np.repeat(EMPTY_ROW, rows, axis=0))
        np.testing.assert_array_equal(conditions["prompt"][rows:], CONTEXT_ROWS[first : first + rows])
    check_same(in_turn(program, five), in_step(program, five))


def test_a_guided_trajectory_is_that_of_two_separate_calls(context: Context) -> None:
    program, five = conditional(context, 3.0)

    def last(scale: float) -> Images:
        """x at the last call of the first batch, by two calls."""
        solver = program.deployment.solver(program.schedule)
        seen: list[Images] = []

        def predict(x: Images, t: Timestep) -> Images:
            seen.append(x)
            without = denoise(x, t, {"prompt": np.repeat(EMPTY_ROW, 2, axis=0)})
            return without + np.float32(scale) * (denoise(x, t, {"prompt": CONTEXT_ROWS[:2]}) - without)

        run_solver(predict, initial_noise(five.seed, (2, *program.shape)), solver)
        return seen[-1]

    found = in_turn(program, five)[-1][0]
    np.testing.assert_allclose(found[:2], last(3.0), rtol=0, atol=1e-4)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(found[:2], last(3.1), rtol=0, atol=1e-4)


def test_a_batch_in_the_graph_holds_both_halves(context: Context) -> None:
    program, five = conditional(context, 3.0)
    for value in program.graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape([4, *list(value.shape)[1:]])
    assert batch_spans(program, five) == [(0, 2), (2, 2), (4, 2)]
    assert {len(x) for batches in in_turn(program, five) for x in batches} == {4}
    unguided = replace(program, deployment=replace(program.deployment, guidance=1.0))
    assert batch_spans(unguided, five) == [(0, 4), (4, 4)]
    program.graph.inputs[0].shape = ir.Shape([3, 1, 8, 8])
    with pytest.raises(ConditionError, match="batch of 3 cannot hold both halves"):
        batch_spans(program, five)


def test_refused_guidance(context: Context) -> None:
    program, five = conditional(context, 3.0)
    with pytest.raises(ConditionError, match="guidance 3 needs unconditional rows"):
        LockStep(program, replace(five, unconditional={}))
    with pytest.raises(ConditionError, match="no condition 'other'"):
        LockStep(program, replace(five, unconditional={"other": EMPTY_ROW}))
    with pytest.raises(ConditionError, match=r"unconditional data for 'prompt' has the shape \[1, 3\]"):
        in_turn(program, replace(five, unconditional={"prompt": np.zeros((1, 3), np.float32)}))
    plain = tiny_program()
    guided = replace(plain, deployment=replace(plain.deployment, guidance=2.0))
    with pytest.raises(ConditionError, match="guidance is for models with a condition"):
        LockStep(guided, context)


def test_batches(context: Context) -> None:
    program = tiny_program()
    assert batch_spans(program, replace(context, samples=5)) == [(0, 2), (2, 2), (4, 1)]
    assert len(LockStep(program, replace(context, samples=5))) == 3
    program.graph.inputs[0].shape = ir.Shape([3, *program.shape])
    assert batch_spans(program, replace(context, samples=5)) == [(0, 3), (3, 3)]


def test_conditions_are_checked_first(context: Context) -> None:
    with pytest.raises(ConditionError, match="no condition 'prompt'"):
        LockStep(tiny_program(), replace(context, conditions={"prompt": np.zeros((1, 2), np.float32)}))


@pytest.mark.parametrize("drive", [in_turn, in_step])
def test_a_model_that_predicts_other_channels_is_refused(
    tiny: Program, context: Context, drive: Callable[[Program, Context], Seen]
) -> None:
    channels, height, width = tiny.shape
    inpainting = replace(tiny, shape=(2 * channels + 1, height, width))

    assert drive(tiny, context)
    with pytest.raises(ModelError, match=f"takes {2 * channels + 1} channels and predicts {channels}") as caught:
        drive(inpainting, context)
    assert "--channels" in (caught.value.hint or "")


def test_extra_channels_are_a_condition(tmp_path: Path) -> None:
    proto = hand_written()
    first = next(t for t in proto.graph.initializer if t.name == "first.w")
    wider = np.repeat(numpy_helper.to_array(first), 3, axis=1)
    first.CopyFrom(numpy_helper.from_array(wider, "first.w"))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    source = write(proto, tmp_path / "inpainting.onnx")

    with pytest.raises(ConditionError, match="condition 'extra_channels'"):
        compile_model(source, tmp_path / "b", recipe="w8a8", **SMALL)
    extra = np.random.default_rng(0).standard_normal((3, 2, 8, 8)).astype(np.float32)
    bundle = compile_model(source, tmp_path / "b", recipe="w8a8", conditions={EXTRA_CHANNELS: extra}, **SMALL)

    assert (bundle.signature.conditions, bundle.sample_shape) == ((EXTRA_CHANNELS,), (1, 8, 8))
    x, t = np.ones((3, 1, 8, 8), np.float32), bundle.deployment.timesteps[0]
    [want] = open_session(source).run(None, {"x": np.concatenate([x, extra], axis=1), "t": np.full(3, t)})
    got = bundle.denoiser(1)(x, t, extra_channels=extra)
    assert sqnr_db(want, got) > 20
    assert sqnr_db(want, bundle.denoiser(1)(x, t, extra_channels=-extra)) < 20
    assert bundle.sample(2, conditions={EXTRA_CHANNELS: extra}).shape == (2, 1, 8, 8)
