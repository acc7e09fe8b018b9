"""The error profile of layers: which rows mixdq scores by images."""

from __future__ import annotations

from pathlib import Path

import pytest

from mezzotint.compiler.bits.mixdq import ShortTrajectories, content_scores, unlike
from mezzotint.compiler.bits.profile import Profiler
from mezzotint.compiler.bits.units import BitChoice, Unit, WeightQuantizers, units_of
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from tests.helpers.tiny import context_in


def profiler_of(program: Program, context: Context) -> Profiler:
    planned = pipeline.run_passes(program, [Normalize(), Observe(), ChooseScales()], context)
    quantizers = WeightQuantizers(planned.require_plan(), "mse", "test")
    return Profiler(planned, context, quantizers, units_of(list(layers(planned.graph))), (4, 8), ())


@pytest.fixture
def here(tmp_path: Path) -> Context:
    return context_in(tmp_path)


def test_images_score_content_and_errors_score_the_rest(tiny: Program, here: Context) -> None:
    profiler = profiler_of(tiny, here)
    choices = [[BitChoice(4), BitChoice(8)] for _ in profiler.units]
    errors = [[float(k), 0.5] for k in range(len(choices))]
    content = [unit.name == "b1_conv1" for unit in profiler.units]
    pictures = ShortTrajectories(profiler.program, here, samples=1, length=2)
    with profiler.simulator() as simulator:
        reference = pictures.draw(simulator)
        scores = content_scores(profiler, simulator, pictures, reference, choices, errors, content)

        def moved(unit: Unit, bits: int) -> float:
            rounded = {name_of(unit.weight): profiler.rounded(unit, bits)}
            return unlike(reference, pictures.draw(simulator, lambda call: rounded))

        place = content.index(True)
        assert scores[place] == [moved(profiler.units[place], bits) for bits in (4, 8)]
        assert scores[place][0] > scores[place][1] > 0
    assert [row for k, row in enumerate(scores) if k != place] == [row for k, row in enumerate(errors) if k != place]
