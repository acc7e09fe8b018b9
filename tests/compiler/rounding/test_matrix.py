"""Rounding methods against slow ones written from the formulas, and what all of them promise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.core.formats import INT8, Format, Levels
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.rounding import downdated
from mezzotint.compiler.rounding.exact import obq
from mezzotint.compiler.rounding.matrix import (
    Kept,
    Root,
    check_gram,
    comq,
    gptq,
    input_order,
    inverse_root,
    nearest,
    row_errors,
    shifted_target,
)
from mezzotint.compiler.rounding.row_scales import refit, scales_in_turns, search
from mezzotint.runtime.arrays import Floats

Wide = npt.NDArray[np.float64]
INT4 = Format(4, signed=True, symmetric=True)
Problem = tuple[Wide, Wide, Floats]


def problem(seed: int, rows: int = 5, inputs: int = 12, columns: int = 60) -> Problem:
    """Weights, H of correlated inputs (float64, so that ties do not depend on the last bit), and 4-bit scales."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((inputs, inputs)) @ rng.standard_normal((inputs, columns)) + 0.5
    weight = rng.standard_normal((rows, inputs))
    return weight, x @ x.T, (np.abs(weight).max(axis=1) / 7).astype(np.float32)


def damped(gram: Wide, damp: float) -> Wide:
    return np.asarray(gram + damp * np.diagonal(gram).mean() * np.eye(len(gram)))


def root_of(gram: Wide, damp: float = 0.01, sort: bool = True) -> Root:
    return inverse_root(gram, input_order(gram, sort), damp, "here")


def rounded_by(method: str, weight: Wide, gram: Wide, scale: Floats, fmt: Format = INT4, block: int = 4) -> Floats:
    if method == "comq":
        return comq(weight, gram, scale, fmt, sweeps=4, block=block)
    if method == "obq":
        return obq(weight, root_of(gram), scale, fmt, exact=len(gram))
    return gptq(weight, root_of(gram), scale, fmt, block=block)


def error_of(weight: Wide, integers: Floats, gram: Wide, scale: Floats) -> Wide:
    return row_errors(weight - scale[:, None].astype(np.float64) * integers, gram)


@pytest.mark.parametrize("sort", [True, False])
@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_factor_is_that_of_the_inverse(sort: bool, seed: int) -> None:
    _, gram, _ = problem(seed)
    root = root_of(gram, 0.02, sort)
    here = damped(gram, 0.02)[np.ix_(root.order, root.order)]
    np.testing.assert_array_equal(root.upper, np.triu(root.upper))
    np.testing.assert_allclose(root.upper.T @ root.upper @ here, np.eye(len(gram)), atol=1e-7)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(root.upper.T @ root.upper @ here * 1.01, np.eye(len(gram)), atol=1e-7)


