"""HAWQ's traces against the Jacobian of a network and against a closed form, and what stops their measurement."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mezzotint.compiler.bits.profile import Profile, Profiler, Trace
from mezzotint.compiler.bits.simulate import Scene, signal
from mezzotint.compiler.bits.units import WeightQuantizers, units_of
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.gradients.probed_network import ProbedNetwork, gradients
from mezzotint.compiler.gradients.traces import hawq_profile, measure_traces, sum_of_squares
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from tests.helpers.tiny import context_in, program_of, tiny_program

CHANNELS = 4
CALLS = [0, 2]


def one_layer() -> Program:
    """epsilon = a 1x1 convolution of the sample: its trace is 4 sum x^2."""
    weight = np.random.default_rng(3).standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,8,8] sample, int64[batch] timestep) => (float[batch,4,8,8] epsilon)
    <float[4,4,1,1] weight> { [only] epsilon = Conv (sample, weight) }""")
    value = next(v for v in model.graph[0].inputs if v is not None and v.name == "weight")
    value.const_value = ir.tensor(weight, name="weight")
    model.graph.register_initializer(value)
    return program_of(model, shape=(CHANNELS, 8, 8))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return context_in(tmp_path_factory.mktemp("traces"), threads=1)


def profiler_of(program: Program, context: Context) -> Profiler:
    planned = pipeline.run_passes(program, [Normalize(), Observe(), ChooseScales()], context)
    quantizers = WeightQuantizers(planned.require_plan(), "mse", "test")
    return Profiler(planned, context, quantizers, units_of(list(layers(planned.graph))), (4, 8), ())


def traced(profiler: Profiler, probes: int, spread: float) -> tuple[Profile, list[Scene]]:
    with profiler.simulator() as simulator:
        scenes = simulator.follow(profiler.context, CALLS, 2, "test")
        return hawq_profile(profiler, simulator, scenes, probes, spread), scenes


def exact_traces(profiler: Profiler, names: Mapping[str, str], scene: Scene) -> dict[str, float]:
    """Sums of squares of the Jacobian of every output of one call by each weight."""
    program = profiler.program
    weights = list(names.values())
    network = ProbedNetwork(program, program.model, torch.device("cpu"), weights=weights, combined=False)
    prediction, _ = network(scene.x, scene.timestep, scene.conditions)
    total = dict.fromkeys(names, 0.0)
    for output in prediction.flatten():
        found = gradients(output, dict(network.weights), keep=True)
        for unit, name in names.items():
            total[unit] += sum_of_squares(found[name])
    return total


def check_means(traces: Mapping[str, Trace], exact: Mapping[str, float], factor: float = 1.0) -> None:
    """Each trace is within four standard errors of the exact one, and all together within the error of their mean."""
    for name, trace in traces.items():
        assert trace.spread is not None
        assert abs(factor * trace.values[0] / exact[name] - 1) < 4 * trace.spread
    ratios = [factor * trace.values[0] / exact[name] for name, trace in traces.items()]
    assert abs(np.mean(ratios) - 1) < 0.1


def test_traces_are_those_of_the_jacobian(here: Context) -> None:
    """For every layer of the tiny network at once; a trace that is off by a quarter is noticed."""
    profiler = profiler_of(tiny_program(), here)
    units = [unit for unit in profiler.units if unit.weight is not None]
    with profiler.simulator() as simulator:
        scenes = simulator.follow(here, [1], 1, "test")
    names = {unit.name: name_of(unit.weight) for unit in units}
    exact = exact_traces(profiler, names, scenes[0])
    traces = measure_traces(profiler, units, scenes, 64, 0.0)
    assert {trace.probes for trace in traces.values()} == {64} and len(traces) > 10
    check_means(traces, exact)
    with pytest.raises(AssertionError):
        check_means(traces, exact, 1.25)


def test_probes_are_added_until_every_trace_is_known(here: Context) -> None:
    profiler = profiler_of(one_layer(), here)
    rough, scenes = traced(profiler, 64, 0.3)
    fine, _ = traced(profiler, 64, 0.05)
    few, _ = traced(profiler, 5, 1e-6)
    (unit,) = profiler.units
    by_call = [[scene.x for scene in scenes if scene.call == call] for call in CALLS]
    powers = np.array([sum(float(np.square(x, dtype=np.float64).sum()) for x in found) for found in by_call])
    exact = np.mean(CHANNELS * powers / signal(scenes))
    for profile, spread in ((rough, 0.3), (fine, 0.05)):
        trace = profile.traces[unit.name]
        assert trace.spread is not None and trace.spread <= spread
        assert abs(np.mean(trace.values / signal(scenes)) / exact - 1) < 3 * spread
    assert rough.traces[unit.name].probes < fine.traces[unit.name].probes <= 64
    assert few.traces[unit.name].probes == 5, "no more than allowed"
    assert "probes for each trace, with a standard error of" in fine.note()


def test_the_noise_is_the_mean_trace_times_the_squared_rounding_error(here: Context) -> None:
    profiler = profiler_of(one_layer(), here)
    profile, _ = traced(profiler, 1, 0.1)
    (unit,) = profiler.units
    weight = numpy_of(unit.require_weight())
    assert profile.traces[unit.name].spread is None, "one probe tells no spread"
    for bits in (4, 8):
        lost = float(np.square(profiler.rounded(unit, bits) - weight, dtype=np.float64).sum())
        wanted = profile.traces[unit.name].values / weight.size * lost
        np.testing.assert_allclose(profile.weights[unit.name][bits], wanted, rtol=1e-6)
