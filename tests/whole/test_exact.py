"""Passes that claim to be exact, each on whole denoisers: the digits, a UNet with a text prompt, a transformer.

The pipeline compares an exact pass with the graph before it on one call. Here the float graph and the rewritten one are
compared at every call of the deployment, on inputs of their own, with factors wherever there is a place for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.verify import relative_difference
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph.nodes import model_text
from mezzotint.passes.dilate_weights import DilateWeights
from mezzotint.passes.equalize_weights import EqualizeWeights
from mezzotint.passes.fold_time import FoldTime
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.parts import EXACT
from mezzotint.passes.reparameterize_norms import ReparameterizeNorms
from mezzotint.passes.smooth_scales import SmoothScales
from mezzotint.passes.split_shortcuts import SplitShortcuts
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Images
from tests.helpers.models import Compiled, prompts
from tests.helpers.tiny import context_in

TOLERANCE = 1e-4  # relative to the largest value of the prediction, as in the passes
BY_CHANNEL = Observe(groups=0, channels="inputs")
EVERYWHERE: dict[str, Any] = {"run_time": True, "run_time_gain": -100.0, "gain": -100.0, "islands": ()}
PASSES: dict[str, tuple[Pass, ...]] = {
    "fold_time": (FoldTime(),),
    "split_shortcuts": (SplitShortcuts(islands=()),),
    "split_shortcuts-factors": (SplitShortcuts(method="factors", islands=(), samples=1),),
    "equalize_weights": (EqualizeWeights(),),
    "reparameterize_norms": (Observe(channels="inputs"), ReparameterizeNorms()),
    "smooth_scales": (BY_CHANNEL, SmoothScales(alphas=0.5, **EVERYWHERE)),
    "dilate_weights": (BY_CHANNEL, DilateWeights(**EVERYWHERE)),
}
NOTHING = {  # where a model has nothing for a pass
    ("dit", "fold_time"),
    ("dit", "split_shortcuts"),
    ("dit", "split_shortcuts-factors"),
}


@dataclass(frozen=True)
class Model:
    """A denoiser as it was imported, behind the first two passes of all recipes, and behind all exact ones of w8a8."""

    name: str
    program: Program
    frozen: Program
    lowered: Program
    conditions: dict[str, Any]


@pytest.fixture(scope="module", params=["digits", "conditional", "dit"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name: str = request.param
    folder = tmp_path_factory.mktemp(name)
    schedule = Schedule.named("ddpm-linear")
    deployed: dict[str, Any] = {"schedule": schedule, "deployment": Deployment.of(schedule, "ddim", 2)}
    conditions: dict[str, Any] = {}
    if name == "digits":
        exported = request.getfixturevalue("exported_digits") / "unet" / "model.onnx"
        program = import_onnx(exported, folder, **deployed, size=(32, 32))
    elif name == "conditional":
        compiled: Compiled = request.getfixturevalue("conditional")
        program = import_onnx(compiled.exported, folder, **deployed, size=(8, 8))
        conditions = {"encoder_hidden_states": prompts(2)}
    else:
        program = import_onnx(request.getfixturevalue("dit"), folder, **deployed)
        conditions = {"class_labels": np.array([1, 7])}
    context = context_in(folder, conditions=conditions)
    frozen = pipeline.run_passes(program, EXACT[:2], context)
    return Model(name, program, frozen, pipeline.run_passes(frozen, EXACT[2:], context), conditions)


def outputs(program: Program, folder: Path, conditions: dict[str, Any]) -> Images:
    """The predictions at every call `[calls, ...]`."""
    x = np.random.default_rng(7).standard_normal((2, *program.shape)).astype(np.float32)
    with Executor(program.model, folder, threads=2) as executor:
        calls = [executor.call(program.signature, x, t, conditions) for t in program.deployment.timesteps]
    return np.stack([np.asarray(call[program.signature.output], np.float32) for call in calls])


@pytest.mark.parametrize("name", PASSES)
def test_the_float_graph_stays(model: Model, name: str, tmp_path: Path) -> None:
    before = model.frozen if name == "fold_time" else model.lowered

    after = pipeline.run_passes(before, PASSES[name], context_in(tmp_path, conditions=model.conditions))

    changed = model_text(after.model) != model_text(before.model)
    assert changed != ((model.name, name) in NOTHING), after.history[-1].note
    wanted = outputs(model.program, tmp_path, model.conditions)
    assert relative_difference(wanted, outputs(after, tmp_path, model.conditions)) < TOLERANCE
    assert relative_difference(wanted, wanted * 1.01) > TOLERANCE, "a percent would be seen"
