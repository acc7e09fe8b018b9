"""Tables of scales that pay: what moves and matters keeps its table, on noise that calibration did not see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.bits.simulate import Simulator
from mezzotint.compiler.bits.table_trial import TableLimits, choose_tables
from mezzotint.compiler.bits.units import quantized_model, units_of
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.lowering.lower import lower
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.group_steps import GroupSteps
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.step_scales import StepScales
from tests.helpers.tiny import program_of

LIMITS = TableLimits(0.25, samples=2, judges=2, calls=3, ranked=8)
CALLS = 6

# Three layers read sin(30 sample), whose range is the same at every call. In front of two of them it is multiplied by
# exp(timestep / 300), which is 1 to 16; behind them that is undone. The output hardly notices the second of these.
BODY = """
    number = Cast <to = 1> (timestep) column = Reshape (number, each) late = Mul (column, rate) grown = Exp (late)
    turned = Mul (sample, fast) held = Sin (turned)
    moves = Mul (held, grown) [a] a = Conv <pads = [1, 1, 1, 1]> (moves, a_w) a_back = Div (a, grown)
    steeper = Mul (grown, grown)
    idles = Mul (held, steeper) [c] c = Conv <pads = [1, 1, 1, 1]> (idles, c_w) c_back = Div (c, steeper)
    little = Mul (c_back, faint)
    [b] b = Conv <pads = [1, 1, 1, 1]> (held, b_w)
    sum = Add (a_back, b) epsilon = Add (sum, little)
"""


@pytest.fixture
def planted(context: Context) -> Program:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    planted (float[batch,4,4,4] sample, int64[batch] timestep) => (float[batch,4,4,4] epsilon)
    <int64[4] each = {{-1, 1, 1, 1}}, float rate = {{0.0033333}}, float faint = {{0.0001}}, float fast = {{30.0}},
     float[4,4,3,3] a_w, float[4,4,3,3] b_w, float[4,4,3,3] c_w>
    {{ {BODY} }}""")
    rng = np.random.default_rng(2)
    weights = {name_of(v): v for node in model.graph for v in node.inputs if v is not None and name_of(v)[1:] == "_w"}
    for name, weight in weights.items():
        weight.const_value = ir.tensor(rng.standard_normal((4, 4, 3, 3)).astype(np.float32), name=name)
        model.graph.register_initializer(weight)
    passes = (Normalize(), FreezeTime(), Observe(groups=0), ChooseScales(), GroupSteps())
    return pipeline.run_passes(program_of(model, shape=(4, 4, 4), steps=CALLS), passes, context)


def tabled(program: Program, step: StepScales, context: Context) -> tuple[set[str], str]:
    """Return the values with a table, and the note."""
    after = step.run(program, context)
    assert after.plan is not None
    return {site.value for site, q in after.plan.quantizers.items() if q.table}, after.note


def held_out(**options: Any) -> StepScales:
    own: dict[str, Any] = {"samples": LIMITS.samples, "judges": LIMITS.judges, "calls": LIMITS.calls}
    return replace(StepScales(zero_point="constant", decide="held_out", islands=()), **{**own, **options})


def test_a_range_that_moves_and_matters_keeps_its_table(planted: Program, context: Context) -> None:
    """Expected errors see what moves; only the prediction knows what matters. At -1000 dB all are candidates."""
    moving, _ = tabled(planted, StepScales(zero_point="constant"), context)
    assert moving & {"moves", "idles", "held"} == {"moves", "idles"}
    for gain, count in ((0.2, 2), (-1000.0, 3)):
        kept, note = tabled(planted, held_out(gain=gain), context)
        assert kept == {"moves"}
        assert note.startswith(f"1 of {count} tables pay: on held-out noise epsilon ") and note.endswith("; 6 rows")


