"""The counts of a battery."""

from __future__ import annotations

import json

from tools.battery import summary


def test_problems_are_counted() -> None:
    fine = {"command": "inspect", "code": 2, "problem": "", "seconds": 1.0, "memory": 5_000_000}
    outcomes = [
        fine,
        {**fine, "command": "\x1b", "code": 0, "seconds": 30.0},
        {**fine, "problem": "a traceback in the output: x"},
        {**fine, "code": None, "seconds": 60.0, "problem": "it hangs: 60 s and no end"},
        {**fine, "problem": "files outside the target changed: x"},
    ]
    counts = summary([json.dumps(outcome) for outcome in outcomes])
    assert (counts["inputs"], counts["refused"], counts["right results"]) == (5, 3, 1)
    assert (counts["tracebacks"], counts["hangs"], counts["files outside the target"]) == (1, 1, 1)
    assert counts["commands"] == {"inspect": 4, "no command": 1}
    assert sum(counts["problems"].values()) == 3  # type: ignore[attr-defined]
