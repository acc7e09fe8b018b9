"""Relevance: the same sum over every cut through a network, and a profile made of it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.gradients.probed_network import ProbedNetwork, gradients
from mezzotint.compiler.gradients.relevance import lrp_profile, measure_relevance
from mezzotint.compiler.gradients.relevance_rules import apply_rules
from mezzotint.compiler.gradients.traces import sum_of_squares
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import name_of, numpy_of
from tests.compiler.gradients.test_traces import profiler_of
from tests.helpers.tiny import context_in, program_of, tiny_program

SIZES = {"a": (8, 2, 3, 3), "b": (8, 8, 1, 1), "c": (8, 8, 1, 1), "d": (2, 8, 1, 1)}


def without_biases(middle: str) -> Program:
    """Convolutions a, b, c, d without biases; `middle` is what happens between h (behind a) and m (in front of d)."""
    declared = ", ".join(f"float[{','.join(map(str, shape))}] {name}" for name, shape in SIZES.items())
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,4,4] sample, int64[batch] timestep) => (float[batch,2,4,4] epsilon)
    <{declared}, float[8] one, float[8] none, float half = {{0.5}}, float root = {{1.41421356}}, float unit = {{1.0}}>
    {{ [a] h = Conv <pads = [1, 1, 1, 1]> (sample, a) {middle} [d] epsilon = Conv (m, d) }}""")
    rng = np.random.default_rng(0)
    arrays = {name: 0.3 * rng.standard_normal(shape) for name, shape in SIZES.items()}
    arrays |= {"one": rng.uniform(0.5, 2, 8), "none": np.zeros(8)}
    for name, array in arrays.items():
        value = next((v for node in model.graph for v in node.inputs if v is not None and v.name == name), None)
        if value is not None:
            value.const_value = ir.tensor(array.astype(np.float32), name=name)
            model.graph.register_initializer(value)
    return program_of(infer_shapes(model), shape=(2, 4, 4))


SILU = "[b] k = Conv (h, b) s = Sigmoid (k) g = Mul (k, s) [c] l = Conv (g, c) m = Add (l, h)"
GELU = """[b] k = Conv (h, b) r = Div (k, root) e = Erf (r) p = Add (e, unit) q = Mul (k, p) g = Mul (q, half)
    [c] m = Conv (g, c)"""
NORM = "n = GroupNormalization <num_groups = 2> (h, one, none) [b] k = Conv (n, b) [c] m = Conv (k, c)"
INSTANCES = "n = InstanceNormalization (h, one, none) [b] k = Conv (n, b) [c] m = Conv (k, c)"
PRODUCT = "[b] k = Conv (h, b) [c] l = Conv (h, c) m = Mul (k, l)"


@pytest.mark.parametrize(
    ("middle", "cut"), [(SILU, ("h",)), (GELU, ("k",)), (NORM, ("h",)), (INSTANCES, ("h",)), (PRODUCT, ("k", "l"))]
)
def test_relevance_is_the_same_over_every_cut(middle: str, cut: tuple[str, ...]) -> None:
    """The rules make it so: the plain gradient times the value does not."""
    program = without_biases(middle)
    x = np.random.default_rng(1).standard_normal((2, 2, 4, 4)).astype(np.float32)
    sums = []
    for rules in (True, False):
        network = ProbedNetwork(program, program.model, torch.device("cpu"), taps=("h", "m", *cut), weights=("a",))
        if rules:
            apply_rules(network.module)
        prediction, tapped = network(x, 0, {})
        slopes = gradients((prediction.square() / 2).sum(), tapped)
        relevance = {name: float((slopes[name] * value.detach().numpy()).sum()) for name, value in tapped.items()}
        whole = float(prediction.detach().square().sum())
        assert relevance["m"] == pytest.approx(whole, rel=1e-3)
        sums.append(sum(relevance[name] for name in cut) / whole)
    assert sums[0] == pytest.approx(1, abs=2e-3)
    assert abs(sums[1] - 1) > 0.02


def test_rules_change_no_value() -> None:
    program = tiny_program()
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 8)).astype(np.float32)
    networks = [ProbedNetwork(program, program.model, torch.device("cpu"), weights=("in_w",)) for _ in range(2)]
    apply_rules(networks[1].module)
    plain, ruled = (network(x, 500, {})[0].detach().numpy() for network in networks)
    np.testing.assert_allclose(ruled, plain, rtol=1e-5, atol=1e-6)


def test_the_noise_is_relevance_times_the_relative_error(tmp_path_factory: pytest.TempPathFactory) -> None:
    here: Context = context_in(tmp_path_factory.mktemp("relevance"), threads=1)
    profiler = profiler_of(tiny_program(), here)
    units = [unit for unit in profiler.units if unit.weight is not None]
    with profiler.simulator() as simulator:
        scenes = simulator.follow(here, [0, 2], 2, "test")
        profile = lrp_profile(profiler, simulator, scenes)
    relevance = measure_relevance(profiler, units, scenes)
    for unit in units:
        weight = numpy_of(unit.require_weight())
        for bits in (4, 8):
            share = sum_of_squares(profiler.rounded(unit, bits) - weight) / sum_of_squares(weight)
            np.testing.assert_allclose(profile.weights[unit.name][bits], relevance[unit.name] * share, rtol=1e-6)
    last = next(unit for unit in units if name_of(unit.weight) == "out_w")
    whole = sum(float(np.square(scene.output, dtype=np.float64).sum()) for scene in scenes)
    bias = numpy_of(profiler.program.graph.initializers["out_b"])
    assert relevance[last.name].sum() == pytest.approx(whole, rel=1e-3), f"the output, with its bias {bias}"
