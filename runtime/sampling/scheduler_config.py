"""Typed values of a diffusers configuration; errors name the key and the place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import ScheduleError


class ConfigReader:
    """`default` replaces a key that is missing or null."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = config
        self.where = where

    def refuse(self, what: str, hint: str | None = None) -> ScheduleError:
        return ScheduleError(what, where=self.where, hint=hint)

    def get(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def choice(self, key: str, default: str, allowed: Sequence[str]) -> str:
        value = self.get(key, default)
        if value not in allowed:
            raise self.refuse(f"unknown {key} {value!r}", f"supported: {', '.join(allowed)}")
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r}, not true or false")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
            raise self.refuse(f"{key} is {value!r}, not a number above 0")
        return float(value)

    def integer(self, key: str, default: int, smallest: int) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise self.refuse(f"{key} is {value!r}, not an integer of at least {smallest}")
        return value

    def must_be(self, key: str, allowed: Any, default: Any, who: str) -> None:
        """Raise ScheduleError for an option that the samplers do not implement."""
        value = self.get(key, default)
        if value != allowed:
            raise self.refuse(f"{who} with {key} {value!r} is not supported", f"set {key} to {allowed!r}")
