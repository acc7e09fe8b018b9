"""Optimal Brain Surgeon against slow forms written from the formulas, and against all masks there are."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.pruning.blocked import swept
from mezzotint.compiler.pruning.greedy import mask_of, removed, trace
from mezzotint.compiler.pruning.layer_pruning import LayerPruner, by_magnitude
from mezzotint.compiler.pruning.patterns import PruningPattern, column_order
from mezzotint.compiler.pruning.restoration import polished, restored
from mezzotint.compiler.rounding import downdated
from mezzotint.compiler.rounding.downdated import DowndatedInverses
from mezzotint.compiler.rounding.matrix import Kept, inverse_root, row_errors

Wide = npt.NDArray[np.float64]
FREE, TWO_OF_FOUR, BLOCKS = (PruningPattern.of(name, "here") for name in ("unstructured", "2:4", "blocks"))


def problem(seed: int, rows: int = 4, inputs: int = 8) -> tuple[Wide, Wide]:
    """Weights, and H of correlated inputs."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((inputs, inputs)) @ rng.standard_normal((inputs, 60)) + rng.standard_normal((inputs, 60))
    return rng.standard_normal((rows, inputs)), np.asarray(x @ x.T)


def slow_trace(weight: Wide, gram: Wide, depth: int, pattern: PruningPattern) -> tuple[list[list[int]], Wide]:
    """Each row: the inverse of H of what is left is computed afresh every time. (order, errors)"""
    order: list[list[int]] = []
    errors = np.zeros((len(weight), depth))
    for r, row in enumerate(weight):
        w, left = row.copy(), list(range(len(row)))
        gone: list[int] = []
        for step in range(depth):
            inverse = np.linalg.inv(gram[np.ix_(left, left)])
            best: tuple[float, int, list[int]] = (np.inf, 0, [])
            for first in range(0, len(row), pattern.block):
                at = [left.index(c) for c in range(first, first + pattern.block) if c in left]
                group = [c for c in gone if pattern.group and c // pattern.group == first // pattern.group]
                if not at or (pattern.group and len(group) == pattern.group - pattern.kept):
                    continue
                part = w[left][at]
                cost = float(part @ np.linalg.inv(inverse[np.ix_(at, at)]) @ part)
                best = min(best, (cost, first // pattern.block, at))
            errors[r, step], chosen, at = best
            gone.append(chosen)
            w[left] -= w[left][at] @ np.linalg.inv(inverse[np.ix_(at, at)]) @ inverse[at]
            left = [c for c in left if c // pattern.block != chosen]
        order.append(gone)
    return order, errors


@given(seed=st.integers(0, 999), pattern=st.sampled_from([FREE, TWO_OF_FOUR, BLOCKS]), small=st.booleans())
@settings(max_examples=30, deadline=None)
def test_the_order_is_that_of_inverses_computed_afresh(seed: int, pattern: PruningPattern, small: bool) -> None:
    weight, gram = problem(seed, inputs=12)
    depth = {FREE: 11, TWO_OF_FOUR: 6, BLOCKS: 2}[pattern]
    with pytest.MonkeyPatch.context() as patch:
        if small:  # columns leave the matrices after every third
            patch.setattr(downdated, "PANEL", 3)
        got = trace(weight, np.linalg.inv(gram), depth, pattern)
    order, errors = slow_trace(weight, gram, depth, pattern)
    np.testing.assert_array_equal(got.order, order)
    np.testing.assert_allclose(got.errors, errors, rtol=1e-6, atol=1e-9)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(trace(weight, gram, depth, pattern).errors, errors)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_a_column_is_removed_from_the_inverse(seed: int) -> None:
    """The lemma: rows and columns of H^-1 without p, less g g^T / G_pp, are the inverse of H without p."""
    weight, gram = problem(seed)
    state = DowndatedInverses(weight, np.linalg.inv(gram))
    place = np.array([0, 3, 3, 7])
    state.remove(place)
    for row, p in enumerate(place):
        left = [c for c in range(8) if c != p]
        inverse = np.linalg.inv(gram[np.ix_(left, left)])
        np.testing.assert_allclose(state.diagonal[row, left], np.diagonal(inverse), rtol=1e-7)
        best = inverse @ (gram[left] @ weight[row])
        np.testing.assert_allclose(state.values[row, left], best, rtol=1e-6, atol=1e-9)
        assert abs(state.values[row, p]) < 1e-9


@given(seed=st.integers(0, 999), count=st.integers(1, 31))
@settings(max_examples=20, deadline=None)
def test_rows_compete_by_a_heap(seed: int, count: int) -> None:
    weight, gram = problem(seed)
    weight[0] *= 5
    order, errors = slow_trace(weight, gram, 8, FREE)
    heap = [(errors[r, 0], r, 0) for r in range(4)]
    heapq.heapify(heap)
    kept = np.ones(weight.shape, bool)
    for _ in range(count):
        _, r, k = heapq.heappop(heap)
        kept[r, order[r][k]] = False
        if k < 7:
            heapq.heappush(heap, (errors[r, k + 1], r, k + 1))
    np.testing.assert_array_equal(removed(weight, np.linalg.inv(gram), count, FREE), kept)


def every_mask(inputs: int, gone: int) -> Kept:
    masks = np.ones((len(list(itertools.combinations(range(inputs), gone))), inputs), bool)
    for mask, places in zip(masks, itertools.combinations(range(inputs), gone), strict=True):
        mask[list(places)] = False
    return masks


def test_one_removal_is_the_best_of_all_and_half_a_row_is_near_it() -> None:
    shares, simple = [], []
    for seed in range(20):
        weight, gram = problem(seed, rows=1)
        inverse = np.linalg.inv(gram)
        for gone in (1, 4):
            masks = every_mask(8, gone)
            best = row_errors(weight - restored(np.repeat(weight, len(masks), 0), gram, masks), gram).min()
            kept = mask_of(trace(weight, inverse, gone, FREE), np.array([gone]), 8, FREE)
            mine = row_errors(weight - restored(weight, gram, kept), gram)[0]
            assert mine >= best * (1 - 1e-9)
            if gone == 1:
                assert mine == pytest.approx(best, rel=1e-9)
            else:
                shares.append(mine / best)
                small = by_magnitude(weight, gone, FREE)
                simple.append(row_errors(weight * ~small, gram)[0] / best)
    assert np.median(shares) < 1.2 and np.median(simple) > 2


def test_patterns_hold() -> None:
    weight, gram = problem(0, rows=6, inputs=16)
    inverse = np.linalg.inv(gram)
    assert (removed(weight, inverse, 0, TWO_OF_FOUR).reshape(6, 4, 4).sum(axis=2) == 2).all()
    assert (by_magnitude(weight, 0, TWO_OF_FOUR).reshape(6, 4, 4).sum(axis=2) == 2).all()
    for kept in (removed(weight, inverse, 12, BLOCKS), by_magnitude(weight, 12, BLOCKS)):
        whole = kept.reshape(6, 4, 4).sum(axis=2)
        assert set(whole.flat) <= {0, 4} and whole.sum() == 6 * 16 - 48
    one = by_magnitude(np.array([[1.0, -4, 3, 2]]), 0, TWO_OF_FOUR)
    np.testing.assert_array_equal(one, [[False, True, True, False]])
    np.testing.assert_array_equal(column_order(3, 2), [0, 2, 4, 1, 3, 5])


@given(seed=st.integers(0, 999))
@settings(max_examples=10, deadline=None)
def test_what_stays_is_the_regression_and_so_are_the_steps_together(seed: int) -> None:
    weight, gram = problem(seed)
    kept = removed(weight, np.linalg.inv(gram), 14, FREE)
    got = restored(weight, gram, kept)
    inverse = np.linalg.inv(gram)
    for row, mask, original in zip(got, kept, weight, strict=True):
        gone = ~mask
        steps = original - original[gone] @ np.linalg.inv(inverse[np.ix_(gone, gone)]) @ inverse[gone]
        np.testing.assert_allclose(row, steps, rtol=1e-6, atol=1e-8)
        root = np.linalg.cholesky(gram)
        best = np.linalg.lstsq(root.T[:, mask], root.T @ original, rcond=None)[0]
        np.testing.assert_allclose(row[mask], best, rtol=1e-6, atol=1e-8)
    errors = [row_errors(weight - polished(weight, weight * kept, gram, kept, n), gram) for n in (0, 1, 2, 20)]
    for before, after in itertools.pairwise(errors):
        assert (after <= before * (1 + 1e-9)).all()
    np.testing.assert_allclose(errors[-1], row_errors(weight - got, gram), rtol=1e-6)


@pytest.mark.parametrize("pattern", [FREE, TWO_OF_FOUR, BLOCKS], ids=lambda p: p.name)
def test_blocks_of_columns(pattern: PruningPattern) -> None:
    """One block is the exact form; in several, each column after a block has made up for it; polish helps them."""
    weight, gram = problem(1, rows=20, inputs=48)
    root = inverse_root(gram, np.arange(48), 0.0, "here")
    count = 20 * 24 // pattern.block
    exact = removed(weight, np.linalg.inv(gram), count, pattern)
    kept, values = swept(weight, root, count, pattern, 48)
    np.testing.assert_array_equal(kept, exact)
    np.testing.assert_allclose(values, restored(weight, gram, kept), rtol=1e-5, atol=1e-7)
    best = row_errors(weight - values, gram).sum()
    parts, rough = swept(weight, root, count, pattern, 16)
    assert abs(int(parts.sum()) - int(exact.sum())) <= pattern.block
    assert not rough[~parts].any()
    better = polished(weight, rough, gram, parts, 30)
    errors = [float(row_errors(weight - found, gram).sum()) for found in (better, rough, weight * parts)]
    assert errors[0] <= errors[1] < errors[2] and errors[0] < 2 * best


def pruner(pattern: PruningPattern, exact: int = 99) -> LayerPruner:
    return LayerPruner(pattern, "obs", exact, 16, 8, 0.01)


@pytest.mark.parametrize("exact", [99, 1])
def test_singular_inputs_get_a_larger_ridge(exact: int) -> None:
    """Channels that are all equal: any one of them can take the place of the others."""
    weight, _ = problem(0)
    equal = np.ones((8, 8), np.float32)
    layer = LayerPruner(FREE, "obs", exact, 4, 8, 0.0).prune_groups(weight, equal[None], 8, 0.5, "here")
    assert layer.damp > 0 and layer.share < 0.01 and np.count_nonzero(layer.values) == 16
    dead = np.zeros((1, 8, 8), np.float32)
    assert np.isfinite(pruner(FREE, exact).prune_groups(weight, dead, 8, 0.5, "here").values).all()


def test_groups_of_a_convolution_and_positions_of_a_kernel() -> None:
    """Two groups with an H each; in 2:4 the channels of one position are counted."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((6, 4 * 9)).astype(np.float32)
    grams = np.stack([problem(seed, inputs=36)[1].astype(np.float32) for seed in (1, 2)])
    layer = pruner(TWO_OF_FOUR).prune_groups(weight, grams, 4, 0.5, "here")
    assert (np.count_nonzero(layer.values.reshape(6, 4, 9), axis=1) == 2).all()
    alone = pruner(TWO_OF_FOUR).prune_groups(weight[3:], grams[1:], 4, 0.5, "here")
    np.testing.assert_array_equal(layer.values[3:], alone.values)


@pytest.mark.parametrize("name", ["4:2", "0:4", "2:2", "half", "2:4:8", ""])
def test_names_that_are_no_pattern(name: str) -> None:
    with pytest.raises(RecipeError, match="pattern"):
        PruningPattern.of(name, "prune_weights")
