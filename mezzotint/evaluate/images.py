"""Step 2 of an evaluation: all pairs of images, sampled or read from the folder, and the numbers of every pair."""

from __future__ import annotations

from mezzotint.runtime.progress import Progress

from ..cluster.driver import Cluster
from ..shards.run import Run
from .extractors import Extractor
from .metrics import PairNumbers
from .pair_numbers import PairMeasure, ShardNumbers, join_numbers
from .pair_work import measure_on_cluster
from .shards import ImagePairs, PairSampler, PairShard


def measure_images(
    sampler: PairSampler,
    run: Run,
    extractor: Extractor | None,
    no_features: str,
    *,
    keep: bool,
    progress: Progress,
    cluster: Cluster | None = None,
) -> PairNumbers:
    """Return the numbers of every pair of a run. With `keep` its shards are read from its folder and written there.

    `no_features` is the reason for an absent extractor. With a `cluster`, its workers sample and measure the
    shards that the folder lacks. Raises InputError for images that are not finite, OutputError.
    """
    measure = PairMeasure(tuple(run.settings["sample_shape"]), extractor)
    shards = {number: PairShard(run, number) for number in range(run.count)}
    found: dict[int, ShardNumbers] = {}
    n = run.settings["pictures"]
    missing: list[int] = []
    for number, shard in shards.items():
        pairs = shard.load() if keep else None
        if pairs is None and cluster is not None:
            missing.append(number)
            continue
        if pairs is None:
            pairs = _sampled(sampler, run, shard, keep, progress)
        progress("pairs of images", shard.stop, n)
        found[number] = measure.numbers(sampler.bundle, pairs)
    if cluster is not None and missing:
        features = None if extractor is None else extractor.name
        found |= measure_on_cluster(cluster, sampler, run, missing, features, keep, progress)
    return join_numbers([found[number] for number in shards], measure, no_features)


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