def slow_gptq(weight: Wide, gram: Wide, order: npt.NDArray[np.int64], scale: Floats, fmt: Format) -> Wide:
    """One column after the other, the inverse of what is left updated by elimination."""
    w, inverse = weight.copy(), np.linalg.inv(gram)
    integers = np.zeros_like(w)
    s = scale.astype(np.float64)
    for i in order:
        q = np.clip(np.rint(w[:, i] / s), fmt.qmin, fmt.qmax)
        integers[:, i] = q
        w = w - np.outer((w[:, i] - s * q) / inverse[i, i], inverse[i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return integers


@pytest.mark.parametrize("sort", [True, False])
@given(seed=st.integers(0, 999), block=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_gptq_is_elimination_whatever_the_block(sort: bool, seed: int, block: int) -> None:
    weight, gram, scale = problem(seed)
    root = root_of(gram, 0.01, sort)
    got = gptq(weight, root, scale, INT4, block=block)
    np.testing.assert_array_equal(got, slow_gptq(weight, damped(gram, 0.01), root.order, scale, INT4))
    assert np.abs(got).max() <= 7


def test_the_slow_gptq_is_told_from_another() -> None:
    weight, gram, scale = problem(3)
    root = root_of(gram)
    other = gptq(weight * 1.01, root, scale, INT4, block=4)
    assert not np.array_equal(other, slow_gptq(weight, damped(gram, 0.01), root.order, scale, INT4))


def slow_obq(
    weight: Wide, gram: Wide, scale: Floats, fmt: Format, blocks: Sequence[Sequence[int]], kept: Kept | None = None
) -> Wide:
    """Each row: the inverse of H of the free columns is computed afresh every time; one block after the other."""
    integers = np.zeros_like(weight)
    for r, row in enumerate(weight):
        s, w, free = float(scale[r]), row.copy(), list(range(len(row)))
        for block in blocks:
            left = list(block)
            while left:
                inverse = np.linalg.inv(gram[np.ix_(free, free)])
                at = [free.index(c) for c in left]
                alive = np.ones(len(left), bool) if kept is None else kept[r, left]
                q = np.where(alive, np.clip(np.rint(w[left] / s), fmt.qmin, fmt.qmax), 0)
                e = w[left] - s * q
                beyond = alive & (np.abs(e) > 0.5001 * s)
                k = int(np.argmin(e**2 / np.diagonal(inverse)[at]))
                if beyond.any():
                    k = int(np.argmax(np.where(beyond, np.abs(e), 0)))
                if not alive.all():
                    k = int(np.argmin(alive))
                w[free] -= e[k] / inverse[at[k], at[k]] * inverse[at[k]]
                integers[r, left[k]] = q[k]
                free.remove(left.pop(k))
    return integers


@given(seed=st.integers(0, 999), inputs=st.integers(1, 20), exact=st.integers(1, 20), sparse=st.booleans())
@settings(max_examples=25, deadline=None)
def test_obq_is_the_greedy_order_in_each_block(seed: int, inputs: int, exact: int, sparse: bool) -> None:
    weight, gram, scale = problem(seed, inputs=inputs)
    root = root_of(gram)
    blocks = [root.order[i : i + exact].tolist() for i in range(0, inputs, exact)]
    kept = np.random.default_rng(seed).random(weight.shape) < 0.5 if sparse else None
    got = obq(weight, root, scale, INT4, exact=exact, kept=kept)
    np.testing.assert_array_equal(got, slow_obq(weight, damped(gram, 0.01), scale, INT4, blocks, kept))


@pytest.mark.parametrize("precise", [False, True])
def test_columns_that_left_the_matrices_change_nothing(monkeypatch: pytest.MonkeyPatch, precise: bool) -> None:
    """More columns than a panel, and some compactions, in both precisions."""
    monkeypatch.setattr(downdated, "PANEL", 3)
    monkeypatch.setattr(downdated, "PRECISE", 99 * precise)
    weight, gram, scale = problem(4, inputs=24)
    got = obq(weight, root_of(gram), scale, INT4, exact=24)
    want = slow_obq(weight, damped(gram, 0.01), scale, INT4, [list(range(24))])
    assert np.mean(got == want) == 1 if precise else np.mean(got == want) > 0.95


def test_blocks_of_obq_are_nearer_than_gptq() -> None:
    weight, gram, scale = problem(1, rows=60, inputs=64, columns=200)
    gram += np.diagonal(gram).mean() * np.eye(64)
    root = root_of(gram)
    errors = [
        error_of(weight, q, gram, scale).sum()
        for q in (
            *(obq(weight, root, scale, INT4, exact=n) for n in (64, 16)),
            gptq(weight, root, scale, INT4, block=8),
        )
    ]
    assert errors[0] < errors[1] < errors[2]


def test_what_is_left_of_a_row_makes_up_for_what_was_pruned() -> None:
    """In a row of two weights, one of them pruned, the other is rounded to the nearest point of its regression."""
    weight, gram, scale = problem(2, inputs=2)
    kept = np.array([[True, False]] * len(weight))
    here = damped(gram, 0.01)
    wanted = weight[:, 0] + weight[:, 1] * here[0, 1] / here[0, 0]
    for got in (
        obq(weight, root_of(gram), scale, INT4, exact=2, kept=kept),
        comq(weight, here, scale, INT4, sweeps=3, block=1, kept=kept),
    ):
        np.testing.assert_array_equal(got[:, 0], np.clip(np.rint(wanted / scale), -7, 7))
        assert not got[:, 1].any()
    assert not gptq(weight, root_of(gram), scale, INT4, block=2, kept=kept)[:, 1].any()


@given(seed=st.integers(0, 999))
@settings(max_examples=25, deadline=None)
def test_two_weights_are_rounded_as_well_as_can_be_almost(seed: int) -> None:
    """OBQ of two columns: within what the second one can make up for; never better than trying all points."""
    weight, gram, scale = problem(seed, inputs=2)
    here = damped(gram, 0.01)
    points = np.array(list(itertools.product(range(-7, 8), repeat=2)), np.float32)
    got = error_of(weight, obq(weight, root_of(gram), scale, INT4, exact=len(gram)), here, scale)
    simple = error_of(weight, nearest(weight, scale, INT4), here, scale)
    for r in range(len(weight)):
        every = error_of(np.repeat(weight[r : r + 1], len(points), 0), points, here, np.repeat(scale[r], len(points)))
        # The first column goes to its nearest point; the best point of the second one is then found exactly.
        assert every.min() <= got[r] * (1 + 1e-9)
        assert got[r] <= max(simple[r], every.min()) * (1 + 1e-9)


@pytest.mark.parametrize("method", ["gptq", "comq", "obq"])
@given(seed=st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_outputs_are_nearer_than_those_of_nearest(method: str, seed: int) -> None:
    """Not for every row, which is why the pass compares; but for a matrix of thirty."""
    weight, gram, scale = problem(seed, rows=30)
    got = error_of(weight, rounded_by(method, weight, gram, scale), gram, scale)
    assert got.sum() < 0.9 * error_of(weight, nearest(weight, scale, INT4), gram, scale).sum()


@pytest.mark.parametrize("method", ["gptq", "comq", "obq"])
@pytest.mark.parametrize("fmt", [INT4, INT8])
def test_uncorrelated_inputs_leave_nearest(method: str, fmt: Format) -> None:
    weight, _, _ = problem(0)
    scale = (np.abs(weight).max(axis=1) / fmt.qmax).astype(np.float32)
    gram = np.diag(np.random.default_rng(1).uniform(0.1, 10, weight.shape[1]))
    got = rounded_by(method, weight, gram, scale, fmt)
    np.testing.assert_array_equal(got, nearest(weight, scale, fmt))
    gram += 0.5 * gram.max()
    assert not np.array_equal(rounded_by(method, weight, gram, scale, fmt), nearest(weight, scale, fmt))


@given(seed=st.integers(0, 999), block=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_sweeps_of_comq_never_make_a_row_worse(seed: int, block: int) -> None:
    weight, gram, scale = problem(seed)
    errors = [
        error_of(weight, comq(weight, gram, scale, INT4, sweeps=n, block=block), gram, scale) for n in range(1, 6)
    ]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-6) + 1e-9).all()


def slow_comq(weight: Wide, gram: Wide, scale: Floats, sweeps: int) -> Wide:
    order = np.argsort(-np.sqrt(np.diagonal(gram)) * np.abs(weight).mean(axis=0), kind="stable")
    now = weight.copy()
    s = scale.astype(np.float64)
    for _ in range(sweeps):
        for i in order:
            other = [j for j in range(len(order)) if j != i]
            wanted = weight[:, i] + (weight - now)[:, other] @ gram[other, i] / gram[i, i]
            now[:, i] = s * np.clip(np.rint(wanted / s), -7, 7)
    return np.asarray(np.rint(now / s[:, None]))


@given(seed=st.integers(0, 999), block=st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_comq_is_coordinate_descent(seed: int, block: int) -> None:
    weight, gram, scale = problem(seed)
    got = comq(weight, gram, scale, INT4, sweeps=2, block=block)
    np.testing.assert_array_equal(got, slow_comq(weight, gram, scale, 2))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from([1, 3, 64]))
def test_one_sweep_in_order_is_path_following(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((12, 40)), rng.uniform(-1, 1, (3, 12))
    scale = np.full(3, 0.25, np.float32)
    got = comq(weight, x @ x.T, scale, Format(8, signed=True, symmetric=True), sweeps=1, block=block, sort=False)
    for row, found in zip(weight, got, strict=True):
        left, bound = np.zeros(40), 0.0  # u of the paper, and what its theorem allows it
        for w, q, column in zip(row, found, x, strict=True):
            power = column @ column
            assert q == np.rint((left + w * column) @ column / power / 0.25)
            left += (w - 0.25 * q) * column
            bound += (0.25 / 2) ** 2 * power
            assert left @ left <= bound * (1 + 1e-9)


def check_target(
    target: npt.NDArray[np.floating], weight: Wide, x: Wide, floats: Wide, damp: float, alpha: float
) -> None:
    """The ridge regression of the float outputs on the quantized inputs, a share of the way."""
    gram = x @ x.T
    shift = weight @ (floats - x) @ x.T
    want = weight + alpha * shift @ np.linalg.inv(damped(gram, damp))
    np.testing.assert_allclose(target, want, rtol=1e-6, atol=1e-8)


def test_the_target_of_gptaq_undoes_what_happened_to_the_inputs() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((8, 50)), rng.standard_normal((4, 8))
    floats = np.asarray((np.eye(8) + 0.1 * rng.standard_normal((8, 8))) @ x)
    shift = weight @ (floats - x) @ x.T
    target = shifted_target(weight, shift, root_of(x @ x.T, 0.01), 0.25)
    check_target(target, weight, x, floats, 0.01, 0.25)
    with pytest.raises(AssertionError):
        check_target(target * 1.01, weight, x, floats, 0.01, 0.25)
    whole = shifted_target(weight, shift, root_of(x @ x.T, 0.0), 1.0)
    np.testing.assert_allclose(whole @ x, weight @ floats, atol=1e-8)


def test_a_singular_matrix_is_damped_more_and_says_so() -> None:
    constant = np.ones((6, 20))
    gram = constant @ constant.T
    assert root_of(gram, 0.0).damp > 0
    assert root_of(gram, 0.01).damp == 0.01
    negative = np.eye(6)
    negative[0, 1] = negative[1, 0] = 5.0  # no matrix of products
    with pytest.raises(PassError, match="no inverse") as caught:
        root_of(negative)
    assert caught.value.where == "here"


def test_inputs_that_are_always_zero() -> None:
    weight, gram, scale = problem(0)
    gram[3] = gram[:, 3] = 0
    check_gram(gram, "here")
    simple = nearest(weight, scale, INT4)
    for method in ("gptq", "comq", "obq"):
        np.testing.assert_array_equal(rounded_by(method, weight, gram, scale)[:, 3], simple[:, 3])
    dead = np.zeros((4, 4))
    check_gram(dead, "here")
    np.testing.assert_array_equal(dead, np.eye(4))
    with pytest.raises(PassError, match="not finite"):
        check_gram(np.full((2, 2), np.nan), "here")


@pytest.mark.parametrize("bits", range(2, 9))
@given(scale=st.floats(1e-8, 1e4))
@settings(max_examples=40)
def test_grid_points_are_quantized_to_themselves(bits: int, scale: float) -> None:
    """QuantizeLinear divides s q by s again, in float32."""
    fmt = Format(bits, signed=True, symmetric=True)
    q = np.arange(fmt.qmin, fmt.qmax + 1, dtype=np.float32)
    s = np.float32(scale)
    np.testing.assert_array_equal(np.rint((s * q) / s), q)


def test_searched_scales_cost_no_more() -> None:
    weight, gram, scale = problem(0, rows=20)
    for importance in (np.ones(len(gram)), np.diagonal(gram).copy()):
        found = search(weight, scale, INT4, importance)
        before = error_of(weight, nearest(weight, scale, INT4), np.diag(importance), scale)
        after = error_of(weight, nearest(weight, found, INT4), np.diag(importance), found)
        assert (after <= before).all() and after.sum() < 0.99 * before.sum()


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_the_refitted_scale_is_the_best_one(seed: int) -> None:
    weight, gram, scale = problem(seed)
    q = nearest(weight, scale, INT4)
    q[0] = 0
    found = refit(weight, q, gram, scale)
    assert found[0] == scale[0]
    best = error_of(weight, q, gram, found)
    for factor in (0.99, 1.01):
        worse = error_of(weight, q, gram, (found * factor).astype(np.float32))
        assert (best[1:] < worse[1:]).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_errors_of_rows_are_those_of_the_whole_matrix(kind: type) -> None:
    """By both triangles, for rows in any order of memory; H whose diagonal stands out, for a part without it shows."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((9, 30))
    gram: npt.NDArray[np.floating] = (x @ x.T + np.diag(np.arange(9.0) * 5)).astype(kind)
    for difference in (
        rng.standard_normal((4, 9)),
        np.asfortranarray(rng.standard_normal((5, 9))),
        np.ones((8, 9))[::2],
    ):
        rows: npt.NDArray[np.floating] = difference.astype(kind)
        wanted = [row @ gram.astype(np.float64) @ row for row in difference.astype(kind).astype(np.float64)]
        np.testing.assert_allclose(row_errors(rows, gram), wanted, rtol=1e-5 if kind is np.float32 else 1e-12)
        np.testing.assert_array_equal(rows, difference.astype(kind))


def test_a_root_is_held_in_either_form() -> None:
    """The factor and its inverse take each other's place, and rows are solved by the factor."""
    rng = np.random.default_rng(12)
    x = rng.standard_normal((7, 40))
    gram, root = x @ x.T, root_of(x @ x.T, 0.02)
    here = damped(gram, 0.02)[np.ix_(root.order, root.order)]
    factor = root.factor.copy()
    np.testing.assert_allclose(factor @ factor.T, here, rtol=1e-10)
    assert (np.tril(factor, -1) == 0).all()
    np.testing.assert_allclose(root.upper @ factor, np.eye(7), atol=1e-12)
    np.testing.assert_allclose(root.upper.T @ root.upper, np.linalg.inv(here), rtol=1e-8)
    np.testing.assert_allclose(root.factor, factor, rtol=1e-10, atol=1e-12)
    rows = rng.standard_normal((3, 7))
    np.testing.assert_allclose(root.solved(rows), rows @ np.linalg.inv(here), rtol=1e-8)


def test_scales_in_turns_are_those_of_least_error() -> None:
    """For signs the weighted mean of |w|; for other levels no turn is worse, and the last scale fits its codes."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 40)).astype(np.float32)
    weight[3] = 0
    h = rng.uniform(0.1, 5, 40).astype(np.float32)
    first = np.full(4, 0.02, np.float32)
    signs = scales_in_turns(weight, first, Levels(np.array([-64, 64], np.int8)), h)
    np.testing.assert_allclose(64 * signs[:3], (np.abs(weight[:3]) @ h) / h.sum(), rtol=1e-5)
    assert signs[3] == first[3], "any scale is as good for a row of zeros"

    grid = Levels(np.array([-100, -20, 30, 110], np.int8))
    found = scales_in_turns(weight, first, grid, h)

    def error(scale: Floats) -> Wide:
        difference = weight - scale[:, None] * nearest(weight, scale, grid)
        return np.asarray((np.square(difference) * h).sum(axis=1)[:3])

    assert (error(found) <= error(first)).all()
    for near in (0.999, 1.001):
        assert (error(found) <= error((found * near).astype(np.float32)) + 1e-6).all()
