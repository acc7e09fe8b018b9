"""A fixed network call on each kind of processor that joins a run on a cluster, beside the same call on the driver.

Integer kernels differ between kinds of processors. A compilation judges the finished file on one of them
(mezzotint/compiler/acceptance), and the bundle keeps the SQNR of its prediction and no prediction. So the driver's own
prediction stands for that file: with a noise-to-signal ratio r1 of the file beside the float model, from the manifest,
and r2 of another kind beside the driver, independent errors give that kind r1 + r2. It is held to the limit that the
bundle was accepted with. Values that are not finite are refused, as at the end of a compilation.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.guidance import predictors, rows_in_turn, with_labels
from mezzotint.runtime.sampling.options import SamplingOptions
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.signature import Images, Timestep

from ..cluster.placement import this_computer
from ..cluster.record import KindCheck

NOISE_SEED = 0
LOWEST_DB = -100.0


def fixed_call(bundle: Bundle, options: SamplingOptions, threads: int | None) -> tuple[Timestep, Images]:
    """Return the timestep in the middle of a run's calls, and the prediction `[rows, C, H, W]` there, from noise.

    One row, or as many as the graph takes; guided where the run is. Raises InputError for values that are not finite.
    """
    plan = bundle.plan(options.sampler, options.steps, options.eta, options.guidance)
    networks = bundle.denoisers(plan, threads)
    middle = len(plan.calls) // 2
    fixed = networks[middle].fixed_batch
    width = 1 if fixed is None else fixed // (2 if plan.guided else 1)
    both = with_labels(bundle.signature, plan, options.conditions, options.unconditional)
    rows, without = (rows_in_turn(arrays, 0, width) for arrays in both)
    x = initial_noise(NOISE_SEED, (width, *bundle.sample_shape))
    t = plan.calls[middle]
    prediction = predictors(networks, plan, rows, without)[middle](x, t)
    if bad := prediction.size - int(np.isfinite(prediction).sum()):
        raise InputError(
            f"on this processor the bundle predicts {bad} of {prediction.size} values that are not finite",
            where=f"timestep {t:g} on {this_computer().host} ({this_computer().kind})",
            hint="leave this machine out of the cluster, and report this",
        )
    return t, prediction


class KindJudge:
    """Compares other kinds of processors with this one, for a run of a bundle. `kind` is that of this machine.

    The call is made here when the first other kind joins.
    """

    def __init__(self, bundle: Bundle, options: SamplingOptions, threads: int | None) -> None:
        self._bundle, self._options, self._threads = bundle, options, threads
        self.kind = this_computer().kind

    @cached_property
    def _own(self) -> tuple[Timestep, Images]:
        return fixed_call(self._bundle, self._options, self._threads)

    def check(self, kind: str, machine: str, prediction: Images) -> KindCheck:
        """Return what a kind's prediction of the fixed call is worth; `machine` made it."""
        t, own = self._own
        difference = sqnr_db(own, prediction)
        accepted = self._bundle.manifest.acceptance
        expected: float | None = None
        warning = ""
        if accepted is not None:
            worst = accepted.worst().sqnr_db
            expected = _joined(math.inf if worst is None else worst, difference)
            if expected < accepted.min_sqnr_db:
                warning = (
                    f"the bundle is inaccurate on processors of the kind {kind!r} ({machine}): its prediction has an "
                    f"SQNR of {difference:.1f} dB beside this machine's, which leaves {expected:.1f} dB beside the "
                    f"float model, below the {accepted.min_sqnr_db:g} dB of --min-sqnr"
                )
        largest = float(np.abs(own.astype(np.float64) - prediction).max())
        return KindCheck(machine, self.kind, t, _rounded(difference), largest, _rounded(expected), warning)


def _joined(one: float, other: float) -> float:
    """Return the SQNR in dB of two independent errors together."""
    ratio = 10 ** (-one / 10) + 10 ** (-other / 10)
    return -10 * math.log10(ratio) if ratio else math.inf


def _rounded(db: float | None) -> float | None:
    """Return dB for JSON, None for no error; the largest error there is counts as LOWEST_DB."""
    if db is None or db == math.inf:
        return None
    return round(max(db, LOWEST_DB), 2)
