"""normalize_tokens: the network stays what it is, and each token gets the whole grid of its layer's quantizer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, numpy_of
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.clean_qdq import CleanQdq
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize_tokens import NormalizeTokens
from mezzotint.passes.observe import Observe
from tests.conftest import Check
from tests.helpers.tiny import program_of, tiny_program


def test_layers_of_one_value_share_its_scales(check_golden: Check) -> None:
    """The pipeline compares both graphs in numbers; the layers keep their names and biases."""
    after = check_golden(NormalizeTokens(islands=()), "shared")
    assert after.history[-1].note == "3 layers read tokens that are normalized at run time (2 values)"


def network() -> Program:
    """A layer over the 16 tokens of an image; those of its lower rows are 10, 100 and 1000 times as loud."""
    rng = np.random.default_rng(0)
    weight = ", ".join(f"{v:.3f}" for v in rng.standard_normal(64))
    loud = ", ".join(str(10.0 ** (i // 4)) for i in range(16))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,8,4,4] sample, int64[batch] timestep) => (float[batch,8,4,4] epsilon)
    <int64[3] flat = {{0, 8, 16}}, int64[4] image = {{0, 8, 4, 4}}, float[8,8] w = {{{weight}}},
     float[16,1] loud = {{{loud}}}>
    {{ columns = Reshape (sample, flat) tokens = Transpose <perm = [0, 2, 1]> (columns) x = Mul (tokens, loud)
       y = MatMul (x, w) back = Transpose <perm = [0, 2, 1]> (y) epsilon = Reshape (back, image) }}"""
    return program_of(infer_shapes(ir.from_onnx_text(text)), shape=(8, 4, 4))


def worst_token(context: Context, *rewrites: Pass) -> float:
    """The SQNR of the token that is worst, in dB, with 8-bit weights and activations."""
    program = network()
    after = pipeline.run_passes(
        program, [*rewrites, Observe(), ChooseScales(), InsertQdq(islands=()), CleanQdq()], context
    )
    x = np.random.default_rng(1).standard_normal((2, 8, 4, 4)).astype(np.float32)
    outs = [Executor(p.model, context.folder).call(p.signature, x, 0)["epsilon"] for p in (program, after)]
    exact, made = (out.astype(np.float64) for out in outs)
    power, error = (np.square(values).mean(axis=(0, 1)) for values in (exact, made - exact))
    return float(10 * np.log10(power / error).min())


def test_quiet_tokens_are_as_exact_as_loud_ones(context: Context) -> None:
    """With one scale for all tokens, nearly nothing is left of those that are a thousandth of the loudest."""
    assert worst_token(context) < 10
    assert worst_token(context, NormalizeTokens(islands=())) > 35


def test_channels_are_divided_by_what_the_calibration_measured(context: Context) -> None:
    """t^rows c^columns: the weights take c^columns, and the pipeline checks that the function stays."""
    observed = (Observe(channels="inputs"),)
    after = pipeline.run_passes(network(), [*observed, NormalizeTokens(0.15, 0.85, islands=())], context)
    product = next(node for node in after.graph if node.op_type == "MatMul")
    weight, before = numpy_of(product.inputs[1]), numpy_of(network().graph.initializers["w"])  # type: ignore[arg-type]
    shares = numpy_of(next(v for name, v in after.graph.initializers.items() if name.endswith("channel_shares")))
    np.testing.assert_allclose(weight * shares[:, None], before, rtol=1e-5)
    with pytest.raises(StatsError, match="were not measured"):
        pipeline.run_passes(network(), [NormalizeTokens(columns=0.5, islands=())], context)
    unmeasured: list[Pass] = [Observe(), NormalizeTokens(columns=0.5)]
    with pytest.raises(RecipeError, match="which no earlier pass measures"):
        unmeasured[1].check(unmeasured, network().deployment)


def test_convolutions_single_rows_and_islands_stay(context: Context) -> None:
    after = pipeline.run_passes(network(), [NormalizeTokens(islands=("last",))], context)
    assert "0 layers" in after.history[-1].note and "1 islands" in after.history[-1].note
    assert counts(after.graph) == counts(network().graph)
    conv = pipeline.run_passes(tiny_program(), [NormalizeTokens()], context)
    assert "not over tokens" in conv.history[-1].note and "Div" not in counts(conv.graph)


def test_powers_outside_0_to_1_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"normalize_tokens\.rows is 1\.5"):
        NormalizeTokens(rows=1.5)
    with pytest.raises(RecipeError, match=r"normalize_tokens\.columns is -1"):
        NormalizeTokens(columns=-1)
