"""The rows of a mixed correction belong to the precision that runs at each call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mezzotint.compiler.mixing.noise import CORRECTION_TABLES, NoiseTables, mixed_correction, mixed_report
from mezzotint.runtime.errors import InterpolatedCorrection
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule

SCHEDULE = Schedule.named("ddpm-linear")
DEPLOYMENT = Deployment.of(SCHEDULE, "ddim", 4, 1.0)
STEPS = DEPLOYMENT.solver(SCHEDULE).steps


def correction(offset: float, form: str = "regression") -> Correction:
    column = np.asarray(0.01 * (offset + np.arange(4)), np.float64)
    tables: dict[str, Any] = {name: i * column for i, name in enumerate(CORRECTION_TABLES, 1)}
    tables |= {"scale": 1 + column, "shift": np.stack([column, -column], axis=1)}
    return Correction(DEPLOYMENT, "epsilon", form, np.zeros(4, np.int64), **tables)


def row(call: int, name: str) -> dict[str, Any]:
    figures = dict.fromkeys(("normal_p", "skewness", "kurtosis", "correlation", "magnitude_correlation"), 0.5)
    kept = {"kept": "both", "sqnr_db": {"none": 20.0, "slope": 21.0, "bias": 22.0, "both": 23.0 + call}}
    facts = {"slope": 0.1, "bias": 0.1, "spread": 0.1, "variance_kept": True, "variance_error": [0.2, 0.1]}
    noise = {"timestep": STEPS[call].timestep, "stage": 0, "sigma": STEPS[call].sigma, "noise": 0.1, "clamped": False}
    return {**figures, **kept, **facts, **noise, "note": name}


def known(offset: float, form: str = "regression", *, gate: bool = True) -> NoiseTables:
    rows = [row(call, str(offset)) for call in range(4)]
    return NoiseTables(correction(offset, form), {"form": form, "gate": gate, "calls": rows}, True)


FLOAT = NoiseTables(None, None, False)
PLAIN = NoiseTables(None, None, True)


def test_each_call_has_the_row_of_its_precision() -> None:
    tables = {"low": known(1), "high": known(7), "float": FLOAT}
    calls = ["low", "high", "low", "float"]
    found, note = mixed_correction(tables, calls, DEPLOYMENT, STEPS)

    assert found is not None
    assert note == "regression, the rows of each call from low, high"
    for name in CORRECTION_TABLES:
        low, high, got = (getattr(c, name) for c in (tables["low"].correction, tables["high"].correction, found))
        np.testing.assert_array_equal(got[:3], [low[0], high[1], low[2]])
        np.testing.assert_array_equal(got[3], np.full_like(got[3], 1 if name == "scale" else 0))
    output = np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(found.apply(output, 3), output)
    assert {"scale", "shift", "excess", "spread"} <= set(CORRECTION_TABLES)
    assert found.noise(STEPS)[3] == STEPS[3].sigma


@pytest.mark.parametrize(
    ("tables", "calls", "why"),
    [
        ({"a": PLAIN, "b": FLOAT}, "aabb", "no precision has one"),
        ({"a": known(1), "b": PLAIN}, "aabb", "b was compiled without one"),
        ({"a": known(1), "b": known(2, "ptqd")}, "aabb", "a: regression, b: ptqd"),
        ({"a": FLOAT, "b": FLOAT}, "aabb", "no precision has one"),
    ],
)
def test_there_is_none_where_it_would_be_another(tables: dict[str, NoiseTables], calls: str, why: str) -> None:
    found, note = mixed_correction(tables, list(calls), DEPLOYMENT, STEPS)
    assert found is None
    assert note.startswith("none: ") and why in note


def test_what_no_call_uses_does_not_count() -> None:
    found, _ = mixed_correction({"a": known(1), "b": PLAIN}, list("aaaa"), DEPLOYMENT, STEPS)
    assert found is not None


def test_the_report_says_the_precision_of_each_row() -> None:
    tables = {"low": known(1), "high": known(7), "float": FLOAT}
    found = mixed_report(tables, ["low", "high", "low", "float"], STEPS)

    assert found is not None
    assert [r["precision"] for r in found["calls"]] == ["low", "high", "low", "float"]
    assert [r.get("note") for r in found["calls"]] == ["1", "7", "1", None]
    assert found["calls"][3]["noise"] == STEPS[3].sigma
    assert set(found["calls"][3]) - {"precision"} == set(found["calls"][0]) - {"precision"}
    assert found["shares"]["none"] == 20.0 and found["shares"]["kept"] == 24.0
    assert "regression" in found["summary"] and found["gate"] is True


def test_a_report_that_somebody_lacks_is_left_out() -> None:
    bare = replace(known(7), report=None)
    assert mixed_report({"a": known(1), "b": bare}, list("aabb"), STEPS) is None
    assert mixed_report({"a": FLOAT, "b": FLOAT}, list("aabb"), STEPS) is None


def test_other_steps_take_whole_rows() -> None:
    """Between calls that run different networks nothing may be interpolated."""
    found, _ = mixed_correction({"a": known(1), "b": known(7)}, list("abab"), DEPLOYMENT, STEPS)
    assert found is not None
    plan = Deployment.of(SCHEDULE, "ddim", 8, 1.0)
    with pytest.warns(InterpolatedCorrection, match="nearest"):
        picked = found.picked(plan, plan.solver(SCHEDULE).steps, (0, 0, 1, 1, 2, 2, 3, 3))

    for name in CORRECTION_TABLES:
        np.testing.assert_array_equal(getattr(picked, name), np.repeat(getattr(found, name), 2, axis=0))
    assert found.picked(DEPLOYMENT, STEPS, (0, 0, 0, 0)) is found, "its own calls keep their own rows"
    with pytest.raises(Exception, match="not valid here"):
        found.picked(Deployment.of(SCHEDULE, "ddim", 8, 0.5), STEPS, (0,) * 8)
