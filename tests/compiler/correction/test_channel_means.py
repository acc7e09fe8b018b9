"""channel_means: the graph's means are those of numpy, and uncertain rows are shrunk to the common mean."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.correction.channel_means import ChannelMeans, with_means
from mezzotint.compiler.graph.nodes import model_text
from mezzotint.passes.normalize import Normalize
from tests.helpers.tiny import SIGNATURE

VALUES = (("b1_c1", 1), ("q", 2), ("gate_raw", 1), ("epsilon", 1))  # a feature map, tokens, vectors, an output


def check_means(program: Program, context: Context, factor: float = 1.0) -> None:
    """Every mean of the graph equals that of the whole value."""
    x = np.random.default_rng(1).standard_normal((3, 1, 8, 8)).astype(np.float32)
    before = model_text(program.model)
    model, names = with_means(program.model, VALUES)
    assert model_text(program.model) == before
    with Executor(program.model, context.folder, taps=[n for n, _ in VALUES], threads=1, level="none") as whole:
        want = whole.call(SIGNATURE, x, 7)
    with Executor(model, context.folder, threads=1, level="none") as executor:
        got = executor.call(SIGNATURE, x, 7)
    for (name, axis), mean in zip(VALUES, names, strict=True):
        rows = np.moveaxis(want[name].astype(np.float64), axis, -1)
        rows = rows.reshape(len(rows), -1, rows.shape[-1]).mean(axis=1)
        np.testing.assert_allclose(got[mean] * factor, rows, rtol=1e-5, atol=1e-6, err_msg=name)


def test_the_graph_averages_all_axes_but_the_batch_and_the_channels(tiny: Program, context: Context) -> None:
    program = pipeline.run_passes(tiny, [Normalize()], context)
    check_means(program, context)
    with pytest.raises(AssertionError):
        check_means(program, context, factor=1.01)


def test_before_opset_18_the_axes_are_an_attribute(tiny: Program, context: Context) -> None:
    model = pipeline.run_passes(tiny, [Normalize()], context).model.clone()
    model.graph.opset_imports[""] = 13
    made, names = with_means(model, VALUES)
    node = next(n for n in made.graph if n.outputs[0].name == names[0])
    assert list(node.attributes["axes"].as_ints()) == [2, 3]
    assert len(node.inputs) == 1


def folded(data: npt.NDArray[np.float64]) -> ChannelMeans:
    """Of data `[rows, samples, tokens, C]`, one call for each row."""
    means = ChannelMeans(len(data), data.shape[-1])
    for row, call in enumerate(data):
        zeros = np.zeros((call.shape[0] * call.shape[1], call.shape[2]))
        means.add(row, zeros, zeros + call.reshape(zeros.shape), len(call))
    return means


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_the_overall_mean_is_that_of_all_samples(seed: int, rows: int, samples: int, tokens: int) -> None:
    data = np.random.default_rng(seed).standard_normal((rows, samples, tokens, 2))
    np.testing.assert_allclose(folded(data).overall()[0], data.mean(axis=(0, 1, 2)), atol=1e-12)


def test_certain_rows_stay_apart() -> None:
    data = np.broadcast_to(np.array([1.0, 2.0, 6.0])[:, None, None, None], (3, 4, 1, 2))
    np.testing.assert_allclose(folded(data).by_row()[:, 0], [1, 2, 6], atol=1e-12)


def test_uncertain_rows_get_nearer_to_the_truth() -> None:
    """Rows that differ by a tenth of what one sample varies: their own means are worse than the shrunk ones."""
    rng = np.random.default_rng(5)
    truth = 0.1 * rng.standard_normal((20, 1, 1, 64))
    data = truth + rng.standard_normal((20, 4, 1, 64))
    means = folded(data)
    errors = [float(((rows - truth[:, 0, 0]) ** 2).mean()) for rows in (means.by_row(), data.mean(axis=(1, 2)))]
    assert errors[0] < 0.3 * errors[1]


def test_one_sample_says_nothing_of_its_error() -> None:
    data = np.arange(6.0).reshape(3, 1, 1, 2)
    np.testing.assert_allclose(folded(data).by_row(), np.tile([[2.0, 3.0]], (3, 1)))


def test_a_row_that_no_call_fell_into_gets_the_common_mean() -> None:
    means = ChannelMeans(2, 1)
    means.add(0, np.zeros((2, 1)), np.full((2, 1), 3.0), 2)
    np.testing.assert_allclose(means.by_row(), [[3.0], [3.0]])
