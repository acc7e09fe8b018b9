"""Training on a device: one that is not there is refused early, and on one that is there nothing stays behind.

No test runs on CUDA. The second device of tests/helpers/second_device.py computes on the CPU, so all must be equal.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.compiler.training import torch_device
from mezzotint.passes.distill import Distill
from mezzotint.passes.learn_scales import LearnScales
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import with_options
from mezzotint.passes.reconstruct import Reconstruct
from tests.helpers.second_device import SECOND, SecondDevice
from tests.helpers.tiny import context_in, tiny_program

UNIT: dict[str, Any] = {"iterations": 4, "calls": 2, "samples": 2, "held_out": 0}
WHOLE: dict[str, Any] = {"iterations": 4, "samples": 4, "held_out": 2, "checks": 1, "weight_steps": 2e-2}
PASSES = [
    Reconstruct(**UNIT, inner=1.0),
    LearnScales(**UNIT, what="both"),
    LearnScales(**UNIT, through="network", form="network"),
    Distill(**WHOLE, unroll=2, scales="activations"),
    Distill(**WHOLE, unroll=1, weights="adapters", blocks=1.0, relations=1.0),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """The tiny denoiser with weights of 3 bits, and tables for its steps."""
    options = {"choose_scales.weight_bits": 3, "choose_scales.weights": "minmax"}
    steps = with_options(RECIPES["w8a8-steps"], options).passes
    return pipeline.run_passes(tiny_program(steps=3), steps, context_in(tmp_path_factory.mktemp("program")))


def trained(program: Program, step: Pass, context: Context, **changes: Any) -> Program:
    return pipeline.run_passes(program, [step], replace(context, threads=1, **changes))


def constants(program: Program) -> dict[str, np.ndarray]:
    return {name: numpy_of(value) for name, value in program.graph.initializers.items()}


@pytest.mark.parametrize("step", PASSES, ids=lambda step: step.name)
def test_a_pass_trains_on_a_second_device_alone(
    step: Pass, program: Program, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes are the bytes of the CPU."""
    here = trained(program, step, context)
    monkeypatch.setattr(torch_device, "find_device", torch.device)
    with SecondDevice() as second:
        there = trained(program, step, context, device=SECOND.type)
    assert second.computed > 1000
    assert here.training == there.training and any(len(unit.losses) for unit in here.training)
    old, new = constants(here), constants(there)
    assert old.keys() == new.keys()
    for name, array in old.items():
        np.testing.assert_array_equal(new[name], array, err_msg=name)


def test_the_second_device_finds_what_was_left_behind() -> None:
    with SecondDevice(), pytest.raises(RuntimeError, match="tensors on two devices"):
        torch.ones(2, device=SECOND) + torch.ones(2)
