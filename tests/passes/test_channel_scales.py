"""channel_scales: ranges for each channel and group that hold what was seen, and only where they pay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.formats import UINT8, Format, scale_for_range
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program, Quantizer, Site
from mezzotint.compiler.core.stats import Stats, Summary
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.passes.channel_scales import ChannelScales
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.passes.recipes.files import make_pass, with_options
from tests.helpers.tiny import context_in, program_of, tiny_program

GROUPS = (0, 0, 1, 2)
CALLS = len(GROUPS)
Extremes = npt.NDArray[np.float32]
ALWAYS = ChannelScales(gain=-1000.0)
HERE = context_in(Path())  # where nothing is written


def graph_of(body: str) -> ir.Model:
    weights = "".join(f", float[4,4,3,3] w{i} = {{{', '.join(['0.1'] * 144)}}}" for i in range(2))
    return infer_shapes(
        ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,8,8] sample, int64[batch] timestep) => (float[batch,4,8,8] epsilon)
    <float[4] sizes = {{1, 1, 1, 1}}{weights}>
    {{ {body} }}""")
    )


PAD = "<pads = [1, 1, 1, 1]>"
CONV = f"[conv] y = Conv {PAD} (sample, w0)"
ALONE = f"{CONV} epsilon = Relu (y)"
UP = """Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">"""


def measured(extremes: Extremes, body: str = ALONE, fmt: Format = UINT8) -> Program:
    """One convolution `conv` with these extremes `[calls, 2, C]` of its output `y`, and a quantizer for the tensor."""
    summaries = {("y", k): Summary() for k in range(CALLS)}
    channels = {("y", k): extremes[k] for k in range(CALLS)}
    program = program_of(graph_of(body), shape=(4, 8, 8), steps=CALLS)
    stats = Stats("d", CALLS, CALLS, summaries, program.deployment.timesteps, channels)
    scale, zero = scale_for_range(extremes[:, 0].min(), extremes[:, 1].max(), fmt)
    plan = Plan({Site("y"): Quantizer(fmt, scale, zero, "choose_scales")}, groups=GROUPS)
    return replace(program, stats=stats, plan=plan, frozen=(0,))


def spread(loudness: tuple[float, ...] = (0.05, 1.0, 4.0, 0.3)) -> Extremes:
    rng = np.random.default_rng(8)
    low, high = -rng.uniform(0.2, 1.0, (CALLS, 4)), rng.uniform(0.2, 1.0, (CALLS, 4))
    return np.asarray(np.stack([low, high], axis=1) * np.array(loudness), np.float32)


def table_of(step: ChannelScales, program: Program) -> Quantizer | None:
    """The table that a convolution got, if it did."""
    plan = step.run(program, HERE).plan
    assert plan is not None
    return plan.quantizers.get(Site("y", "conv"))


def wanted(step: ChannelScales, extremes: Extremes, group: int) -> tuple[Extremes, Extremes]:
    """The ends of the ranges `[C]`, written down once more, channel by channel."""
    calls = [k for k in range(CALLS) if GROUPS[k] == group]
    lows = [max(0.0, *(-float(extremes[k, 0, c]) for k in calls)) for c in range(4)]
    highs = [max(0.0, *(float(extremes[k, 1, c]) for k in calls)) for c in range(4)]

    def widened(ends: list[float]) -> Extremes:
        loudest = max(ends)
        mixed = [step.margin * e**step.trust * loudest ** (1 - step.trust) for e in ends]
        return np.array([max(m, loudest / 32) for m in mixed], np.float32)

    return -widened(lows), widened(highs)


def check_table(step: ChannelScales, extremes: Extremes, q: Quantizer, factor: float = 1.0) -> None:
    """Within half a step at each end, and zero is on the grid."""
    assert q.table and q.axis == 1 and q.by == "channel_scales"
    assert q.scale.shape == q.zero_point.shape == (max(GROUPS) + 1, 4)
    assert q.scale.dtype == np.float32 and q.zero_point.dtype == np.uint8
    for group in range(max(GROUPS) + 1):
        scale, zero = q.scale[group] * np.float32(factor), q.zero_point[group].astype(np.float32)
        low, high = wanted(step, extremes, group)
        assert (np.abs((q.format.qmin - zero) * scale - low) <= 0.51 * scale).all()
        assert (np.abs((q.format.qmax - zero) * scale - high) <= 0.51 * scale).all()
        assert (zero >= q.format.qmin).all() and (zero <= q.format.qmax).all()


