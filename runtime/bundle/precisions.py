"""Several precisions of one network in one bundle, and which of them each network call uses.

Quantization hurts most where the schedule leaves little noise in x (PTQD, arXiv 2305.10657), or at one end of the
trajectory (PCR), so calls differ in what they need. The choice is made when bundles are mixed; here it is a name for
each call of the deployment. It belongs to the call's position, not to its timestep: Heun calls twice at one timestep,
and the two may differ. Nothing counts calls while sampling: the loop is handed one denoiser for each call.

Other ways of sampling have other calls. Each then takes the precision of the fitted call whose timestep is nearest, of
the same stage of a step where there is one; of two equally near the later one, whose x has less noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import InputError
from ..sampling.steps import Step


@dataclass(frozen=True)
class Precisions:
    """`files` maps names to files of the bundle; `calls` has a name for each call of the deployment; `steps` these."""

    files: Mapping[str, str]
    calls: tuple[str, ...]
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        if len(self.calls) != len(self.steps):
            raise InputError(f"precisions of {len(self.calls)} calls, the deployment has {len(self.steps)}")
        if unknown := [name for name in self.calls if name not in self.files]:
            raise InputError(f"a call uses the precision {unknown[0]!r}, which is not among {sorted(self.files)}")

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any], steps: Sequence[Step]) -> Precisions | None:
        """What a manifest says, or None where the bundle has one precision only. Raises InputError, KeyError."""
        if "precisions" not in manifest:
            return None
        if not isinstance(manifest["precisions"], Mapping):
            raise InputError("the manifest's precisions are not a table")
        files = {str(name): str(row["file"]) for name, row in manifest["precisions"].items()}
        if missing := sorted(set(files.values()) - set(manifest["files"])):
            raise InputError(f"the manifest does not list {missing[0]}")
        return cls(files, tuple(map(str, manifest["precision_of_call"])), tuple(steps))

    def nearest(self, steps: Sequence[Step]) -> tuple[int, ...]:
        """For each call of another way of sampling the fitted call that stands for it."""
        if [step.timestep for step in steps] == [step.timestep for step in self.steps]:
            return tuple(range(len(self.steps)))
        return tuple(self._nearest(step) for step in steps)

    def of(self, steps: Sequence[Step]) -> tuple[str, ...]:
        """The name for each call of a way of sampling."""
        return tuple(self.calls[call] for call in self.nearest(steps))

    def _nearest(self, step: Step) -> int:
        known = [call for call, mine in enumerate(self.steps) if mine.stage == step.stage] or range(len(self.steps))
        return min(known, key=lambda call: (abs(self.steps[call].timestep - step.timestep), -call))


def spans(names: Sequence[str]) -> list[tuple[int, int, str]]:
    """Calls that follow each other in one precision, as (first, last, name): for readers."""
    found = []
    for name, run in groupby(enumerate(names), key=lambda pair: pair[1]):
        calls = [call for call, _ in run]
        found.append((calls[0], calls[-1], name))
    return found
