"""Pairs of images that workers of a cluster sample and measure: a piece is a shard, its result the shard's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling.guidance import Conditions

from ..bench.reference import ReferenceModel
from ..cluster.driver import Cluster
from ..cluster.placement import Fetch
from ..shards.carried import CarriedBundle, CarriedNetwork
from ..shards.run import Run
from .extractors import open_extractor
from .pair_numbers import PairMeasure, ShardNumbers
from .shards import PairSampler, PairShard

Result = tuple[bytes, ShardNumbers]
"""The shard's file, empty where it is not kept, and its numbers."""


@dataclass(frozen=True)
class PairWork:
    """What all shards of pairs share. `features` is the name of the extractor, or its network; None for no features."""

    bundle: CarriedBundle
    reference: CarriedNetwork
    features: str | CarriedNetwork | None
    settings: Mapping[str, Any]
    batch: int
    threads: int
    correction: bool | None
    conditions: Conditions
    unconditional: Conditions
    keep: bool

    @classmethod
    def of(cls, cluster: Cluster, sampler: PairSampler, run: Run, features: str | None, keep: bool) -> PairWork:
        """Return the work of a sampler for a cluster. Raises InputError for a bundle that cannot travel."""
        own = features is not None and features.endswith(".onnx")
        return cls(
            CarriedBundle.of(sampler.bundle, cluster),
            CarriedNetwork.of(cluster, sampler.reference.path),
            CarriedNetwork.of(cluster, Path(features)) if features is not None and own else features,
            run.settings,
            sampler.batch,
            cluster.threads,
            sampler.correction,
            sampler.conditions,
            sampler.unconditional,
            keep,
        )

    def open(self, fetch: Fetch) -> Callable[[int], Result]:
        """Return the function from the number of a shard to its result."""
        bundle, run = self.bundle.open(fetch, self.threads), Run(Path(), self.settings)
        reference = ReferenceModel(bundle, self.reference.place(fetch), threads=self.threads)
        given = self.correction, self.conditions, self.unconditional
        sampler = PairSampler(bundle, reference, self.settings["seed"], self.batch, self.threads, *given)
        name = str(self.features.place(fetch)) if isinstance(self.features, CarriedNetwork) else self.features
        shape = tuple(self.settings["sample_shape"])
        measure = PairMeasure(shape, None if name is None else open_extractor(name, shape, self.threads))

        def sample_and_measure(number: int) -> Result:
            shard = PairShard(run, number)
            pairs = sampler.sample(shard.first, shard.stop, lambda done, total: None)
            return shard.encode(pairs) if self.keep else b"", measure.numbers(bundle, pairs)

        return sample_and_measure


def measured_on_cluster(
    cluster: Cluster,
    sampler: PairSampler,
    run: Run,
    missing: list[int],
    features: str | None,
    keep: bool,
    progress: Progress,
) -> Iterator[ShardNumbers]:
    """Yield the numbers of shards that workers sample and measure, in the order of the shards.

    With `keep` their files are written here.
    """
    work = PairWork.of(cluster, sampler, run, features, keep)
    sizes = [PairShard(run, number).stop - PairShard(run, number).first for number in missing]
    record = run.record() if keep else None
    how: dict[str, Any] = {"stage": "pairs of images", "sizes": sizes, "unit": "pairs", "progress": progress}
    answers = cluster.answers(work, missing, ordered=True, needs_all=not keep, **how)
    try:
        for i, answer in answers:
            file, numbers = answer.result
            if record is not None:
                run.announce()
                PairShard(run, missing[i]).store(file)
                record.add(missing[i], answer.stamp)
            yield numbers
    finally:
        if record is not None:
            record.close()
