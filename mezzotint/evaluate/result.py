"""The result of `mezzotint eval`, as it is kept in eval.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import read_json

JsonObject = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """A bundle compared with its float model. Fields are plain data; their order is that of the JSON.

    `key` has everything that the numbers depend on. A metric without a value has a `why`. `speed` and `memory` are None
    where they were not measured.
    """

    key: JsonObject
    bundle: JsonObject
    reference: JsonObject
    deployment: str
    pictures: int
    seed: int
    correction: bool
    features: JsonObject | None
    onnxruntime: str
    metrics: Mapping[str, JsonObject]
    eps_sqnr_db_per_step: Sequence[JsonObject]
    worst_step: int
    size: JsonObject
    kernels: JsonObject
    speed: JsonObject | None
    memory: JsonObject | None
    engine: JsonObject | None = None  # what the bundle's network really used; None in files of older versions

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def load(cls, file: Path) -> Evaluation | None:
        """Return the evaluation of a file, None where the file is missing or holds something else."""
        try:
            return cls(**read_json(file, "the evaluation", InputError))
        except (InputError, TypeError):
            return None
