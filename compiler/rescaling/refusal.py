"""The answer of a search that finds no legal rewrite."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Refusal:
    """Returned in place of a result. `reason` is a plain sentence for notes and reports."""

    reason: str

    def __str__(self) -> str:
        return self.reason
