"""A cache of statistics: calibration takes most of the time of a compilation, and many compilations share it.

An entry is the folder `stats-<key>` of the cache (compiler/core/cache.py). The key is a digest of everything
that the statistics depend on: the graph and its weights, the schedule and the calls of the deployment, the samples and
their conditions, the options of the pass, the version of onnxruntime and its threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..core import snapshot
from ..core.cache import EntryForm
from ..core.pipeline import Context
from ..core.program import Program
from ..core.program_key import program_key
from ..core.stats import Stats

STATS = EntryForm("stats", "the statistics", layout=2)


def measured_once(
    program: Program, context: Context, options: Mapping[str, Any], measure: Callable[[], Stats]
) -> tuple[Stats, bool]:
    """Return (statistics, whether they came from the cache). Without an entry, measure and store one.

    Raises StatsError for an entry that cannot be read, OutputError for a cache that cannot be written.
    """
    if context.cache is None:
        return measure(), False
    key = program_key(program, context, {"layout": STATS.layout, "options": dict(options)})
    name = f"stats-{key}"
    if (known := context.cache.load(STATS, name, snapshot.load_stats)) is not None:
        return known, True
    stats = measure()
    context.cache.keep(STATS, name, lambda folder: snapshot.save_stats(stats, folder))
    return stats, False
