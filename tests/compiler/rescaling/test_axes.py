"""Layouts: where channels lie before data movers, against what numpy does with numbered channels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.compiler.rescaling.axes import Atom, AxisSize, Layout

SIZES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=2, max_size=4)


def spelled(layout: Layout, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The channel at every place of a value."""
    found = layout.channels()
    assert found is not None
    return np.broadcast_to(found, shape)


def numbered(shape: tuple[int, ...], axis: int) -> npt.NDArray[np.int64]:
    along = [-1 if d == axis else 1 for d in range(len(shape))]
    return np.broadcast_to(np.arange(shape[axis]).reshape(along), shape)


@given(SIZES, st.data())
def test_a_transpose_is_undone(sizes: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(sizes) - 1))
    order = data.draw(st.permutations(range(len(sizes))))
    back = np.argsort(order)
    want = np.transpose(numbered(tuple(sizes), axis), back)
    np.testing.assert_array_equal(spelled(Layout.of(sizes, axis).transposed(order), want.shape), want)


@given(SIZES, st.data())
def test_a_reshape_is_undone_or_refused(sizes: list[int], data: st.DataObject) -> None:
    """The sizes before are any cut of the same number of values; some of them may be unknown."""
    axis = data.draw(st.integers(0, len(sizes) - 1))
    total = int(np.prod(sizes))
    divisors = [n for n in range(1, total + 1) if total % n == 0]
    first = data.draw(st.sampled_from(divisors))
    second = data.draw(st.sampled_from([n for n in divisors if (total // first) % n == 0]))
    before = (first, second, total // first // second)
    unknown = data.draw(st.sampled_from([None, 0, 1, 2]))
    target: list[AxisSize] = [None if d == unknown else n for d, n in enumerate(before)]
    layout = Layout.of(sizes, axis).reshaped(target)
    if layout is not None:
        want = numbered(tuple(sizes), axis).reshape(before)
        np.testing.assert_array_equal(spelled(layout, before), want)


@pytest.mark.parametrize("chain", [([2, 16, 12], [2, 16, 3, 4]), ([2, 16, 12], [2, 16, 3, 4], [2, 16, 3, 2, 2])])
def test_heads_are_cut_out_and_joined(chain: tuple[list[int], ...]) -> None:
    layout = Layout.of(chain[-1], len(chain[-1]) - 1)
    wide = chain[-1][-1]
    for after, before in pairwise(chain[::-1]):
        assert int(np.prod(after)) == int(np.prod(before))
        found = layout.reshaped(before)
        assert found is not None
        layout = found
    index = layout.channels()
    assert index is not None
    np.testing.assert_array_equal(index.reshape(-1), np.tile(np.arange(wide), 12 // wide))


def test_open_dimensions_are_matched_by_name() -> None:
    heads = Layout.of(["batch", "tokens", 32], -1).reshaped(["batch", "tokens", 4, 8])
    assert heads is not None
    assert heads.axes[2:] == ((Atom(4, 8),), (Atom(8, 1),))
    turned = heads.transposed([0, 2, 1, 3])  # the Transpose that made [batch, tokens, 4, 8] read [batch, 4, tokens, 8]
    assert turned.axes == ((Atom("batch"),), (Atom(4, 8),), (Atom("tokens"),), (Atom(8, 1),))
    merged = turned.reshaped([None, "tokens", 8])
    assert merged is not None
    assert merged.axes[0] == (Atom("batch"), Atom(4, 8))
    assert merged.channels() is None  # how many heads lie in front of each other is not known


def test_what_cannot_be_told_is_refused() -> None:
    layout = Layout.of(["batch", 6, "tokens"], 1)
    assert layout.reshaped([None, None]) is None
    assert layout.reshaped(["batch", 4, None, None]) is None
    assert Layout.of(["batch", 4, "tokens"], 0).reshaped([None, None]) is None


def test_tokens_may_be_cut_as_they_like() -> None:
    layout = Layout.of(["batch", "tokens", 6], -1).reshaped(["a", "b", "c", 6])
    assert layout is not None
    assert layout.whole(3, 6)


def test_a_part_is_one_place_of_an_atom() -> None:
    layout = Layout(((), (Atom(3, 0, only=1), Atom(4, 1))))
    index = layout.channels()
    assert index is not None
    np.testing.assert_array_equal(index.reshape(-1), [-1] * 4 + [0, 1, 2, 3] + [-1] * 4)
    assert not layout.whole(1, 4)
