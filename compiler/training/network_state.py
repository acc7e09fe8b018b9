"""The state of a fit of a whole network, and its copies in the cache: one for each check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save

from ..core.cache import Cache, EntryForm

CHECK = EntryForm("check", "the state of a training", layout=1)


class FitState:
    """The variables, what Adam remembers of them, and what the fit found so far.

    `iterations` is how many the fit has in all, `kept` the number of the check with the best images, and `memory` the
    tensors of restraints, which are written in place.
    """

    def __init__(
        self,
        variables: Sequence[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        iterations: int,
        memory: Mapping[str, torch.Tensor] = MappingProxyType({}),
    ) -> None:
        self._variables, self._optimizer, self._memory = variables, optimizer, memory
        self.iterations = iterations
        self.losses: list[float] = []
        self.image_db: list[float] = []
        self.kept = 0
        self._best: list[torch.Tensor] = []

    def judge(self, image_db: float) -> None:
        """Add the fidelity of the images of the variables as they are; they are the best if it is the highest."""
        if not self.image_db or image_db > max(self.image_db):
            self.kept, self._best = len(self.image_db), [v.detach().clone() for v in self._variables]
        self.image_db.append(image_db)

    @torch.no_grad()
    def use_best(self) -> None:
        """Give the variables the values that they had at the best check."""
        for variable, value in zip(self._variables, self._best, strict=True):
            variable.copy_(value)

    def to_json(self) -> dict[str, Any]:
        """Return all but the arrays."""
        return {"losses": self.losses, "image_db": self.image_db, "kept": self.kept, "iterations": self.iterations}

    def arrays(self) -> dict[str, torch.Tensor]:
        """Return the variables, the best ones, what Adam remembers, and what restraints do, on the CPU."""
        found = {f"variable.{i}": v.detach() for i, v in enumerate(self._variables)}
        found |= {f"best.{i}": v for i, v in enumerate(self._best)}
        for i, variable in enumerate(self._variables):
            remembered = self._optimizer.state.get(variable, {})
            found |= {f"adam.{i}.{name}": value for name, value in remembered.items()}
        found |= {f"memory.{name}": tensor for name, tensor in self._memory.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    @torch.no_grad()
    def restore(self, data: dict[str, Any], arrays: dict[str, torch.Tensor]) -> None:
        """Take over what `to_json` and `arrays` returned."""
        self.losses, self.image_db = list(data["losses"]), list(data["image_db"])
        self.kept, self.iterations = int(data["kept"]), int(data["iterations"])
        self._best = [arrays[f"best.{i}"] for i in range(len(self._variables))]
        for name, tensor in self._memory.items():
            tensor.copy_(arrays[f"memory.{name}"])
        for i, variable in enumerate(self._variables):
            variable.copy_(arrays[f"variable.{i}"])
            names = [key.rsplit(".", 1)[1] for key in arrays if key.startswith(f"adam.{i}.")]
            if names:
                found = {name: arrays[f"adam.{i}.{name}"] for name in names}
                self._optimizer.state[variable] = {  # Adam counts its steps on the CPU
                    name: array if name == "step" else array.to(variable.device) for name, array in found.items()
                }


class CheckCache:
    """The states of one fit at its checks, in a cache that compilations share, or nowhere.

    `key` is a digest of all that the fit depends on.
    """

    def __init__(self, cache: Cache | None, key: str, checks: int) -> None:
        self._cache, self._key, self._checks = cache, key, checks

    def keep(self, state: FitState) -> None:
        """Write the state at its last check."""
        if self._cache is None:
            return

        def write(folder: Path) -> dict[str, Any]:
            (folder / CHECK.arrays).write_bytes(save(state.arrays()))
            return state.to_json()

        self._cache.keep(CHECK, self._name(len(state.image_db) - 1), write)

    def restore(self, state: FitState) -> bool:
        """Take over the last state that is there; return whether there is one. Raise StatsError for a damaged one."""

        def read(data: dict[str, Any], folder: Path) -> bool:
            state.restore(data, load_file(folder / CHECK.arrays))
            return True

        if self._cache is None:
            return False
        return any(self._cache.load(CHECK, self._name(check), read) for check in range(self._checks, -1, -1))

    def _name(self, check: int) -> str:
        return f"check-{self._key}-{check}"
