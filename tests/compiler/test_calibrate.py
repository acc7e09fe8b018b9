"""Trajectories in turn and in lock-step: the same latents, whatever the batches."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.calibrate import Conditions, Images, LockStep, batch_spans, follow_trajectories
from mezzotint.compiler.errors import ConditionError
from mezzotint.compiler.pipeline import Context
from mezzotint.compiler.program import Program
from mezzotint.runtime.deployment import Deployment
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
