"""Run the battery of hostile inputs and print what came of them: `python -m tools.battery [TIMES]`.

TIMES multiplies the generated inputs of each kind, with other seeds. The exit code is that of the tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("tests/whole/test_battery_files.py", "tests/whole/test_battery_texts.py")
SLOW_SECONDS = 10.0


def summary(lines: list[str]) -> dict[str, object]:
    """Return the counts of outcomes, one JSON object a line."""
    outcomes = [json.loads(line) for line in lines]
    problems = Counter(outcome["problem"].partition(":")[0] for outcome in outcomes if outcome["problem"])
    return {
        "inputs": len(outcomes),
        "right results": sum(outcome["code"] == 0 for outcome in outcomes),
        "refused": sum(outcome["code"] == 2 for outcome in outcomes),
        "tracebacks": sum("traceback" in o["problem"] or "escaped" in o["problem"] for o in outcomes),
        "faults of Mezzotint": sum("not ours" in outcome["problem"] for outcome in outcomes),
        "files outside the target": sum("outside" in outcome["problem"] for outcome in outcomes),
        "hangs": sum(outcome["seconds"] > SLOW_SECONDS and outcome["code"] != 0 for outcome in outcomes),
        "longest refusal, s": round(max((o["seconds"] for o in outcomes if o["code"] == 2), default=0.0), 2),
        "most memory of a refusal, MB": max((o["memory"] for o in outcomes if o["code"] == 2), default=0) // 10**6,
        "commands": dict(Counter(_word(outcome["command"]) for outcome in outcomes).most_common()),
        "problems": dict(problems),
    }


def _word(command: str) -> str:
    return command if command.isascii() and command.isalpha() and len(command) < 20 else "no command"


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "outcomes"
        environment = {**os.environ, "MEZZOTINT_BATTERY": (arguments or ["1"])[0], "MEZZOTINT_BATTERY_LOG": str(log)}
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *FILES, *arguments[1:]], cwd=ROOT, env=environment, check=False
        )
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    for name, value in summary(lines).items():
        print(f"{name}: {value}")
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
