"""A cache of statistics: calibration takes most of the time of a compilation, and many compilations share it.

An entry is the folder `stats-<key>` of the cache, with `stats.json` and the arrays in safetensors. The key is a digest
of everything that the statistics depend on: the graph and its weights, the schedule and the calls of the deployment,
the samples and their conditions, the options of the pass, the version of onnxruntime. An entry is written to a
temporary folder and then renamed, so that a killed compilation leaves no partial entry. Entries never change: delete
folders to free space.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.session import running_version

from ..core import snapshot
from ..core.pipeline import Context
from ..core.program import Program
from ..core.stats import Stats
from ..errors import StatsError
from ..graph import nodes as graph
from ..graph import weight_store as store

STATS_FILE = "stats.json"


def measured_once(
    program: Program, context: Context, options: Mapping[str, Any], measure: Callable[[], Stats]
) -> tuple[Stats, bool]:
    """Return (statistics, whether they came from the cache). Without an entry, measure and store one.

    Raises StatsError for an entry that cannot be read.
    """
    if context.cache is None:
        return measure(), False
    entry = context.cache / f"stats-{_key(program, context, options)}"
    if entry.exists():
        try:
            return snapshot.load_stats(json.loads((entry / STATS_FILE).read_text(encoding="utf-8")), entry), True
        except (OSError, ValueError, KeyError) as error:
            raise StatsError(
                f"statistics in the cache cannot be read: {error}", where=str(entry), hint="delete this folder"
            ) from error
    stats = measure()
    _keep(stats, entry)
    return stats, False


def _keep(stats: Stats, entry: Path) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        (partial / STATS_FILE).write_text(
            json.dumps(snapshot.save_stats(stats, partial)), encoding="utf-8", newline="\n"
        )
        if not entry.exists():  # another process may have measured the same meanwhile
            partial.rename(entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _key(program: Program, context: Context, options: Mapping[str, Any]) -> str:
    home = snapshot.home_of(program.model)
    weights = None if home is None else file_sha256(home / store.WEIGHTS)
    facts = {
        "graph": graph.digest(program.model),
        "weights": weights,
        "signature": program.signature.to_json(),
        "schedule": dict(program.schedule.config),
        "deployment": program.deployment.to_json(),
        "shape": list(program.shape),
        "allocation": list(program.allocation),
        "calibration": [context.samples, context.batch, context.seed],
        "options": dict(options),
        "onnxruntime": running_version(),
    }
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part in (context.conditions, context.unconditional):
        for name, rows in sorted(part.items()):
            sha.update(f"{name}{rows.dtype}{rows.shape}".encode())
            sha.update(np.ascontiguousarray(rows).tobytes())
    return sha.hexdigest()[:32]
