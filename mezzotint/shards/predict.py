"""`mezzotint sample -o FOLDER --dry-run`: how long a run will take, and what it costs, from one batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.engine import threads_of
from mezzotint.runtime.sampling.options import SamplingOptions

from ..cluster.connection import count_workers, piece_threads
from ..io.processor import usable_cores
from .drawing import draw_shard
from .shards import ShardOptions, plan_shards


def predict_run(
    bundle: Bundle,
    folder: Path | str,
    n: int,
    options: SamplingOptions,
    shard_options: ShardOptions,
    *,
    threads: int | None = None,
    cluster: str | None = None,
) -> dict[str, Any]:
    """Return the seconds and core-hours of `sample_shards`, as plain data. Nothing is written.

    The first batch of the first missing shard is drawn here, with the threads of a piece. Every worker is taken to be
    as fast; the shards are divided among the workers, and the start of the cluster is left out. Raises as
    `sample_shards`.
    """
    plan = plan_shards(bundle, folder, n, options, shard_options, cluster=cluster)
    each = threads_of(threads) if cluster is None else piece_threads(threads)
    workers = 1 if cluster is None else count_workers(cluster, threads)
    shards, images = len(plan.missing), plan.images
    facts: dict[str, Any] = {"shards": shards, "images": images, "workers": workers, "threads": each}
    if not shards:
        return {**facts, "seconds": 0.0, "core_hours": 0.0}
    shard = plan.run.shard(plan.missing[0])
    width = min(bundle.denoiser(each).fixed_batch or options.batch, shard.stop - shard.first)
    bundle.denoisers(threads=each)  # opened before the clock starts
    started = time.perf_counter()
    draw_shard(bundle, shard.part(width), plan.options, each, lambda done: None)
    per_image = (time.perf_counter() - started) / width
    longest = -(-shards // workers)  # shards of the worker that has most
    seconds = per_image * min(images, longest * plan.run.settings["shard_size"])
    cores = usable_cores() if each is None else each
    hours = per_image * images * cores / 3600
    return {
        **facts,
        "seconds_per_image": round(per_image, 4),
        "seconds": round(seconds, 1),
        "core_hours": round(hours, 4),
    }
