"""observe: what enters the statistics, with and without an allocation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.calibration.calibrate import follow_trajectories
from mezzotint.compiler.calibration.collect import Collector
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats, Summary
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from mezzotint.passes.recipes.files import make_pass
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images
from tests.helpers.spreads import Backwards
from tests.helpers.tiny import context_in, program_of, tiny_program

Channels = Literal["none", "outputs", "inputs", "all"]
ALLOCATION = (4, 3, 0)


@pytest.fixture
def program(context: Context) -> Program:
    return pipeline.run_passes(tiny_program(), [Normalize()], context)


def observed(program: Program, folder: Path, samples: int = 4, groups: int = 0) -> Stats:
    context = context_in(folder, samples=samples, threads=1)
    stats = Observe(groups=groups).run(program, context).stats
    assert stats is not None
    return stats


def check_call(got: Stats, want: Stats, call: int, factor: float = 1.0) -> None:
    """The same summaries of every value at a call, to the last bit."""
    for name in want.values():
        a, b = got.summaries[name, call], want.summaries[name, call]
        assert (a.count, a.low, a.high) == (b.count, b.low * factor, b.high * factor)
        assert (a.total, a.square) == (b.total, b.square)
        np.testing.assert_array_equal(a.histogram, b.histogram)


@pytest.mark.parametrize("allocation", [(), (5, 3, 0)])
def test_pieces_give_the_bits_of_one_process(
    program: Program, context: Context, monkeypatch: pytest.MonkeyPatch, allocation: tuple[int, ...]
) -> None:
    program = replace(program, allocation=allocation)
    here = replace(context_in(context.folder, samples=7, threads=1), batch=2)
    step = Observe(groups=2, channels="all")
    want, got = (step.run(program, used).stats for used in (here, replace(here, spread=Backwards())))

    assert want is not None and got is not None
    assert list(got.summaries) == list(want.summaries) and got.calls == want.calls
    for key, summary in want.summaries.items():
        found = got.summaries[key]
        assert (found.count, found.low, found.high) == (summary.count, summary.low, summary.high)
        assert (found.total, found.square) == (summary.total, summary.square)
        np.testing.assert_array_equal(found.histogram, summary.histogram)
    for name in ("channels", "squares"):
        found_arrays, wanted = getattr(got, name), getattr(want, name)
        assert list(found_arrays) == list(wanted) and wanted
        for key, array in wanted.items():
            np.testing.assert_array_equal(found_arrays[key], array)

    monkeypatch.setattr(Collector, "replay", replay_sums)
    other = step.run(program, replace(here, spread=Backwards())).stats
    assert other is not None
    sums = {key: (summary.total, summary.square) for key, summary in want.summaries.items()}
    assert any((other.summaries[key].total, other.summaries[key].square) != pair for key, pair in sums.items())


def replay_sums(collector: Collector, part: Any) -> None:
    """Add the sums of each part, and not its addends: the last bits differ."""
    for key, summary in part.summaries.items():
        known = collector.summaries.get(key, Summary())
        collector.summaries[key] = known + summary


def test_the_first_samples_count_as_many_as_are_allotted(program: Program, context: Context) -> None:
    got = observed(replace(program, allocation=ALLOCATION), context.folder)
    for call in (0, 1):
        want = observed(program, context.folder, samples=ALLOCATION[call])
        check_call(got, want, call)
        with pytest.raises(AssertionError):
            check_call(got, want, call, factor=1.01)
        with pytest.raises(AssertionError):
            check_call(got, observed(program, context.folder, samples=2), call)
    assert not [key for key in got.summaries if key[1] == 2]


def test_all_samples_go_to_the_end(program: Program, context: Context) -> None:
    """The last call's statistics do not depend on how many samples count at the calls before it."""
    got = observed(replace(program, allocation=(0, 1, 4)), context.folder)
    want = observed(program, context.folder)
    for name in want.values():
        a, b = got.summaries[name, 2], want.summaries[name, 2]
        assert a.count == b.count
        np.testing.assert_allclose([a.low, a.high, a.square], [b.low, b.high, b.square], rtol=1e-5)
    assert got.calls >= want.calls


def test_a_full_allocation_changes_nothing(program: Program, context: Context) -> None:
    got, want = observed(replace(program, allocation=(4, 4, 4)), context.folder), observed(program, context.folder)
    assert got.summaries.keys() == want.summaries.keys()
    for call in range(3):
        check_call(got, want, call)


def test_a_batch_that_is_written_in_repeats_the_samples_that_count(program: Program, context: Context) -> None:
    fixed = replace(program, model=program.model.clone())
    for value in fixed.graph.inputs:
        value.shape = ir.Shape([2, *list(value.shape or ())[1:]])
    got = observed(replace(fixed, allocation=ALLOCATION), context.folder)
    want = observed(program, context.folder, samples=3)
    for name in want.values():
        a, b = got.summaries[name, 1], want.summaries[name, 1]
        np.testing.assert_allclose([a.low, a.high], [b.low, b.high], rtol=1e-5)
    assert got.summaries["start", 1].count == observed(program, context.folder).summaries["start", 1].count


