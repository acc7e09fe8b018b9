"""The integer program against all there is to choose from."""

from __future__ import annotations

import os
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.bits import allocation
from mezzotint.compiler.bits.allocation import RELATIVE_GAP, allocate, smallest

Rows = list[list[tuple[float, int]]]
choices = st.lists(
    st.tuples(st.floats(-9, 0).map(lambda e: 10.0**e) | st.just(0.0), st.integers(0, 10**6)), min_size=1, max_size=3
)


def best(rows: Rows, budget: int) -> float | None:
    """The least error of all allocations that fit."""
    fitting = [sum(e for e, _ in picked) for picked in product(*rows) if sum(k for _, k in picked) <= budget]
    return min(fitting, default=None)


def check(rows: Rows, budget: int, factor: float = 1.0) -> None:
    found = allocate([[e for e, _ in row] for row in rows], [[k for _, k in row] for row in rows], budget)
    wanted = best(rows, budget)
    if wanted is None:
        assert found is None
        return
    assert found is not None
    taken = [row[c] for row, c in zip(rows, found.chosen, strict=True)]
    assert found.cost == sum(k for _, k in taken) <= budget
    assert found.error == pytest.approx(sum(e for e, _ in taken), rel=1e-12)
    assert wanted <= found.error * factor * (1 + 1e-12) <= wanted * (1 + 1.1 * RELATIVE_GAP)


@settings(max_examples=60, deadline=None)
@given(st.lists(choices, min_size=1, max_size=5), st.floats(0, 1.1))
def test_it_is_as_good_as_brute_force(rows: Rows, share: float) -> None:
    check(rows, int(share * sum(max(k for _, k in row) for row in rows)))


def test_a_planted_error_is_seen() -> None:
    rows = [[(0.5, 1), (0.25, 2)], [(0.4, 1), (0.1, 3)]]
    check(rows, 4)
    with pytest.raises(AssertionError):
        check(rows, 4, factor=1.01)


def test_what_cannot_be_met() -> None:
    costs = [[4, 8], [40, 80]]
    assert smallest(costs) == 44
    assert allocate([[1.0, 0.5]] * 2, costs, 43) is None
    found = allocate([[1.0, 0.5]] * 2, costs, 44)
    assert found is not None and found.chosen == (0, 0)


def test_many_layers_take_a_moment_and_the_same_twice() -> None:
    rng = np.random.default_rng(3)
    sizes, loud = 10 ** rng.uniform(3, 7, 300), 10 ** rng.uniform(-6, -2, 300)
    errors = [[256 * float(e), float(e), 0.0] for e in loud]
    costs = [[int(n) * bits for bits in (4, 8, 32)] for n in sizes]
    found = allocate(errors, costs, int(5 * sizes.sum()))
    assert found is not None and found == allocate(errors, costs, int(5 * sizes.sum()))
    assert found.gap <= RELATIVE_GAP


def test_without_a_solver_there_is_the_relaxation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stays when the time is over before the solver has any answer; its gap says how good it is."""
    monkeypatch.setattr(allocation, "_solved", lambda *_: None)
    errors, costs = [[1.0, 0.5, 0.1], [1.0, 0.2, 0.1]], [[1, 2, 6], [1, 2, 6]]
    found = allocate(errors, costs, 7)
    assert found is not None and found.cost <= 7
    wanted = best([list(zip(e, k, strict=True)) for e, k in zip(errors, costs, strict=True)], 7)
    assert wanted is not None and found.error * (1 - found.gap) <= wanted + 1e-9


def test_what_the_solver_prints_is_no_answer_of_ours(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """HiGHS writes to the process's stdout past Python; a command's JSON goes there."""
    solve = scipy.optimize.milp

    def loud(*arguments: Any, **options: Any) -> Any:
        os.write(1, b"mending\n")
        return solve(*arguments, **options)

    monkeypatch.setattr(allocation, "milp", loud)
    print("before")
    found = allocate([[1.0, 0.5, 0.1], [1.0, 0.2, 0.1]], [[1, 2, 6], [1, 2, 6]], 7)
    print("after")
    assert found is not None
    assert capfd.readouterr() == ("before\nafter\n", "")