@pytest.mark.parametrize(
    "step", [ALWAYS, replace(ALWAYS, margin=1.0, trust=1.0), replace(ALWAYS, margin=2.0, trust=0.0)], ids=str
)
@pytest.mark.parametrize("bits", [8, 6])
def test_ranges_are_those_of_the_formula(step: ChannelScales, bits: int) -> None:
    extremes = spread()
    q = table_of(step, measured(extremes, fmt=Format(bits)))
    assert q is not None and q.format == Format(bits)
    check_table(step, extremes, q)
    with pytest.raises(AssertionError):
        check_table(step, extremes, q, factor=1.01 if bits == 8 else 1.04)  # one step in 63 is more than a per cent


ends = st.floats(-100, 100, width=32, allow_subnormal=False)


@given(
    st.lists(st.tuples(ends, ends), min_size=4 * CALLS, max_size=4 * CALLS),
    st.floats(1, 3),
    st.floats(0, 1),
)
def test_every_range_covers_what_was_seen(pairs: list[tuple[float, float]], margin: float, trust: float) -> None:
    """Up to the half step by which a zero point is rounded, also where a channel is silent or of one sign."""
    extremes = np.sort(np.array(pairs, np.float32).reshape(CALLS, 4, 2), axis=2).transpose(0, 2, 1)
    q = table_of(ChannelScales(margin=margin, trust=trust, gain=-1e6), measured(extremes))
    assert q is not None
    for call, group in enumerate(GROUPS):
        scale, zero = q.scale[group], q.zero_point[group].astype(np.float32)
        assert (-zero * scale <= np.minimum(extremes[call, 0], 0) + 0.51 * scale).all()
        assert ((255 - zero) * scale >= np.maximum(extremes[call, 1], 0) - 0.51 * scale).all()


def test_gain_decides() -> None:
    """Equal channels gain nothing, and lose by the margin; what the quantizer of the tensor gives is never worse."""
    equal = np.tile(np.array([[-1.0], [1.0]], np.float32), (CALLS, 1, 4))
    assert table_of(ChannelScales(), measured(equal)) is None
    program = measured(spread())
    assert table_of(ChannelScales(), program) is not None
    q = table_of(ALWAYS, program)
    assert q is not None and program.plan is not None
    step = float(program.plan.quantizers[Site("y")].scale)
    gain = float(np.mean([10 * np.log10(step**2 / np.mean(row.astype(np.float64) ** 2)) for row in q.scale]))
    assert table_of(ChannelScales(gain=gain - 0.01), program) is not None
    assert table_of(ChannelScales(gain=gain + 0.01), program) is None


READERS = {
    "a conv": (f"{CONV} epsilon = Conv {PAD} (y, w1)", False),
    "a conv behind a mover": (f"{CONV} t = Transpose <perm = [0, 1, 3, 2]> (y) epsilon = Conv {PAD} (t, w1)", False),
    "an addition and a conv": (f"{CONV} s = Add (y, sample) epsilon = Conv {PAD} (s, w1)", False),
    "an addition, a resize and a conv": (
        f"{CONV} s = Add (y, sample) u = {UP} (s, , sizes) epsilon = Conv {PAD} (u, w1)",
        False,
    ),
    "an addition and an activation": (f"{CONV} s = Add (y, sample) r = Relu (s) epsilon = Sigmoid (r)", True),
    "a conv and an activation": (f"{CONV} r = Relu (y) z = Conv {PAD} (y, w1) epsilon = Add (r, z)", False),
    "an addition that two read": (f"{CONV} s = Add (y, sample) z = Conv {PAD} (s, w1) epsilon = Add (s, z)", True),
    "an activation and its size": (f"{CONV} k = Shape (y) r = Relu (y) epsilon = Reshape (r, k)", True),
    "an activation": (ALONE, True),
    "no reader": (f"[conv] epsilon = Conv {PAD} (sample, w0)", True),
}