def test_groups_of_calls_share_a_summary(program: Program, context: Context) -> None:
    each, whole = observed(program, context.folder), observed(program, context.folder, groups=1)
    assert (each.groups, whole.groups) == (3, 1)
    assert each.timesteps == whole.timesteps == program.deployment.timesteps
    for name in whole.values():
        merged = each.summary(name)
        assert merged is not None
        got = whole.summaries[name, 0]
        assert (got.count, got.low, got.high) == (merged.count, merged.low, merged.high)
        np.testing.assert_array_equal(got.histogram, merged.histogram)


def wanted(program: Program, channels: Channels) -> dict[str, int]:
    """The axis of each value that is measured by channel."""
    found = list(layers(program.graph))
    outputs = {name_of(layer.output): 1 for layer in found if layer.kind == "conv"}
    read = {name_of(r.activations[0]): 1 if r.kind == "conv" else -1 for r in found if r.weight is not None}
    return {**(read if channels in ("inputs", "all") else {}), **(outputs if channels != "inputs" else {})}


def check_channels(program: Program, stats: Stats, context: Context, channels: Channels, factor: float = 1.0) -> None:
    """Against a trajectory of our own, each call tapped; batches are cut as observe cuts them, hence equal bits."""
    axes = wanted(program, channels)
    inputs = {name_of(v) for v in program.graph.inputs}
    taps = [name for name in axes if name not in inputs]
    seen: dict[tuple[str, int], list[np.ndarray[Any, np.dtype[np.float32]]]] = {}
    with Executor(program.model, context.folder, taps=taps, threads=1) as executor:

        def denoiser(x: Images, t: float, conditions: Conditions) -> Images:
            found = {"sample": x, **executor.call(program.signature, x, t, conditions)}
            for name in axes:
                seen.setdefault((name, program.deployment.timesteps.index(t)), []).append(found[name])
            return np.asarray(found["epsilon"], np.float32)

        follow_trajectories(program, context, denoiser, "test")
    assert set(seen) == set(stats.channels) and stats.axes == axes
    read = wanted(program, "inputs") if channels in ("inputs", "all") else {}
    assert {name for name, _ in stats.squares} == set(read)
    for (name, call), parts in seen.items():
        rows = np.moveaxis(np.concatenate(parts), axes[name], 0)
        rows = rows.reshape(len(rows), -1)
        want = np.stack([rows.min(axis=1), rows.max(axis=1)])
        np.testing.assert_allclose(stats.channels[name, call] * np.float32(factor), want, rtol=1e-5, atol=1e-6)
        if name in read:
            squares = np.square(rows, dtype=np.float64).sum(axis=1)
            np.testing.assert_allclose(stats.squares[name, call] * factor, squares, rtol=1e-5)


@pytest.mark.parametrize("channels", ["outputs", "inputs", "all"])
def test_statistics_of_channels(program: Program, context: Context, channels: Channels) -> None:
    few = context_in(context.folder, samples=4, threads=1)
    stats = Observe(groups=0, channels=channels).run(program, few).stats
    assert stats is not None
    check_channels(program, stats, few, channels)
    with pytest.raises(AssertionError):
        check_channels(program, stats, few, channels, factor=1.01)
    for (name, call), extremes in stats.channels.items():
        summary = stats.summaries[name, call]
        assert (extremes[0].min(), extremes[1].max()) == (summary.low, summary.high)
        if (name, call) in stats.squares:
            np.testing.assert_allclose(stats.squares[name, call].sum(), summary.square, rtol=1e-9)


@pytest.mark.parametrize(("old", "new"), [(True, "outputs"), (False, "none")])
def test_the_switch_of_older_recipes(program: Program, context: Context, old: bool, new: Channels) -> None:
    made = make_pass("observe", {"channels": old})
    assert isinstance(made, Observe)
    assert made.axes(program) == Observe(channels=new).axes(program)


def test_channels_are_measured_only_where_asked(program: Program, context: Context) -> None:
    assert observed(program, context.folder).channels == {}


def test_notes(program: Program, context: Context) -> None:
    assert Observe().run(program, context).note.endswith("over 6 calls, 4 samples at each step")
    note = Observe().run(replace(program, allocation=ALLOCATION), context).note
    assert note.endswith("0 to 4 samples at each step")


def test_a_second_run_gives_the_same_bits(program: Program, context: Context) -> None:
    first, again = observed(program, context.folder), observed(program, context.folder)
    for call in range(3):
        check_call(first, again, call)


def test_a_value_with_two_channel_axes_is_measured_along_that_of_its_first_reader() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,4,2] sample, int64[batch] timestep) => (float[batch,2,4,2] epsilon)
    <float[2,2,1,1] conv_w = {1, 0, 0, 1}, float[2,2] w = {1, 0, 0, 1}>
    { a = Conv (sample, conv_w) b = MatMul (sample, w) epsilon = Add (a, b) }""")
    program = program_of(infer_shapes(model), shape=(2, 4, 2))
    assert Observe(channels="inputs").axes(program) == ({"sample": 1}, ["sample"])
    assert Observe(channels="all").axes(program) == ({"sample": 1, "a": 1}, ["sample"])
