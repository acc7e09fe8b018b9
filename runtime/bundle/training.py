"""What a pass that trains did to each layer or block, as the manifest has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .json_fields import Fields


@dataclass(frozen=True)
class TrainedUnit:
    """A layer or block that a pass trained. Errors are relative mean squares of its outputs.

    start    rounded, before the fit
    soft     behind the fit, before its weights were rounded
    hard     rounded, behind the fit
    kept     whether the graph has what was learned: `hard` is smaller than `start`, and images did not reject it
    losses   the curve of the fit: means of successive iterations, relative to the start, without a regularizer
    """

    unit: str
    by: str
    start: float
    soft: float
    hard: float
    losses: tuple[float, ...]
    kept: bool

    def to_json(self) -> dict[str, Any]:
        return {"unit": self.unit, "pass": self.by, "start": self.start, "soft": self.soft, "hard": self.hard} | {
            "losses": list(self.losses),
            "kept": self.kept,
        }

    @classmethod
    def from_json(cls, fields: Fields) -> TrainedUnit:
        errors = (fields.number("start"), fields.number("soft"), fields.number("hard"))
        return cls(fields.text("unit"), fields.text("pass"), *errors, fields.each_number("losses"), fields.flag("kept"))
