"""The bars of a benchmark, and what was measured beside them."""

from __future__ import annotations

import json
from typing import Any


class Bars:
    """Collects rows of (what, measured, bar) and remembers whether one was missed."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, value: float, bar: str, good: bool) -> None:
        self.rows.append({"what": what, "measured": round(value, 4), "bar": bar, "reached": good})
        print(json.dumps(self.rows[-1]), flush=True)

    @property
    def reached(self) -> bool:
        return all(row["reached"] for row in self.rows)
