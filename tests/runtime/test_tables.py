"""The map from timesteps to rows, against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.tables import nearest_rows


@given(deployed=st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True))
def test_every_timestep_gets_the_nearest_row_and_the_smaller_of_two(deployed: list[int]) -> None:
    rows = nearest_rows(deployed, 100)
    assert rows.dtype == np.int64
    assert rows.shape == (100,)
    for t, row in enumerate(rows.tolist()):
        assert deployed[row] == min(deployed, key=lambda known: (abs(known - t), known))


@given(deployed=st.lists(st.integers(0, 99), min_size=1, max_size=12, unique=True))
def test_a_deployed_timestep_gets_its_own_row(deployed: list[int]) -> None:
    np.testing.assert_array_equal(nearest_rows(deployed, 100)[deployed], np.arange(len(deployed)))


def test_the_order_of_rows_is_that_of_the_caller() -> None:
    np.testing.assert_array_equal(nearest_rows([4, 0], 6), [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(nearest_rows([0, 4], 6), [0, 0, 0, 1, 1, 1])


@pytest.mark.parametrize(
    ("deployed", "message"),
    [([], "at least one"), ([1.5], "at least one"), ([3, 3], "different"), ([10], "within"), ([-1], "within")],
)
def test_refused_lists(deployed: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        nearest_rows(deployed, 10)
