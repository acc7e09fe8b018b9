"""The error of each precision at each network call. A batch of images is a piece, measured here or by a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.core.blas_threads import with_blas_threads
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import StepSQNR
from mezzotint.runtime.progress import Progress, part_of_stage, silent
from mezzotint.runtime.sampling.guidance import Conditions, checked_rows, rows_in_turn
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.sampling.steps import noise_of
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images

from ..bench.pairs import parallel_run
from ..bench.reference import ReferenceModel
from ..cluster.driver import Cluster
from ..cluster.placement import Fetch
from ..shards.carried import CarriedBundle, CarriedNetwork

PAIRED_STAGE = "float, paired calls"
Errors = dict[str, StepSQNR]
"""The SQNR of the noise that follows from the prediction, at each call, of each precision."""
ImageSpan = tuple[int, int]
"""(first image, number of images) of a batch."""


@dataclass(frozen=True)
class MixedNetworks:
    """The networks by precision, and what they are measured on. `bundle` is any of their bundles."""

    bundle: Bundle
    nets: Mapping[str, Denoiser]
    reference: ReferenceModel
    seed: int
    conditions: Conditions
    unconditional: Conditions

    def errors(self, span: ImageSpan, progress: Progress = silent) -> Errors:
        """Return the errors on a batch of images, along the float trajectory."""
        bundle, (first, rows) = self.bundle, span

        def noise(info: StepInfo, output: Images) -> Images:
            share_x, share_out = noise_of(bundle.schedule, *bundle.schedule.levels(info.timestep))
            return info.x * np.float32(share_x) + output * np.float32(share_out)

        given = checked_rows(self.conditions), checked_rows(self.unconditional, "unconditional")
        own, without = (rows_in_turn(one, first, rows) for one in given)
        _, found = parallel_run(
            self.reference.network,
            self.nets,
            bundle,
            rows,
            seed=self.seed,
            batch=rows,
            conditions=own,
            unconditional=without,
            start=first,
            progress=progress,
            view=noise,
        )
        return found


@dataclass(frozen=True)
class MixWork:
    """Batches that workers measure; what they share travels once."""

    bundles: Mapping[str, CarriedBundle]
    reference: CarriedNetwork
    seed: int
    conditions: Conditions
    unconditional: Conditions
    threads: int
    blas: int

    @classmethod
    def of(cls, cluster: Cluster, bundles: Mapping[str, Bundle], networks: MixedNetworks, blas: int) -> MixWork:
        """Return the work for a cluster. Raises InputError for bundles that cannot travel."""
        return cls(
            {name: CarriedBundle.of(bundle, cluster) for name, bundle in bundles.items()},
            CarriedNetwork.of(cluster, Path(networks.reference.path)),
            networks.seed,
            networks.conditions,
            networks.unconditional,
            cluster.threads,
            blas,
        )

    def open(self, fetch: Fetch) -> Callable[[ImageSpan], Errors]:
        """Return the function from a batch to its errors."""
        bundles = {name: carried.open(fetch, self.threads) for name, carried in self.bundles.items()}
        one = next(iter(bundles.values()))
        networks = MixedNetworks(
            one,
            {name: bundle.denoiser(self.threads) for name, bundle in bundles.items()},
            ReferenceModel(one, self.reference.place(fetch), threads=self.threads),
            self.seed,
            self.conditions,
            self.unconditional,
        )

        def measure(span: ImageSpan) -> Errors:
            with with_blas_threads(self.blas):
                return networks.errors(span)

        return measure


def summed_errors(
    networks: MixedNetworks,
    spans: Sequence[ImageSpan],
    spread: tuple[Cluster, MixWork] | None = None,
    progress: Progress = silent,
) -> Errors:
    """Return the errors of all batches, added in their order. `spread` are the workers, and the work for them."""
    total = {name: StepSQNR() for name in networks.nets}
    if spread is not None:
        cluster, work = spread
        how: dict[str, Any] = {"stage": PAIRED_STAGE, "unit": "batches", "progress": progress}
        answers = cluster.answers(work, spans, ordered=True, needs_all=True, **how)
        results = (answer.result for _, answer in answers)
    else:
        results = (networks.errors(span, part_of_stage(progress, i, len(spans))) for i, span in enumerate(spans))
    for errors in results:
        for name, error in errors.items():
            total[name] = total[name] + error
    return total
