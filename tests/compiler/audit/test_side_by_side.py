"""The graph with both forms of every layer: float while the switches are off, quantized where they are on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from mezzotint.compiler.audit.side_by_side import MEASUREMENTS, SideBySide, put_side_by_side
from mezzotint.compiler.core.execute import Executor, feeds
from mezzotint.compiler.core.pipeline import GraphPass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.compiler.graph.nodes import digest
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.session import Denoiser
from tests.helpers.models import THREADS, Compiled
from tests.helpers.tiny import context_in

T = 500


@pytest.fixture
def program(hand: Compiled, tmp_path: Path) -> Program:
    """The float graph as it was before the quantizers of `hand` came in."""
    bundle = hand.bundle
    found = import_onnx(hand.exported, tmp_path, schedule=bundle.schedule, deployment=bundle.deployment)
    for step in RECIPES["w8a8"].passes:
        if isinstance(step, GraphPass):
            found = step.run(found, context_in(tmp_path))
    return found


@pytest.fixture
def x() -> Floats:
    return np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)


def run(found: SideBySide, program: Program, x: Floats, folder: Path, *switched: str) -> dict[str, Floats]:
    taps = [tap for layer in found.layers.values() for tap in layer.taps]
    with Executor(found.model, folder, taps=taps, threads=THREADS, level="basic") as executor:
        given = feeds(executor.inputs, program.signature, x, T)
        return executor.run({**given, **{found.layers[name].switch: np.array(True) for name in switched}})


class TestBothForms:
    def test_off_is_float_and_on_is_the_bundle(
        self, hand: Compiled, program: Program, x: Floats, tmp_path: Path
    ) -> None:
        before = digest(program.model)
        found = put_side_by_side(program, hand.bundle.model_path)
        signature = hand.bundle.signature
        exact = Denoiser(hand.exported, signature, threads=THREADS)(x, T)
        shipped = hand.bundle.denoiser(THREADS)(x, T)
        off, one, both = (
            run(found, program, x, tmp_path, *names)[signature.output] for names in ((), ("second",), found.layers)
        )

        assert digest(program.model) == before
        assert np.abs(off - exact).max() < 1e-5
        assert np.abs(both - shipped).max() < 1e-5
        for other in (exact, shipped):  # so the tolerance tells them apart
            assert np.abs(one - other).max() > 1e-3

    def test_what_is_told_is_what_the_values_say(
        self, hand: Compiled, program: Program, x: Floats, tmp_path: Path
    ) -> None:
        found = put_side_by_side(program, hand.bundle.model_path)
        measured = run(found, program, x, tmp_path)
        group = found.layers["second"]
        values = ["h1.act", "h1.act_dequantized", "h2", "h2_dequantized"]
        model = onnx.load(hand.bundle.model_path)
        kinds = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in values}
        model.graph.output.extend(kinds.values())
        onnx.save(model, tmp_path / "tapped.onnx")
        with Executor(program.model, tmp_path, taps=["h1.act", "h2"], threads=THREADS) as executor:
            exact = executor.call(program.signature, x, T)
        import onnxruntime

        session = onnxruntime.InferenceSession(str(tmp_path / "tapped.onnx"), providers=["CPUExecutionProvider"])
        feed = {"x": x, "t": np.full(2, T, np.int64)}
        _, seen, made = session.run(["y", "h1.act_dequantized", "h2_dequantized"], feed)

        def of(fact: str) -> float:
            return float(measured[group.measurements[fact]])

        assert set(group.measurements) == set(MEASUREMENTS) and all(
            measured[v].size == 1 for v in group.measurements.values()
        )
        assert of("signal") == pytest.approx(np.sum(exact["h2"] ** 2), rel=1e-4)
        assert of("noise") == pytest.approx(np.sum((made - exact["h2"]) ** 2), rel=1e-2)
        assert of("x_signal") == pytest.approx(np.sum(exact["h1.act"] ** 2), rel=1e-4)
        assert of("x_noise") == pytest.approx(np.sum((seen - exact["h1.act"]) ** 2), rel=1e-2)
        assert 0 < of("y_noise") < of("noise")
        assert (of("y_low"), of("y_high")) == pytest.approx((exact["h2"].min(), exact["h2"].max()), rel=1e-4)
        scales = {q.site: q.scale for q in hand.bundle.manifest.quantizers}
        assert of("x_reach") == pytest.approx(255 * scales["h1.act"]) and group.weight == "second.w"
        assert of("y_reach") == pytest.approx(255 * scales["h2"])

    def test_a_layer_that_the_file_does_not_have(self, hand: Compiled, program: Program, tmp_path: Path) -> None:
        model = onnx.load(hand.bundle.model_path)
        next(node for node in model.graph.node if node.name == "second").name = "other"
        onnx.save(model, tmp_path / "renamed.onnx")

        found = put_side_by_side(program, tmp_path / "renamed.onnx")
        assert list(found.layers) == ["third"]
        assert found.unknown == {"second": "the bundle has no node of this name"}
