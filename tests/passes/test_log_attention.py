"""log_attention: weights are powers of the base on the uint8 grid, and the product with the values stays integer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mezzotint.compiler.audit.fusion import audit_fusion
from mezzotint.compiler.bundle.writer import save_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.formats import Format
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import counts
from mezzotint.compiler.lowering.lower import lower
from mezzotint.compiler.torch_graph.convert import to_torch
from mezzotint.passes.delay_softmax import DelaySoftmax
from mezzotint.passes.log_attention import LogAttention
from tests.conftest import Check
from tests.helpers.attention import attention_program, fidelity, quantized_attention, values_of

POWERS_OF_ROOT = [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 255]


def planned(program: Program, *, table: bool = False) -> Program:
    quantizer = Quantizer(Format(4), np.array(1 / 15, np.float32), np.array(0, np.uint8), "test", table=table)
    return replace(program, plan=Plan({Site(name): quantizer for name in ("weights", "powers")}))


def test_both_forms_of_a_softmax(check_golden: Check) -> None:
    after = check_golden(LogAttention(), "both", prepare=planned)
    assert after.history[-1].note == "the weights of 2 attentions on 16 powers of sqrt2 and 0, as integers"
    assert after.plan is not None and {q.by for q in after.plan.quantizers.values()} == {"log_attention"}


@pytest.mark.parametrize(("base", "rate", "count"), [("2", 1, 9), ("sqrt2", 2, 16)])
@pytest.mark.parametrize("rewrites", [(), (DelaySoftmax(),)])
def test_the_formula(context: Context, base: str, rate: int, count: int, rewrites: tuple[Pass, ...]) -> None:
    """round(-log_base p) for 16 powers below the end of the range, 0 for smaller weights, as integers of uint8."""
    step = LogAttention(base=base)  # type: ignore[arg-type]
    before = quantized_attention(attention_program(), context, *rewrites, bits=4, islands=("scores",))
    after = pipeline.run_passes(before, [step], context)
    mix = next(node for node in after.graph if node.name == "mix")
    name = "weights_powers" if rewrites else "weights"
    exact, _ = values_of(before, context, name)
    made, _ = values_of(after, context, str(mix.inputs[0].name))  # type: ignore[union-attr]
    assert after.plan is not None
    quantizer = next(q for q in after.plan.quantizers.values() if q.by == "log_attention")
    end = float(quantizer.scale) * 256
    first = -rate * np.log2(end)
    assert first == pytest.approx(round(first), abs=1e-4)
    power = np.maximum(np.rint(-rate * np.log2(exact.astype(np.float64))) - round(first), 0)
    integers = np.where(power < 16, np.minimum(np.rint(256 * 2.0 ** -(power / rate)), 255), 0)
    # Where a weight lies between two powers, float32 may choose either.
    assert np.mean(np.rint(made / quantizer.scale) != integers) < 1e-3
    assert len(step.integers(4, Format(8))) == count
    assert len(np.unique(made)) <= count + 1 and len(np.unique(made)) > 5
    assert list(LogAttention().integers(4, Format(8))) == POWERS_OF_ROOT
    signed = Format(8, signed=True, symmetric=True)
    assert list(LogAttention("2").integers(4, signed)) == [1, 2, 4, 8, 16, 32, 64, 127]


def test_rows_are_divided_by_the_sum_of_rounded_weights(context: Context) -> None:
    before = quantized_attention(attention_program(), context, DelaySoftmax(), bits=4, islands=("scores",))
    after = pipeline.run_passes(before, [LogAttention()], context)
    total = next(node for node in after.graph if node.op_type == "ReduceSum")
    assert total.inputs[0] is not None and total.inputs[0].name == "weights_powers_kept"


def test_widths_above_4_bits_leave_small_powers_to_the_grid(context: Context) -> None:
    before = quantized_attention(attention_program(), context, DelaySoftmax(), islands=("scores",))
    after = pipeline.run_passes(before, [LogAttention()], context)
    found = counts(after.graph)
    assert found["Round"] == 1 and "ThresholdedRelu" not in found


def test_powers_are_better_than_equal_steps_at_4_bits(context: Context) -> None:
    plain, powers = (
        fidelity(attention_program(), context, bits=4, islands=("scores",), behind=behind)
        for behind in ((), (LogAttention(),))
    )
    assert powers > plain + 8


def test_the_product_stays_an_integer_kernel(context: Context, tmp_path: Path) -> None:
    after = quantized_attention(attention_program(), context, DelaySoftmax(), bits=4, behind=[LogAttention()])
    save_model(lower(after), tmp_path / "model.onnx")
    assert audit_fusion(tmp_path / "model.onnx", tmp_path, threads=1).layers.integer == 2


def test_scales_that_depend_on_the_timestep_are_refused(context: Context) -> None:
    before = quantized_attention(attention_program(), context, bits=4)
    assert before.plan is not None
    tables = {site: replace(q, table=True) for site, q in before.plan.quantizers.items()}
    with pytest.raises(PassError, match="depends on the timestep"):
        pipeline.run_passes(replace(before, plan=replace(before.plan, quantizers=tables)), [LogAttention()], context)


def test_float_attention_stays(context: Context) -> None:
    before = quantized_attention(attention_program(), context, islands=("mix",))
    after = pipeline.run_passes(before, [LogAttention()], context)
    assert after.history[-1].note == "no weights of an attention are quantized"


def test_gradients_reach_the_queries_through_the_powers(context: Context) -> None:
    """Training behind this pass moves the layers in front of the softmax, too (repquant)."""
    after = quantized_attention(attention_program(), context, bits=4, behind=(LogAttention(),))
    graph = to_torch(after.model, signature=after.signature)
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((2, *after.shape)).astype(np.float32))
    (epsilon,) = graph.module(x, torch.zeros(2, dtype=torch.int64))
    epsilon.square().sum().backward()
    sizes = [graph.weights[name].grad for name in ("q_w", "k_w", "v_w")]
    assert all(grad is not None and float(grad.abs().max()) > 1e-3 for grad in sizes)
