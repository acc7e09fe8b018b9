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
from mezzotint.compiler.calibrate import Conditions, Images, LockStep, batch_spans, follow_trajectories
from mezzotint.compiler.errors import ConditionError, ModelError
from mezzotint.compiler.pipeline import Context
from mezzotint.compiler.program import Program
from mezzotint.runtime.deployment import Deployment
from tests.models import SMALL, hand_written, write
from tests.tiny import tiny_program

Seen = dict[int, list[Images]]


def denoise(x: Images, t: int, conditions: Conditions, factor: float = 1.0) -> Images:
    return np.asarray(np.float32(factor) * np.sin(1.3 * x + t / 300), np.float32)


def in_turn(program: Program, context: Context) -> Seen:
    """The latents of all samples at each call, batch after batch."""
    seen: Seen = {t: [] for t in program.deployment.timesteps}

    def keep(x: Images, t: int, conditions: Conditions) -> Images:
        seen[t].append(x.copy())
        return denoise(x, t, conditions)

    follow_trajectories(program, context, keep, "test")
    return seen


def in_step(program: Program, context: Context, factor: float = 1.0) -> Seen:
    walk = LockStep(program, context)
    seen: Seen = {}
    for t in program.deployment.timesteps:
        seen[t] = [x.copy() for x, _ in walk.batches()]
        walk.advance(lambda x, t, c: denoise(x, t, c, factor))
    return seen


def check_same(a: Seen, b: Seen) -> None:
    assert list(a) == list(b)
    for t in a:
        assert len(a[t]) == len(b[t])
        for x, y in zip(a[t], b[t], strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 0.0), ("ddim", 0.7), ("ddpm", 0.0)])
def test_lock_step_sees_the_latents_of_the_trajectories(context: Context, sampler: str, eta: float) -> None:
    program = tiny_program(steps=5)
    program = replace(program, deployment=Deployment.of(program.schedule, sampler, 5, eta))
    five = replace(context, samples=5)
    check_same(in_turn(program, five), in_step(program, five))
    with pytest.raises(AssertionError):
        check_same(in_turn(program, five), in_step(program, five, factor=1.01))


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
    assert "--recipe float" in (caught.value.hint or "")


def test_such_a_model_compiles_without_calibration(tmp_path: Path) -> None:
    proto = hand_written()
    first = next(t for t in proto.graph.initializer if t.name == "first.w")
    wider = np.repeat(numpy_helper.to_array(first), 3, axis=1)
    first.CopyFrom(numpy_helper.from_array(wider, "first.w"))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 3
    source = write(proto, tmp_path / "inpainting.onnx")

    bundle = compile_model(source, tmp_path / "float", recipe="float", **SMALL)

    x = np.ones((2, 3, 8, 8), np.float32)
    assert bundle.denoiser(1)(x, bundle.deployment.timesteps[0]).shape == (2, 1, 8, 8)
    with pytest.raises(ModelError, match="takes 3 channels and predicts 1"):
        compile_model(source, tmp_path / "w8a8", recipe="w8a8", **SMALL)
