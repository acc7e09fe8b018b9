"""Rescaling sites of whole denoisers: how many of each kind, and that random factors everywhere change nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.bits.content import content_layers
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.verify import relative_difference, structure
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph.nodes import Names, remove_dead
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rescaling.edits import apply_edit
from mezzotint.compiler.rescaling.sites import find_pairs, find_sites, rescale_pair, rescale_site
from mezzotint.passes.fold_scales import FoldScales
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.recipes.parts import EXACT
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.schedule import Schedule
from tests.helpers.models import Compiled, prompts
from tests.helpers.tiny import context_in, tiny_program

SCHEDULE = Schedule.named("ddpm-linear")
DEPLOYED: dict[str, Any] = {"schedule": SCHEDULE, "deployment": Deployment.of(SCHEDULE, "ddim", 3)}
HIGH: tuple[Pass, ...] = (Normalize(), FreezeTime(), FoldScales())  # norms as they were exported


def outputs(program: Program, folder: Path, conditions: Conditions) -> npt.NDArray[np.float32]:
    x = np.random.default_rng(1).standard_normal((2, *program.shape)).astype(np.float32)
    with Executor(program.model, folder, threads=2) as executor:
        called = executor.call(program.signature, x, program.deployment.timesteps[1], conditions)
    return np.asarray(called[program.signature.output], np.float32)


def spread(program: Program, folder: Path, conditions: Conditions, *, error: float = 0.0) -> float:
    """Random factors in 0.5 to 2, and random shifts where they are legal, on every site and pair; how much that
    changes the output. With an error, what makes the last of the sites is off by so much."""
    after = replace(program, model=program.model.clone())
    graph, names, rng = after.graph, Names(after.graph), np.random.default_rng(2)
    for site in find_sites(graph):
        if site.kind != "run_time":
            shifts = rng.uniform(-1, 1, site.channels) if not site.shift_reason else None
            rescale_site(graph, names, site, rng.uniform(0.5, 2, site.channels), shifts)
    for pair in find_pairs(graph):
        if not pair.reason:
            rescale_pair(graph, names, pair, rng.uniform(0.5, 2, pair.channels))
    if error:
        site = [site for site in find_sites(graph) if site.kind != "run_time"][-1]
        for edit in site.edits:
            apply_edit(graph, names, edit, np.full(site.channels, 1 + error), np.zeros(site.channels))
    remove_dead(graph)
    structure(after, "sites", before=program)
    return relative_difference(outputs(program, folder, conditions), outputs(after, folder, conditions))


def check(program: Program, passes: tuple[Pass, ...], context: Context, want: dict[str, int], pairs: int) -> None:
    """Kinds and counts, and that the function stays."""
    given = dict(context.condition_rows(0, 2))
    found = pipeline.run_passes(program, passes, context)
    assert Counter(site.kind for site in find_sites(found.graph)) == want
    assert sum(not pair.reason for pair in find_pairs(found.graph)) == pairs
    assert spread(found, context.folder, given) < 1e-4


@pytest.mark.parametrize("passes", [HIGH, EXACT], ids=["high", "lowered"])
def test_tiny(passes: tuple[Pass, ...], context: Context) -> None:
    want = {"run_time": 10, "linear": 1, "value": 1}
    check(tiny_program(), passes, context, want, pairs=1)


@pytest.mark.parametrize("passes", [HIGH, EXACT], ids=["high", "lowered"])
def test_a_conditional_unet(conditional: Compiled, passes: tuple[Pass, ...], tmp_path: Path) -> None:
    program = import_onnx(conditional.exported, tmp_path, **DEPLOYED, size=(8, 8))
    context = context_in(tmp_path, conditions={"encoder_hidden_states": prompts(2)})
    named = pipeline.run_passes(program, (Normalize(),), context)
    layer_names = {layer.name for layer in layers(named.graph)}
    content = {name for name in layer_names if fnmatch(name, "*/attn2/*") or fnmatch(name, "*/ff/*")}
    assert content and content_layers(named) == content, "what diffusers calls cross-attention and feed-forward"
    want = {"run_time": 29, "norm": 16, "value": 8, "gated": 4}
    check(program, passes, context, want, pairs=8)


@pytest.mark.parametrize("passes", [HIGH, (Normalize(),)], ids=["frozen", "timely"])
def test_a_transformer(dit: Path, passes: tuple[Pass, ...], tmp_path: Path) -> None:
    program = import_onnx(dit, tmp_path, **DEPLOYED)
    context = context_in(tmp_path, conditions={"class_labels": np.array([1, 7])})
    frozen = passes is HIGH
    want = {"run_time": 5 if frozen else 8, "adaln": 5, "value": 2}
    check(program, passes, context, want, pairs=2)


def test_a_missing_percent_is_seen(dit: Path, tmp_path: Path) -> None:
    conditions = {"class_labels": np.array([1, 7])}
    program = pipeline.run_passes(
        import_onnx(dit, tmp_path, **DEPLOYED), HIGH, context_in(tmp_path, conditions=conditions)
    )
    assert spread(program, tmp_path, conditions) < 1e-4 < spread(program, tmp_path, conditions, error=0.01)
