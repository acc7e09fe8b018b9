"""The pairs of pictures that `mezzotint eval` has drawn, shard by shard on disk, so that it can go on after a stop.

    FOLDER/sampling.json               what the pictures depend on (shard_run.py)
    FOLDER/pairs_00000.safetensors     float and quantized pictures, and each step's sums of squares for each picture
    FOLDER/eval.json, eval.md          what was found

A shard is written beside its place and moved there, and holds the digest of its run and a hash of its own numbers: one
that is cut, changed, or of another run is drawn again. The same pairs make the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.samplers import Denoiser
from mezzotint.runtime.signature import Images

from ..bench.pairs import parallel_run
from ..io.files import replacing
from ..shards.run import Run
from .metrics import PictureSQNR

SHARD_SIZE = 64
FORMAT = "pairs"
_KEY = "mezzotint.pairs"
_NAMES = ("exact", "quantized", "signal", "noise")
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Pairs:
    """Pictures of one noise, float32 `[m, C, H, W]`; sums of squares of epsilon and of its error, `[steps, m]`."""

    exact: Images
    quantized: Images
    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Drawing:
    """How pairs are drawn: everything but which ones."""

    bundle: Bundle
    exact: Denoiser
    seed: int
    batch: int
    threads: int | None
    correction: bool | None
    conditions: Conditions
    unconditional: Conditions

    def draw(self, first: int, stop: int, progress: Report) -> Pairs:
        """Pairs first .. stop - 1 of the seed; `progress` hears of network calls."""
        given, other = _rows(self.conditions, first, stop), _rows(self.unconditional, first, stop)
        n, calls = stop - first, len(self.bundle.deployment.calls)
        total = 2 * calls * -(-n // self.batch)
        sums = PictureSQNR()
        exact, _ = parallel_run(
            self.exact,
            {"": self.bundle.denoisers(threads=self.threads)},
            self.bundle,
            n,
            seed=self.seed,
            batch=self.batch,
            conditions=given,
            unconditional=other,
            start=first,
            progress=lambda stage, done, of: progress(done, total),
            measure=lambda: sums,
        )
        quantized = self.bundle.sample(
            n,
            seed=self.seed,
            first=first,
            batch=self.batch,
            correction=self.correction,
            conditions=given,
            unconditional=other,
            threads=self.threads,
            progress=lambda done, of: progress(total - of + done, total),
        )
        return Pairs(exact, quantized, *sums.sums())


class PairShard:
    """Pairs first .. stop - 1 of a run, at their place in its folder."""

    def __init__(self, run: Run, number: int) -> None:
        size = run.settings["shard_size"]
        self.first, self.stop = number * size, min((number + 1) * size, run.settings["pictures"])
        self.path = run.folder / f"pairs_{number:05d}.safetensors"
        self._run = run

    def write(self, pairs: Pairs) -> None:
        """Raises OutputError."""
        tensors = {name: np.ascontiguousarray(getattr(pairs, name)) for name in _NAMES}
        facts = {"run": self._run.digest, "first": self.first, "sha256": _hash(tensors)}
        with replacing(self.path) as part:
            part.write_bytes(save(tensors, {_KEY: json.dumps(facts)}))

    def load(self) -> Pairs | None:
        """None where it is missing, damaged, or of another run. Half a file that a killed run left is removed."""
        for part in self.path.parent.glob(f".{self.path.name}.partial-*"):
            pid = part.name.rpartition("-")[2]
            if not pid.isdigit() or not psutil.pid_exists(int(pid)):
                part.unlink(missing_ok=True)
        try:
            with safe_open(self.path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in _NAMES}
            wanted = {"run": self._run.digest, "first": self.first, "sha256": _hash(tensors)}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return Pairs(**tensors) if facts == wanted else None


def _hash(tensors: dict[str, npt.NDArray[Any]]) -> str:
    digest = sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()


def _rows(arrays: Conditions, first: int, stop: int) -> dict[str, npt.NDArray[Any]]:
    return {name: array if len(array) == 1 else array[first:stop] for name, array in arrays.items()}
