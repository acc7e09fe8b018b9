"""The precision of each call: compared with brute force, and within budgets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint.compiler.mixing.choice import PrecisionChoice, by_margin, picture_weights, relaxed
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.sampling.steps import noise_of

Case = tuple[Doubles, list[float]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Margins of up to 3 precisions at up to 6 calls, with ties and with precisions that make no error."""
    precisions, calls = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, 7.0, math.inf]) | st.floats(0, 100)
    margins = draw(st.lists(values, min_size=precisions * calls, max_size=precisions * calls))
    costs = draw(st.lists(st.floats(0.05, 10), min_size=precisions, max_size=precisions))
    return np.array(margins).reshape(precisions, calls), costs


def by_hand(margins: Doubles, costs: list[float], tau: float) -> list[int]:
    """The rule, written a second time without vectorization."""
    chosen = []
    for column in margins.T:
        enough = [i for i, margin in enumerate(column) if margin >= tau]
        ranked = enough or [i for i, margin in enumerate(column) if margin == column.max()]
        chosen.append(min(ranked, key=lambda i: costs[i]))
    return chosen


def mean_cost(calls: list[int], costs: list[float]) -> float:
    return sum(costs[i] for i in calls) / len(calls) / max(costs)


def prices(choice: PrecisionChoice, costs: list[float]) -> list[float]:
    return [costs[i] for i in choice.calls]


@settings(deadline=None)
@given(cases(), st.floats(0.01, 1))
def test_it_is_the_most_careful_threshold_within_the_budget(case: Case, budget: float) -> None:
    margins, costs = case
    taus = sorted({*margins.ravel(), *(margins.ravel() + 1e-3), 0.0, math.inf})
    kept = [tau for tau in taus if mean_cost(by_hand(margins, costs, tau), costs) <= budget * (1 + 1e-9)]
    if not kept:
        with pytest.raises(InputError, match="cannot be met"):
            by_margin(margins, costs, budget)
        return
    choice = by_margin(margins, costs, budget)

    assert choice.mean_cost <= budget * (1 + 1e-9)
    best = by_hand(margins, costs, max(kept))
    assert prices(choice, costs) == [costs[i] for i in best]
    assert [margins[i, c] for c, i in enumerate(choice.calls)] >= [0] * len(best)
    assert choice.mean_cost == pytest.approx(mean_cost(best, costs), abs=1e-12)


@settings(deadline=None)
@given(cases(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_more_budget_is_never_less_careful(case: Case, one: float, other: float) -> None:
    margins, costs = case
    low, high = sorted((one, other))
    if low < min(costs) / max(costs):
        return
    small, large = by_margin(margins, costs, low), by_margin(margins, costs, high)

    assert small.threshold is not None and large.threshold is not None
    assert small.threshold <= large.threshold
    assert small.mean_cost <= large.mean_cost + 1e-12
    assert all(a <= b for a, b in zip(prices(small, costs), prices(large, costs), strict=True))


@settings(deadline=None)
@given(cases())
def test_without_a_budget_it_is_the_papers_threshold(case: Case) -> None:
    margins, costs = case
    choice = by_margin(margins, costs)

    assert choice.threshold == 1.0
    assert prices(choice, costs) == [costs[i] for i in by_hand(margins, costs, 1.0)]


def test_a_call_where_nothing_suffices_takes_the_least_bad() -> None:
    margins = np.array([[0.1, 5.0], [0.4, 9.0], [0.3, 9.0]])
    assert by_margin(margins, [0.5, 0.7, 1.0]).calls == (1, 0)


def test_a_planted_lower_margin_changes_the_choice() -> None:
    margins = np.array([[2.0, 2.0, 2.0], [9.0, 9.0, 9.0]])
    assert by_margin(margins, [0.5, 1.0]).calls == (0, 0, 0)
    margins[0, 1] *= 0.4
    assert by_margin(margins, [0.5, 1.0]).calls == (0, 1, 0)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, math.nan])
