"""Rounding against a Kronecker product: the definition by sums, the two cases that are GPTQ, and what it gains."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.compiler.core.formats import Format, RowFormats, of_rows, round_on
from mezzotint.compiler.errors import PassError, RecipeError
from mezzotint.compiler.rounding import two_sided as sides
from mezzotint.compiler.rounding.matrix import gptq, input_order, inverse_root, nearest
from mezzotint.compiler.rounding.two_sided import RowFeedback, check_weighting, errors_of_rows, two_sided

FOUR = Format(4, signed=True, symmetric=True)
Array = npt.NDArray[np.float64]


def correlated(rng: np.random.Generator, size: int) -> Array:
    columns = rng.standard_normal((size, size)) @ rng.standard_normal((size, 2 * size))
    return np.asarray(columns @ columns.T / size)


def layer(seed: int, rows: int = 7, inputs: int = 11) -> tuple[Array, Array, Array, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, inputs))
    scale = (np.abs(weight).max(axis=1) / 7).astype(np.float32)
    return weight, correlated(rng, inputs), correlated(rng, rows), scale


def rounded(weight: Array, gram: Array, side: Array, scale: npt.NDArray[np.float32], grid: object = FOUR) -> Array:
    root = inverse_root(gram, input_order(gram, True), 0.01, "test")
    feedback = RowFeedback.of(side, True, 0.01, "test")
    return np.asarray(two_sided(weight, root, feedback, scale, grid), np.float64)  # type: ignore[arg-type]


def by_definition(weight: Array, gram: Array, side: Array, scale: npt.NDArray[np.float32]) -> Array:
    """w' = nearest(W + E (M_I - 1) + (M_O - 1)^T E M_I), element by element, each sum over what is rounded already."""

    def factor(matrix: Array, order: npt.NDArray[np.int64]) -> Array:
        damped = matrix + 0.01 * np.diagonal(matrix).mean() * np.eye(len(matrix))
        upper = np.linalg.cholesky(damped[np.ix_(order, order)][::-1, ::-1])[::-1, ::-1]
        return np.asarray(upper / np.diagonal(upper))

    columns, rows = input_order(gram, True), input_order(side, True)
    along, down = factor(gram, columns), factor(side, rows)
    w, s = weight[np.ix_(rows, columns)], scale[rows].astype(np.float64)
    q, error = np.zeros_like(w), np.zeros_like(w)
    for i in range(len(w)):
        for j in range(w.shape[1]):
            before = error[: i + 1] @ along[:, j]  # f of the rows so far; that of this one without its own error
            wanted = w[i, j] + before[i] + down[:i, i] @ before[:i]
            q[i, j] = round_on(np.array([wanted / s[i]]), FOUR, 0)[0]
            error[i, j] = w[i, j] - s[i] * q[i, j]
    placed = np.empty_like(q)
    placed[np.ix_(rows, columns)] = q
    return placed


@pytest.mark.parametrize("tile", [3, 64])
def test_it_is_the_sum_of_its_definition(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(sides, "TILE", tile)
    for seed in range(5):
        weight, gram, side, scale = layer(seed)
        found, wanted = rounded(weight, gram, side, scale), by_definition(weight, gram, side, scale)
        np.testing.assert_array_equal(found, wanted)
        assert not np.array_equal(found, by_definition(weight, gram, np.eye(len(side)), scale))


def test_without_correlations_of_rows_it_is_gptq_and_without_those_of_inputs_gptq_of_the_columns() -> None:
    weight, gram, side, scale = layer(0)
    root = inverse_root(gram, input_order(gram, True), 0.01, "test")
    np.testing.assert_array_equal(
        rounded(weight, gram, np.eye(len(side)), scale), gptq(weight, root, scale, FOUR, block=4)
    )
    even = np.full(len(weight), scale.max(), np.float32)
    turned = inverse_root(side, input_order(side, True), 0.01, "test")
    columns = gptq(weight.T, turned, np.full(weight.shape[1], scale.max(), np.float32), FOUR, block=4)
    np.testing.assert_array_equal(rounded(weight, np.eye(weight.shape[1]), side, even), columns.T)


def test_the_error_of_the_product_falls_far_below_that_of_gptq() -> None:
    shares = []
    for seed in range(20):
        weight, gram, side, scale = layer(seed, 24, 40)
        root = inverse_root(gram, input_order(gram, True), 0.01, "test")
        errors = [
            errors_of_rows(weight - scale[:, None] * q, gram, side).sum()
            for q in (gptq(weight, root, scale, FOUR, block=16), rounded(weight, gram, side, scale))
        ]
        shares.append(errors[1] / errors[0])
    assert np.mean(shares) < 0.45


def test_the_error_is_the_trace() -> None:
    weight, gram, side, _ = layer(1)
    found = errors_of_rows(weight, gram, side)
    np.testing.assert_allclose(found.sum(), np.trace(side @ weight @ gram @ weight.T))
    assert np.ptp(found) == 0
    assert np.ptp(errors_of_rows(weight, gram, None)) > 0


def test_rows_with_widths_of_their_own_and_weights_that_were_pruned() -> None:
    weight, gram, side, scale = layer(2)
    widths = RowFormats(np.array([2, 3, 4, 5, 6, 7, 8], np.int8))
    q = rounded(weight, gram, side, scale, widths)
    assert (np.abs(q) <= widths.qmax[:, None]).all() and np.abs(q[-1]).max() > 7 >= np.abs(q[2]).max()
    assert isinstance(picked := of_rows(widths, np.array([6, 0])), RowFormats) and picked.bits.tolist() == [8, 2]
    kept = np.random.default_rng(0).random(weight.shape) < 0.7
    root, feedback = inverse_root(gram, input_order(gram, True), 0.01, ""), RowFeedback.of(side, True, 0.01, "")
    held = two_sided(weight * kept, root, feedback, scale, FOUR, kept=kept)
    assert not held[~kept].any() and held[kept].any()
    assert not np.array_equal(held, nearest(weight * kept, scale, FOUR))


def test_a_side_without_an_inverse_is_damped_more_or_refused() -> None:
    assert np.isfinite(RowFeedback.of(np.ones((4, 4)), True, 0.0, "here").unit).all()
    with pytest.raises(PassError, match="output gradients have no inverse") as caught:
        RowFeedback.of(np.array([[1.0, 9.0], [9.0, 1.0]]), True, 0.01, "here")
    assert caught.value.where == "here"


@pytest.mark.parametrize(
    ("method", "weighting", "refits", "reason"),
    [
        ("gptaq", "guided", 0, "gptaq, whose shift"),
        ("comq", "yaqa", 0, "comq: only gptq"),
        ("gptq", "yaqa", 2, "levels that are fitted"),
    ],
)
def test_weightings_that_do_not_go_with_a_method(method: str, weighting: str, refits: int, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"the weighting {weighting} does not go with {reason}"):
        check_weighting("round_weights", method, weighting, refits)
    check_weighting("round_weights", method, "none", refits)