@pytest.mark.parametrize("case", READERS)
def test_who_reads_it_decides(case: str) -> None:
    """A layer needs one scale; what is only joined and quantized again is joined on integers."""
    body, expected = READERS[case]
    name = "epsilon" if case == "no reader" else "y"
    program = measured(spread(), body)
    assert program.stats is not None and program.plan is not None
    stats = replace(
        program.stats,
        channels={(value, k): e for (_, k), e in program.stats.channels.items() for value in ("y", "z", "epsilon")},
    )
    plan = replace(program.plan, quantizers={Site(name): program.plan.quantizers[Site("y")]})
    after = ALWAYS.run(replace(program, stats=stats, plan=plan), HERE).plan
    assert after is not None
    assert (Site(name, "conv") in after.quantizers) == expected
    assert after.quantizers[Site(name)] is plan.quantizers[Site(name)], "other readers keep theirs"


@pytest.mark.parametrize(
    "options", [{"margin": 0.99}, {"margin": float("inf")}, {"margin": float("nan")}, {"trust": -0.1}, {"trust": 1.01}]
)
def test_options_that_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"channel_scales.{next(iter(options))}") as caught:
        make_pass("channel_scales", dict(options))
    assert "choose" in str(caught.value.hint)


def test_without_extremes_of_channels_it_says_how_to_get_them(context: Context) -> None:
    program = measured(spread())
    assert program.stats is not None
    with pytest.raises(StatsError, match="no channel was measured") as caught:
        ChannelScales().run(replace(program, stats=replace(program.stats, channels={})), context)
    assert "observe.channels=outputs" in str(caught.value.hint)
    unmeasured = with_options(RECIPES["w8a8-steps"], {"observe.channels": "inputs"}).passes
    with pytest.raises(StatsError, match="no channel was measured"):
        pipeline.run_passes(tiny_program(), unmeasured, context)


def test_a_graph_without_convolutions_needs_none(context: Context) -> None:
    program = measured(spread(), "epsilon = Relu (sample)")
    assert program.stats is not None
    after = ChannelScales().run(replace(program, stats=replace(program.stats, channels={})), context)
    assert after.note == "0 of 0 convolutions have a scale for each channel; 3 rows"


def test_statistics_that_lack_a_call_are_refused(context: Context) -> None:
    program = measured(spread())
    assert program.stats is not None
    with pytest.raises(StatsError):
        ChannelScales().run(replace(program, stats=replace(program.stats, groups=1)), context)


def test_the_whole_recipe(context: Context) -> None:
    recipe = with_options(RECIPES["w8a8-steps"], {"channel_scales.gain": -1000.0})
    program = pipeline.run_passes(tiny_program(), recipe.passes, context)
    assert program.plan is not None
    made = {site: q for site, q in program.plan.quantizers.items() if q.by == "channel_scales"}
    assert {site.consumer for site in made} >= {"b1_conv1", "b1_conv2", "b2_conv1", "b2_conv2", "conv_in"}
    assert "down" not in {site.consumer for site in made}  # a Resize turns its integers into the next layer's input
    site, quantizer = next(iter(made.items()))
    row = quantizer.entry(site)
    assert (row.channels, row.rows, row.axis) == (16, 3, 1)


def test_a_silent_channel_is_not_cut_to_nothing() -> None:
    extremes = spread((0.0, 1.0, 4.0, 0.3))
    q = table_of(ALWAYS, measured(extremes))
    assert q is not None
    loudest = np.array([wanted(ALWAYS, extremes, g)[1].max() for g in range(max(GROUPS) + 1)])
    reach = (q.format.qmax - q.zero_point[:, 0].astype(np.float32)) * q.scale[:, 0]
    assert (reach > loudest / 50).all()
