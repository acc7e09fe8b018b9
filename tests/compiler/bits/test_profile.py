"""The error profile of layers: hawq's traces against their closed form, and which rows mixdq scores by images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.bits.mixdq import ShortTrajectories, content_scores, unlike
from mezzotint.compiler.bits.profile import Profile, Profiler
from mezzotint.compiler.bits.simulate import Scene, signal
from mezzotint.compiler.bits.units import BitChoice, Unit, WeightQuantizers, units_of
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from tests.helpers.tiny import context_in, program_of

CHANNELS = 4
CALLS = [0, 2]


def one_layer(group: int) -> Program:
    """epsilon = a 1x1 convolution of the sample: its trace is known."""
    weight = np.random.default_rng(3).standard_normal((CHANNELS, CHANNELS // group, 1, 1)).astype(np.float32)
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,8,8] sample, int64[batch] timestep) => (float[batch,4,8,8] epsilon)
    <float[{",".join(map(str, weight.shape))}] weight>
    {{ [only] epsilon = Conv <group = {group}> (sample, weight) }}""")
    value = next(v for v in model.graph[0].inputs if v is not None and v.name == "weight")
    value.const_value = ir.tensor(weight, name="weight")
    model.graph.register_initializer(value)
    return program_of(model, shape=(CHANNELS, 8, 8))


def profiler_of(program: Program, context: Context) -> Profiler:
    planned = pipeline.run_passes(program, [Normalize(), Observe(), ChooseScales()], context)
    quantizers = WeightQuantizers(planned.require_plan(), "mse", "test")
    return Profiler(planned, context, quantizers, units_of(list(layers(planned.graph))), (4, 8), ())


@pytest.fixture
def here(tmp_path: Path) -> Context:
    return context_in(tmp_path)


def traced(profiler: Profiler, probes: int, spread: float) -> tuple[Profile, list[Scene]]:
    with profiler.simulator() as simulator:
        scenes = simulator.follow(profiler.context, CALLS, 2, "test")
        return profiler.hawq(simulator, scenes, probes, spread), scenes


def powers(scenes: list[Scene]) -> list[float]:
    """Sums of squares of the sample at each call."""
    by_call = {call: [scene.x for scene in scenes if scene.call == call] for call in CALLS}
    return [sum(float(np.square(x, dtype=np.float64).sum()) for x in found) for found in by_call.values()]


def test_a_trace_without_chance_is_exact(here: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each output reads one weight: |J u|^2 = sum x^2 for any signs u. The noise is that over 4, times |dw|^2."""
    monkeypatch.setattr(Profiler, "rounded", lambda self, unit, bits: numpy_of(unit.require_weight()) + 1 / bits)
    profiler = profiler_of(one_layer(CHANNELS), here)
    profile, scenes = traced(profiler, 1, 0.1)
    (unit,) = profiler.units
    trace = np.array(powers(scenes))
    for bits in (4, 8):
        lost = CHANNELS / bits**2
        np.testing.assert_allclose(profile.weights[unit.name][bits], trace / CHANNELS * lost, rtol=2e-3)
    assert profile.traces[unit.name].probes == 1 and profile.traces[unit.name].spread is None


def test_probes_are_added_until_the_trace_is_known(here: Context) -> None:
    """Of a dense layer the trace is 4 sum x^2. Probes find it without a bias, and tell how well."""
    profiler = profiler_of(one_layer(1), here)
    rough, scenes = traced(profiler, 64, 0.3)
    fine, _ = traced(profiler, 64, 0.03)
    few, _ = traced(profiler, 5, 1e-6)
    (unit,) = profiler.units
    exact = np.mean(CHANNELS * np.array(powers(scenes)) / signal(scenes))
    for profile, spread in ((rough, 0.3), (fine, 0.03)):
        trace = profile.traces[unit.name]
        assert trace.spread is not None and trace.spread <= spread
        assert abs(np.mean(trace.values / signal(scenes)) / exact - 1) < 3 * spread
    assert rough.traces[unit.name].probes < fine.traces[unit.name].probes <= 64
    assert few.traces[unit.name].probes == 5, "no more than allowed"
    assert "probes for each trace, with a standard error of" in fine.note()


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
