"""One shard is drawn: in this process, or as a piece of a run on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling.options import SamplingOptions
from mezzotint.runtime.signature import Images

from ..cluster.driver import Cluster
from ..cluster.placement import Fetch, this_computer
from ..cluster.record import machine_name
from .carried import CarriedBundle
from .files import Shard
from .kind_check import KindJudge, fixed_call
from .objects import ObjectRun, run_at
from .run import Run

GPU_ENGINES = frozenset({"cuda", "tensorrt", "nv_tensorrt_rtx"})
"""Engines whose pieces ask for a GPU each."""


def draw_shard(
    bundle: Bundle, shard: Shard, options: SamplingOptions, threads: int | None, report: Callable[[int], None]
) -> Images:
    """Return a shard's images, drawn batch by batch. `report` gets the number of images drawn, at most all but one."""
    images = np.empty((len(shard.index), *shard.shape), np.float32)
    size = bundle.denoiser(threads).fixed_batch or options.batch
    for start in range(shard.first, shard.stop, size):
        stop = min(start + size, shard.stop)
        here = start - shard.first

        def count(calls: int, of: int, here: int = here, width: int = stop - start) -> None:
            report(here + width * calls // (of + 1))

        batch = replace(options.of_images(start, stop), seed=shard.seed, batch=size)
        images[here : stop - shard.first] = bundle.sample_with(
            batch, stop - start, first=start, threads=threads, progress=count
        )
    return images


@dataclass(frozen=True)
class DrawnShard:
    """The files of a shard by name, None where the worker wrote them; and the fixed call, where it was asked for."""

    files: dict[str, bytes] | None
    prediction: Images | None = None


@dataclass(frozen=True)
class ShardWork:
    """What all shards of a run share, as work for a cluster: a piece is a shard's number.

    With a `url` the worker writes the files there itself. A worker on a kind of processor that is not among `known`
    makes the fixed call of kind_check.py before its first shard.
    """

    bundle: CarriedBundle
    settings: Mapping[str, Any]
    options: SamplingOptions
    threads: int
    url: str | None
    known: frozenset[str]

    def open(self, fetch: Fetch) -> Callable[[int], DrawnShard]:
        """Return the function from the number of a shard to its files by name. Raises as `fixed_call`."""
        bundle, run = self.bundle.open(fetch, self.threads), run_at(self.url or Path(), self.settings)
        is_known = this_computer().kind in self.known
        calls = [] if is_known else [fixed_call(bundle, self.options, self.threads)[1]]

        def draw(number: int) -> DrawnShard:
            shard = run.shard(number)
            files = shard.encode(draw_shard(bundle, shard, self.options, self.threads, lambda done: None))
            prediction = calls.pop() if calls else None
            if self.url is None:
                return DrawnShard(files, prediction)
            shard.store(files)
            return DrawnShard(None, prediction)

        return draw


def draw_on_cluster(
    cluster: Cluster, bundle: Bundle, run: Run, missing: Sequence[int], options: SamplingOptions, progress: Progress
) -> None:
    """Draw shards on the workers of a cluster, and write each of them here when it comes; workers write to URLs.

    `machines.json` says which machine drew which shard, and what each other kind of processor predicts at a fixed
    call. There is a warning of a kind on which the bundle is inaccurate. Raises the refusal of a worker, and
    ClusterError.
    """
    url = run.where if isinstance(run, ObjectRun) else None
    record, judge = run.record(), KindJudge(bundle, options, cluster.threads)
    known = record.checked | {judge.kind}
    work = ShardWork(CarriedBundle.of(bundle, cluster), run.settings, options, cluster.threads, url, known)
    sizes = [len(run.shard(number).index) for number in missing]
    gpus = 1 if bundle.engine.name in GPU_ENGINES else 0
    answers = cluster.answers(work, missing, stage="sample", sizes=sizes, unit="images", gpus=gpus, progress=progress)
    try:
        if url is not None:
            run.announce()  # workers write without asking
        for index, answer in answers:
            run.announce()
            drawn: DrawnShard = answer.result
            if drawn.files is not None:
                run.shard(missing[index]).store(drawn.files)
            kind = answer.stamp.machine.kind
            if drawn.prediction is not None and kind not in record.checked:
                record.check(kind, judge.check(kind, machine_name(answer.stamp), drawn.prediction))
            record.add(missing[index], answer.stamp)
    finally:
        record.close()
