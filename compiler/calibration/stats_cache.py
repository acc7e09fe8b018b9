"""A cache of statistics: calibration takes most of the time of a compilation, and many compilations share it.

An entry is the folder `stats-<key>` of the cache, with `stats.json` and the arrays in safetensors. The key is a digest
of everything that the statistics depend on: the graph and its weights, the schedule and the calls of the deployment,
the samples and their conditions, the options of the pass, the version of onnxruntime and its threads. So a compilation
that takes its statistics from the cache writes the same bundle as one that measures them. An entry is written to a
hidden folder and then moved, so that a killed compilation leaves no partial entry. `stats.json` has the hash of the
arrays and of itself: a damaged entry is refused. Entries never change: delete folders to free space.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.session import running_version

from ..core import snapshot
from ..core.pipeline import Context
from ..core.program import Program
from ..core.stats import Stats
from ..errors import StatsError
from ..graph import nodes as graph
from ..graph import weight_store as store
from ..moves import move_new
from ..stages import partial_folder

STATS_FILE = "stats.json"
CACHE_LAYOUT = 2
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, SafetensorError, StatsError)


def measured_once(
    program: Program, context: Context, options: Mapping[str, Any], measure: Callable[[], Stats]
) -> tuple[Stats, bool]:
    """Return (statistics, whether they came from the cache). Without an entry, measure and store one.

    Raises StatsError for an entry that cannot be read, OutputError for a cache that cannot be written.
    """
    if context.cache is None:
        return measure(), False
    entry = context.cache / f"stats-{_key(program, context, options)}"
    if entry.exists():
        try:
            return _load(entry), True
        except _UNREADABLE as error:
            raise StatsError(
                f"statistics in the cache cannot be read: {error}", where=str(entry), hint="delete this folder"
            ) from error
    stats = measure()
    _keep(stats, entry.absolute())
    return stats, False


def _keep(stats: Stats, entry: Path) -> None:
    with partial_folder(entry) as folder:
        written = folder / "entry"
        written.mkdir()
        data = snapshot.save_stats(stats, written)
        facts = {"layout": CACHE_LAYOUT, "arrays": file_sha256(written / snapshot.STATS_ARRAYS), "stats": data}
        text = json.dumps({**facts, "sha256": _hash(facts)})
        (written / STATS_FILE).write_text(text, encoding="utf-8", newline="\n")
        with suppress(FileExistsError):  # another process may have measured the same meanwhile
            move_new(written, entry)


def _load(entry: Path) -> Stats:
    facts = read_json(entry / STATS_FILE, "the statistics", StatsError)
    if facts.pop("sha256") != _hash(facts) or facts["arrays"] != file_sha256(entry / snapshot.STATS_ARRAYS):
        raise ValueError("they were changed after they were written")
    return snapshot.load_stats(facts["stats"], entry)


def _hash(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _key(program: Program, context: Context, options: Mapping[str, Any]) -> str:
    home = snapshot.home_of(program.model)
    weights = None if home is None else file_sha256(home / store.WEIGHTS)
    facts = {
        "layout": CACHE_LAYOUT,
        "graph": graph.digest(program.model),
        "weights": weights,
        "signature": program.signature.to_json(),
        "schedule": dict(program.schedule.config),
        "deployment": program.deployment.to_json(),
        "shape": list(program.shape),
        "allocation": list(program.allocation),
        "calibration": [context.samples, context.batch, context.seed],
        "options": dict(options),
        "onnxruntime": [running_version(), context.threads],
    }
    sha = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for part in (context.conditions, context.unconditional):
        for name, rows in sorted(part.items()):
            sha.update(f"{name}{rows.dtype}{rows.shape}".encode())
            sha.update(np.ascontiguousarray(rows).tobytes())
    return sha.hexdigest()[:32]
