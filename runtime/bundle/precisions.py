"""Several precisions of one network in one bundle, and which of them each network call uses.

Quantization costs most where the schedule leaves little noise in x (PTQD, arXiv 2305.10657), or at one end of the
trajectory (PCR), so calls need different precisions. `mezzotint mix` makes the choice; here it is a name for each call
of the deployment. It belongs to the position of the call, not to its timestep: Heun calls twice at one timestep, and
the two may differ. The sampling loop gets one denoiser for each call.

Other deployments have other calls. Each takes the precision of the fitted call with the nearest timestep, among those
of the same stage of a step if there are any; of two equally near ones the later, whose x has less noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import InputError
from ..sampling.steps import Step
from .json_fields import Fields
from .manifest_entries import RecipeEntry


@dataclass(frozen=True)
class PrecisionEntry:
    """One precision of a mixed bundle. `compiled` is the digest of the bundle that it was; `cost` is relative to the
    dearest precision's; `bytes` are its own, `bytes_alone` those before constants were shared."""

    file: str
    recipe: RecipeEntry
    compiled: str
    calls: int
    cost: float
    bytes: int
    bytes_alone: int
    integer_kernels: int
    float_kernels: int
    islands: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "recipe": self.recipe.to_json(),
            "compiled": self.compiled,
            "calls": self.calls,
            "cost": self.cost,
            "bytes": self.bytes,
            "bytes_alone": self.bytes_alone,
            "integer_kernels": self.integer_kernels,
            "float_kernels": self.float_kernels,
            "islands": dict(self.islands),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> PrecisionEntry:
        return cls(
            fields.text("file"),
            fields.one("recipe", RecipeEntry.from_json),
            fields.text("compiled"),
            fields.integer("calls"),
            fields.number("cost"),
            fields.integer("bytes"),
            fields.integer("bytes_alone"),
            fields.integer("integer_kernels"),
            fields.integer("float_kernels"),
            fields.texts("islands"),
        )


@dataclass(frozen=True)
class Mixture:
    """The precisions of a mixed bundle, the name of one for each network call, and how the choice was made.

    `choice` is open plain data for display.
    """

    precisions: Mapping[str, PrecisionEntry]
    calls: tuple[str, ...]
    shared_bytes: int
    choice: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Four keys of the manifest itself."""
        return {
            "precisions": {name: entry.to_json() for name, entry in self.precisions.items()},
            "precision_of_call": list(self.calls),
            "shared_bytes": self.shared_bytes,
            "precision_choice": dict(self.choice),
        }

    @classmethod
    def from_json(cls, fields: Fields) -> Mixture | None:
        """Read the manifest's own keys; None for a bundle of one precision."""
        if "precisions" not in fields:
            return None
        return cls(
            fields.named("precisions", PrecisionEntry.from_json),
            fields.each_text("precision_of_call"),
            fields.integer("shared_bytes"),
            fields.table("precision_choice"),
        )


@dataclass(frozen=True)
class Precisions:
    """`files` maps names to files of the bundle; `calls` and `steps` have an entry for each call of the deployment."""

    files: Mapping[str, str]
    calls: tuple[str, ...]
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if len(self.calls) != len(self.steps):
            raise InputError(f"precisions of {len(self.calls)} calls, the deployment has {len(self.steps)}")
        if unknown := [name for name in self.calls if name not in self.files]:
            raise InputError(f"a call uses the precision {unknown[0]!r}, which is not among {sorted(self.files)}")

    @classmethod
    def of_mixture(cls, mixture: Mixture, steps: Sequence[Step]) -> Precisions:
        """Return the precisions that a manifest lists. Raises InputError where they do not fit the steps."""
        files = {name: entry.file for name, entry in mixture.precisions.items()}
        return cls(files, mixture.calls, tuple(steps))

    def nearest(self, steps: Sequence[Step]) -> tuple[int, ...]:
        """Return for each call of another deployment the fitted call that it corresponds to."""
        if [step.timestep for step in steps] == [step.timestep for step in self.steps]:
            return tuple(range(len(self.steps)))
        return tuple(self._nearest(step) for step in steps)

    def of(self, steps: Sequence[Step]) -> tuple[str, ...]:
        """Return the name of the precision for each call of a deployment."""
        return tuple(self.calls[call] for call in self.nearest(steps))

    def _nearest(self, step: Step) -> int:
        known = [call for call, mine in enumerate(self.steps) if mine.stage == step.stage] or range(len(self.steps))
        return min(known, key=lambda call: (abs(self.steps[call].timestep - step.timestep), -call))


def spans(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return successive calls of one precision as (first, last, name), for display."""
    runs = []
    for name, run in groupby(enumerate(names), key=lambda pair: pair[1]):
        calls = [call for call, _ in run]
        runs.append((calls[0], calls[-1], name))
    return runs
