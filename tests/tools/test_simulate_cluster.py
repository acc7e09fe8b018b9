"""tools/simulate_cluster.py: bounds that a simulated run cannot pass, and what losses do to it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.simulate_cluster import Scenario, simulate

CASE = Scenario(2000, 4, 10, 2, image=10.0, arrival=0.0, opening=0.0, weights=0.0, spread=0.0, slow=0.0)


def test_without_faults_it_takes_as_long_as_the_work() -> None:
    found = simulate(CASE)
    assert found.seconds == pytest.approx(2000 * 10 / 20, rel=0.01)
    assert found.useful > 0.99 and found.repeated == found.given_up == 0
    assert found.core_hours == pytest.approx(found.seconds * 20 * 2 / 3600)


def test_a_driver_that_is_too_slow_is_what_the_run_waits_for() -> None:
    found = simulate(replace(CASE, dispatch=4.0))
    assert found.seconds >= 500 * 4.0 and found.driver > 0.95


def test_faults_cost_time_and_are_repeated() -> None:
    quiet, slow = simulate(CASE), simulate(replace(CASE, slow=0.3))
    lost, crashed = simulate(replace(CASE, loss=2.0, arrival=60.0)), simulate(replace(CASE, crash=0.05))
    assert min(slow.seconds, lost.seconds, crashed.seconds) > quiet.seconds
    assert lost.repeated > 0 and lost.given_up == 0 and crashed.repeated > 0
    assert simulate(replace(CASE, crash=0.7)).given_up > 100
    assert simulate(replace(CASE, loss=2.0, arrival=60.0)) == lost
