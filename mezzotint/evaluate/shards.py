"""The pairs of images that `mezzotint eval` has sampled, shard by shard on disk, so that a stopped run can continue.

    FOLDER/sampling.json               the settings that the images depend on (shards/run.py)
    FOLDER/pairs_00000.safetensors     float and quantized images, and the sums of squares of each step and image
    FOLDER/eval.json, eval.md          the result

FOLDER may be a URL (shards/objects.py).

A shard is written to a temporary file and moved into place. It holds the digest of its run and a hash of its numbers:
a shard that is truncated, changed, or of another run is sampled again. The same pairs give the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.json_text import parse_json
from mezzotint.runtime.progress import CallProgress
from mezzotint.runtime.sampling.guidance import Conditions, rows_in_turn
from mezzotint.runtime.signature import Images

from ..bench.pairs import parallel_run
from ..bench.reference import ReferenceModel
from ..shards.run import Run
from .metrics import PictureSQNR

SHARD_SIZE = 64
PAIR_FORMAT = "pairs"
_KEY = "mezzotint.pairs"
_NAMES = ("exact", "quantized", "signal", "noise")


@dataclass(frozen=True)
class ImagePairs:
    """Images of the same noise, float32 `[m, C, H, W]`; sums of squares of epsilon and of its error, `[steps, m]`."""

    exact: Images
    quantized: Images
    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PairSampler:
    """All settings of the sampling of pairs, except their numbers."""

    bundle: Bundle
    reference: ReferenceModel
    seed: int
    batch: int
    threads: int | None
    correction: bool | None
    conditions: Conditions
    unconditional: Conditions

    def sample(self, first: int, stop: int, progress: CallProgress) -> ImagePairs:
        """Return pairs first .. stop - 1 of the seed. `progress` receives (network calls done, all calls)."""
        conditions, unconditional = (
            rows_in_turn(arrays, first, stop - first) for arrays in (self.conditions, self.unconditional)
        )
        n, calls = stop - first, len(self.bundle.deployment.calls)
        total = 2 * calls * -(-n // self.batch)
        sums = PictureSQNR()
        exact, _ = parallel_run(
            self.reference.network,
            {"": self.bundle.denoisers(threads=self.threads)},
            self.bundle,
            n,
            seed=self.seed,
            batch=self.batch,
            conditions=conditions,
            unconditional=unconditional,
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
            conditions=conditions,
            unconditional=unconditional,
            threads=self.threads,
            progress=lambda done, of: progress(total - of + done, total),
        )
        return ImagePairs(exact, quantized, *sums.sums())


class PairShard:
    """The file of pairs first .. stop - 1 of a run."""

    def __init__(self, run: Run, number: int) -> None:
        size = run.settings["shard_size"]
        self.first, self.stop = number * size, min((number + 1) * size, run.settings["pictures"])
        self.name = f"pairs_{number:05d}.safetensors"
        self._run = run

    def write(self, pairs: ImagePairs) -> None:
        """Write the file. Raises OutputError."""
        self.store(self.encode(pairs))

    def encode(self, pairs: ImagePairs) -> bytes:
        """Return the file of these pairs."""
        tensors = {name: np.ascontiguousarray(getattr(pairs, name)) for name in _NAMES}
        facts = {"run": self._run.digest, "first": self.first, "sha256": _hash(tensors)}
        return save(tensors, {_KEY: json.dumps(facts)})

    def store(self, file: bytes) -> None:
        """Write a file of `encode` to its place. Raises OutputError."""
        self._run.store(self.name, file)

    def load(self) -> ImagePairs | None:
        """Return the pairs, None where the file is missing, damaged, or of another run."""
        try:
            with self._run.fetched(self.name) as path, safe_open(path, framework="numpy") as file:
                facts = parse_json((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in _NAMES}
            expected = {"run": self._run.digest, "first": self.first, "sha256": _hash(tensors)}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return ImagePairs(**tensors) if facts == expected else None


def _hash(tensors: dict[str, npt.NDArray[Any]]) -> str:
    digest = sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype.str} {tensor.shape}".encode() + tensor.tobytes())
    return digest.hexdigest()
