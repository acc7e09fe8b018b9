"""evolve_scales: the error of epsilon falls, the plan has the scales that the graph has, and the trial can refuse."""

from __future__ import annotations

import numpy as np
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.rounding.weights import find_weights, layer_name
from mezzotint.passes import evolve_scales
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.evolve_scales import EvolveScales
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from tests.helpers.tiny import context_in, tiny_program

SHORT = EvolveScales(passes=1, cycles=2, calls=2, samples=2, held_out=2)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def quantized(context: Context) -> Program:
    steps = [Normalize(), Observe(), ChooseScales(weight_bits=3, weights="minmax"), InsertQdq()]
    return pipeline.run_passes(tiny_program(), steps, context)


def test_scales_move_and_the_error_falls(quantized: Program, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evolve_scales, "judged", lambda before, after, *rest: after.noted(rest[2]))
    after = pipeline.run_passes(quantized, [SHORT], context)
    note = after.history[-1].note
    first, last = (float(word) for word in note.split("epsilon ")[1].split(" after")[0].split(" -> "))
    assert last < 0.97 * first
    moved = 0
    for old, new in zip(find_weights(quantized.graph), find_weights(after.graph), strict=True):
        ratio = new.scale() / old.scale()
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)
        assert abs(np.log(ratio[0])) < 0.2
        if ratio[0] == 1:
            continue  # as it was: in float, in front of its quantizer
        moved += 1
        planned = after.require_plan().of((old.value.name or "").removesuffix("_rows"), layer_name(new.readers[0]))
        assert planned is not None and planned.by == "evolve_scales"
        np.testing.assert_array_equal(planned.scale, new.scale())
        steps = new.rows() / new.scale()[:, None]
        np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)
        assert np.abs(steps).max() < 3.001
    assert moved == int(note.split(" of ")[0]) > 3
    again = pipeline.run_passes(quantized, [SHORT], context)
    assert again.history[-1].note == note


def test_images_of_other_noise_judge(quantized: Program, context: Context) -> None:
    after = pipeline.run_passes(quantized, [SHORT], context)
    assert "on held-out noise" in after.history[-1].note


def test_options_have_ends() -> None:
    with pytest.raises(RecipeError, match="choose a positive number"):
        EvolveScales(spread=0)
