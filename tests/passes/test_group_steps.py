"""group_steps: the cheapest cut against all cuts, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Plan, Program
from mezzotint.compiler.core.stats import Stats, Summary
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.passes.group_steps import GroupSteps, cheapest_cut
from mezzotint.passes.recipes.files import make_pass
from mezzotint.runtime.arrays import Doubles
from tests.helpers.tiny import tiny_program

CALLS = 6


@st.composite
def measurements(draw: st.DrawFn) -> tuple[Doubles, Doubles]:
    """Widths and powers, `[values, calls]`."""
    values, calls = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    numbers = st.lists(st.floats(0.01, 100), min_size=values * calls, max_size=values * calls)
    widths, powers = (np.array(draw(numbers)).reshape(values, calls) for _ in range(2))
    return widths, powers


def cost(widths: Doubles, powers: Doubles, cut: tuple[int, ...]) -> float:
    """What the module's docstring says: (widest range of the call's group)^2 / power, over values and calls."""
    total = 0.0
    for group in set(cut):
        members = [k for k, g in enumerate(cut) if g == group]
        for v in range(len(widths)):
            widest = max(widths[v, k] for k in members)
            total += sum(widest**2 / powers[v, k] for k in members)
    return total


def all_cuts(calls: int, groups: int) -> Iterator[tuple[int, ...]]:
    for borders in combinations(range(1, calls), groups - 1):
        yield tuple(sum(k >= b for b in borders) for k in range(calls))


def check_cheapest(widths: Doubles, powers: Doubles, groups: int, factor: float = 1.0) -> None:
    calls = widths.shape[1]
    cut = cheapest_cut(widths, powers, groups)
    best = min(cost(widths, powers, other) for other in all_cuts(calls, groups))
    assert cost(widths * factor, powers, cut) <= best * (1 + 1e-9)


@given(measurements(), st.integers(1, 3))
def test_no_cut_is_cheaper(measured: tuple[Doubles, Doubles], groups: int) -> None:
    widths, powers = measured
    check_cheapest(widths, powers, min(groups, widths.shape[1]))
    with pytest.raises(AssertionError):
        check_cheapest(widths, powers, min(groups, widths.shape[1]), factor=1.01)


@given(measurements(), st.integers(1, 7))
def test_groups_are_contiguous_and_cover_every_call(measured: tuple[Doubles, Doubles], groups: int) -> None:
    count = min(groups, measured[0].shape[1])
    cut = cheapest_cut(*measured, count)
    assert len(cut) == measured[0].shape[1]
    assert cut[0] == 0
    assert cut[-1] == count - 1
    assert all(b - a in (0, 1) for a, b in pairwise(cut))


@given(measurements())
def test_more_groups_never_cost_more(measured: tuple[Doubles, Doubles]) -> None:
    costs = [cost(*measured, cheapest_cut(*measured, g)) for g in range(1, measured[0].shape[1] + 1)]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(costs))


def test_the_cut_falls_where_the_range_jumps() -> None:
    widths = np.array([[9.0, 9.1, 9.0, 1.0, 1.1, 1.0]])
    assert cheapest_cut(widths, np.ones((1, 6)), 2) == (0, 0, 0, 1, 1, 1)


def observed(scales: list[float], groups: int | None = None) -> Program:
    """A program with statistics of one value for each call; the value is normal, times the call's scale."""
    program = tiny_program(steps=CALLS)
    summaries = {}
    for k, scale in enumerate(scales):
        summary = Summary()
        summary.add((np.random.default_rng(k).standard_normal(500) * scale).astype(np.float32))
        summaries["x", k] = summary
    stats = Stats("d", groups or len(scales), len(scales), summaries)
    return replace(program, stats=stats, plan=Plan(islands={"a": "b"}))


def groups_of(step: GroupSteps, program: Program, context: Context) -> tuple[int, ...]:
    plan = step.run(program, context).plan
    assert plan is not None
    assert plan.islands == {"a": "b"}
    return plan.groups


@pytest.mark.parametrize(
    ("method", "groups", "expected"),
    [
        ("even", 3, (0, 0, 1, 1, 2, 2)),
        ("even", 4, (0, 0, 1, 2, 2, 3)),
        ("even", 100, (0, 1, 2, 3, 4, 5)),
        ("each", 2, (0, 1, 2, 3, 4, 5)),
        ("dp", 100, (0, 1, 2, 3, 4, 5)),
        ("dp", 1, (0, 0, 0, 0, 0, 0)),
        ("dp", 2, (0, 0, 0, 0, 1, 1)),
    ],
)
def test_methods(
    method: Literal["dp", "even", "each"], groups: int, expected: tuple[int, ...], context: Context
) -> None:
    program = observed([8.0, 8.0, 8.0, 8.0, 1.0, 1.0])
    assert groups_of(GroupSteps(method=method, groups=groups), program, context) == expected


def test_the_note_counts_the_calls_of_each_group(context: Context) -> None:
    after = GroupSteps(groups=2).run(observed([8.0, 8.0, 8.0, 8.0, 1.0, 1.0]), context)
    assert after.note == "6 calls in 2 groups of 4, 2"


def test_statistics_that_are_not_of_every_call_are_refused(context: Context) -> None:
    with pytest.raises(StatsError, match="statistics of 2 groups for 6 network calls") as caught:
        GroupSteps().run(observed([1.0, 1.0], groups=2), context)
    assert "observe.groups=0" in str(caught.value.hint)


def test_calls_without_a_sample_are_refused(context: Context) -> None:
    program = observed([1.0] * CALLS)
    assert program.stats is not None
    left = {key: summary for key, summary in program.stats.summaries.items() if key[1] not in (1, 2)}
    holed = replace(program, stats=replace(program.stats, summaries=left))
    a, b, c, d = program.deployment.timesteps[:4]
    for method in ("dp", "even", "each"):
        with pytest.raises(StatsError, match=f"2 of {CALLS} timesteps were never calibrated") as caught:
            make_pass("group_steps", {"method": method}).run(holed, context)
        assert f"{b} (nearest calibrated: {a}), {c} (nearest calibrated: {d})" in caught.value.what
        assert "allocate_steps.share" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 0}, "group_steps.groups is 0"),
        ({"groups": -3}, "group_steps.groups is -3"),
        ({"groups": 2.5}, "group_steps.groups"),
        ({"method": "kmeans"}, "group_steps.method"),
        ({"percentile": 20}, "group_steps.percentile is 20"),
        ({"percentile": 101}, "group_steps.percentile is 101"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_pass("group_steps", options)
