"""A LoRA in the manifest's `source`: what was fused into the float weights before the export."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .json_fields import Fields


@dataclass(frozen=True)
class LoraEntry:
    """The file of a LoRA, its weight, and the number of layers that it changed."""

    name: str
    sha256: str
    weight: float
    layers: int

    def __str__(self) -> str:
        return f"{self.name} with weight {self.weight:g} in {self.layers} layers (SHA-256 {self.sha256[:12]})"

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "sha256": self.sha256, "weight": self.weight, "layers": self.layers}

    @classmethod
    def from_json(cls, fields: Fields) -> LoraEntry:
        return cls(fields.text("name"), fields.text("sha256"), fields.parsed("weight", _finite), fields.count("layers"))


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("a weight is a finite number")
    return float(value)