def test_no_table_is_kept_that_makes_the_prediction_worse(planted: Program, context: Context) -> None:
    """A table whose rows are those of other calls, as if calibration had seen another network."""
    after = StepScales(zero_point="constant").run(planted, context)
    assert after.plan is not None
    table = after.plan.quantizers[Site("moves")]
    wrong = {Site("moves"): replace(table, scale=table.scale[::-1].copy())}
    choice = choose_tables(planted, context, wrong, (), LIMITS, "test")
    assert choice.tables == {} and choice.judged[1] < choice.judged[0] - 3
    right = choose_tables(planted, context, {Site("moves"): table}, (), LIMITS, "test")
    assert set(right.tables) == {Site("moves")} and right.judged[1] > right.judged[0] + 3


def test_the_loss_decides_how_much_a_table_has_to_bring(planted: Program, context: Context) -> None:
    kept, note = tabled(planted, held_out(loss=100.0), context)
    assert kept == set() and note.startswith("0 of 2 tables pay: ")


def test_tables_that_are_not_ranked_are_judged_together(planted: Program, context: Context) -> None:
    """`idles` moves further, so it is the one that is measured alone: it pays nothing, and both together do."""
    kept, _ = tabled(planted, held_out(ranked=1), context)
    assert kept == {"moves", "idles"}


def test_the_choice_is_that_of_its_noise_and_says_how_far_it_is(planted: Program, context: Context) -> None:
    seen: list[tuple[str, int, int]] = []
    loud = replace(context, progress=lambda stage, done, total: seen.append((stage, done, total)))
    first, again = (tabled(planted, held_out(), c) for c in (loud, context))
    assert first == again
    assert tabled(planted, held_out(), replace(context, seed=5))[1] != first[1]
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["step_scales", *(f"step_scales: {s}" for s in ("float trajectory", "tables", "sets of tables"))]
    for stage in stages:
        done, total = [entry[1:] for entry in seen if entry[0] == stage][-1]
        assert done == total > 0


def test_what_only_islands_read_is_no_candidate(planted: Program, context: Context) -> None:
    kept, note = tabled(planted, held_out(islands=("a",)), context)
    assert kept == set() and note.startswith("0 of 1 tables pay: ")
    assert tabled(planted, held_out(islands=("a", "c")), context) == (set(), "no layer reads a table; 6 rows")


@pytest.mark.parametrize("tables", [True, False])
def test_the_simulation_is_the_graph_that_is_written(planted: Program, context: Context, tables: bool) -> None:
    """Quantizers on inputs only, with the rows of each call; a plan with another scale computes something else."""
    static = planted.require_plan()
    after = StepScales(zero_point="constant", gain=-1000.0).run(planted, context) if tables else planted
    plan = after.require_plan()
    free = list(layers(planted.graph))
    written = InsertQdq(islands=(), lowering="constant").run(replace(after, model=after.model.clone()), context)
    wider = Plan({site: wide(q) for site, q in plan.quantizers.items()}, groups=plan.groups)
    model = quantized_model(planted, units_of(free), static)
    rng = np.random.default_rng(0)
    with (
        Simulator(planted, context, layers=free, plan=static, model=model, inputs_only=True) as simulator,
        Executor(lower(written), context.folder, threads=1) as executor,
    ):
        for call, t in enumerate(planted.deployment.timesteps):
            x = rng.standard_normal((2, 4, 4, 4)).astype(np.float32)
            want = executor.call(planted.signature, x, t)[planted.signature.output]
            got, planted_fault = (simulator.output(x, t, {}, simulator.quantized(p, call)) for p in (plan, wider))
            worst = float(np.abs(want).max())
            assert np.mean(np.abs(got - want) > 1e-4 * worst) < 0.1  # what rounds to the other side
            assert np.mean(np.abs(planted_fault - want) > 1e-4 * worst) > 0.5


def wide(quantizer: Quantizer) -> Quantizer:
    return replace(quantizer, scale=np.asarray(quantizer.scale * 1.01, np.float32))
