"""Step 2 of an evaluation: all pairs of images, sampled or read from the folder, and the numbers of every pair."""

from __future__ import annotations

from collections.abc import Iterator

from mezzotint.runtime.progress import Progress

from ..cluster.driver import Cluster
from ..shards.run import Run
from .extractors import Extractor
from .metrics import PairNumbers
from .pair_numbers import PairMeasure, PairTotals, ShardNumbers
from .pair_work import measured_on_cluster
from .shards import ImagePairs, PairSampler, PairShard


def measure_images(
    sampler: PairSampler,
    run: Run,
    extractor: Extractor | None,
    no_features: str,
    *,
    keep: bool,
    progress: Progress,
    resamples: int = 0,
    cluster: Cluster | None = None,
) -> PairNumbers:
    """Return the numbers of every pair of a run. With `keep` its shards are read from its folder and written there.

    `no_features` is the reason for an absent extractor, `resamples` the draws of the bootstrap over features. With a
    `cluster`, its workers sample and measure the shards that the folder lacks. Numbers are added in the order of the
    shards, so they are the same bytes wherever they were measured. Raises InputError for images that are not finite,
    OutputError.
    """
    measure = PairMeasure(tuple(run.settings["sample_shape"]), extractor)
    n = run.settings["pictures"]
    totals = PairTotals(n, measure, no_features, resamples)
    shards = [PairShard(run, number) for number in range(run.count)]
    elsewhere: list[int] = []
    distant: Iterator[ShardNumbers] = iter(())
    if cluster is not None:
        elsewhere = [number for number, shard in enumerate(shards) if not keep or shard.load() is None]
        features = None if extractor is None else extractor.name
        distant = measured_on_cluster(cluster, sampler, run, elsewhere, features, keep, progress)
    lacking = frozenset(elsewhere)
    for number, shard in enumerate(shards):
        if number in lacking:
            totals.add(next(distant))
            continue
        pairs = shard.load() if keep else None
        if pairs is None:
            pairs = _sampled(sampler, run, shard, keep, progress)
        progress("pairs of images", shard.stop, n)
        totals.add(measure.numbers(sampler.bundle, pairs))
    for _ in distant:  # its end closes the record of machines
        pass
    return totals.numbers()


def _sampled(sampler: PairSampler, run: Run, shard: PairShard, keep: bool, progress: Progress) -> ImagePairs:
    """Return the pairs of a shard, sampled here; with `keep` they are written."""
    n = run.settings["pictures"]

    def report(calls: int, of: int) -> None:
        # The last image of a shard is reported when the shard is written.
        progress("pairs of images", shard.first + (shard.stop - shard.first) * calls // (of + 1), n)

    pairs = sampler.sample(shard.first, shard.stop, report)
    if keep:
        run.announce()
        shard.write(pairs)
    return pairs