def test_impossible_budgets(budget: float) -> None:
    with pytest.raises(InputError, match="not possible"):
        by_margin(np.ones((2, 3)), [0.5, 1.0], budget)


def test_a_budget_that_cannot_be_met_says_what_can() -> None:
    with pytest.raises(InputError, match=r"costs 0\.3333 of the dearest[\s\S]*allow 0\.3334 or more"):
        by_margin(np.ones((2, 3)), [1.0, 3.0], 0.2)
    assert by_margin(np.ones((2, 3)), [1.0, 3.0], 1 / 3).calls == (0, 0, 0)


@pytest.mark.parametrize("costs", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf], []])
def test_costs_are_positive_numbers(costs: list[float]) -> None:
    with pytest.raises(InputError, match="positive"):
        by_margin(np.ones((2, 3)), costs, 0.5)


@pytest.mark.parametrize("margins", [np.ones((3, 2)), np.ones((2, 0)), np.full((2, 2), math.nan)])
def test_margins_fit_the_precisions(margins: Doubles) -> None:
    with pytest.raises(InputError, match="margins"):
        by_margin(margins, [1.0, 2.0], 0.5)


@pytest.mark.parametrize(
    ("calls", "fraction", "count"), [(10, 0.2, 2), (10, 0.25, 3), (10, 0.01, 1), (5, 0.2, 1), (51, 0.2, 11)]
)
def test_relaxing_takes_the_end_or_the_beginning(calls: int, fraction: float, count: int) -> None:
    last = relaxed(calls, [0.5, 1.0], 1, fraction)
    first = relaxed(calls, [0.5, 1.0], 1, fraction, first=True)

    assert last.calls == (0,) * (calls - count) + (1,) * count
    assert first.calls == last.calls[::-1]
    assert last.mean_cost == first.mean_cost == pytest.approx((count + 0.5 * (calls - count)) / calls)
    assert last.threshold is None


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, math.nan])
def test_impossible_fractions(fraction: float) -> None:
    with pytest.raises(InputError, match="relaxing"):
        relaxed(4, [0.5, 1.0], 1, fraction)


def test_relaxing_needs_a_cheaper_precision() -> None:
    with pytest.raises(InputError, match="nothing to relax"):
        relaxed(4, [0.5, 1.0], 0, 0.5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_weights_are_what_a_planted_error_does(prediction: str) -> None:
    """With a network that ignores x, the image moves by exactly the weight."""
    config = {"beta_schedule": "linear", "prediction_type": prediction, "clip_sample": False}
    schedule = Schedule.from_config(config)
    deployment = Deployment.of(schedule, "ddim", 5)
    x = samplers.initial_noise(0, (1, 1, 4, 4))

    def net(x: npt.NDArray[np.float32], t: float) -> npt.NDArray[np.float32]:
        alpha, sigma = schedule.levels(t)
        # Raw output such that the noise it stands for is a constant, whatever x is.
        share_x, share_out = noise_of(schedule, alpha, sigma)
        return np.asarray(-share_x * x / share_out, np.float32)

    weights = picture_weights(deployment.solver(schedule).steps, schedule)
    plain = samplers.sample(net, x, schedule, deployment)
    for call in range(5):
        nets = [net] * 5
        nets[call] = lambda x, t: net(x, t) + np.float32(1e-2)
        moved = samplers.sample(nets, x, schedule, deployment) - plain
        np.testing.assert_allclose(np.mean(moved.astype(float) ** 2), weights[call] * 1e-4, rtol=0.02)


def test_brute_force_over_all_assignments_never_has_a_better_worst_margin() -> None:
    """The purpose of one threshold: within the budget no other choice has a larger smallest margin."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        margins = np.sort(rng.exponential(size=(2, 5)), axis=0)
        costs, budget = [0.4, 1.0], 0.7
        choice = by_margin(margins, costs, budget)
        worst = min(margins[i, c] for c, i in enumerate(choice.calls))
        others = [a for a in itertools.product(range(2), repeat=5) if mean_cost(list(a), costs) <= budget]
        assert worst == max(min(margins[i, c] for c, i in enumerate(a)) for a in others)
