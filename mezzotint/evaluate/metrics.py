"""Metrics over paired images, with confidence intervals.

Every metric is computed from numbers of each pair, or from sums over pairs (feature_sums.py), so that pairs can be
resampled: of n pairs, n rows are drawn with replacement `resamples` times, the metric is computed for each draw, and
the interval spans the 2.5th to the 97.5th percentile of the results (Efron's percentile bootstrap). A row stands for
both images of a pair, and the rows are the same for every metric. The interval covers the randomness of the initial
noise, not that of the calibration.

    epsilon          SQNR along the float trajectory, from the sums of squares [steps, n] of each image
    images           PSNR, SSIM and LPIPS of each pair; SQNR of the final samples, also for latents
    frechet          between the features of both sets (mezzotint/frechet); sfid is that of spatial features
    precision        the share of quantized images among the float ones, in feature space, and
    recall           of float ones among the quantized (Kynkaanniemi et al. 2019, arXiv 1904.06991), of the first pairs
    inception_score  how sure and varied the classes of the quantized images are; inception_score_float of the others
    agreement        the share of pairs that a classifier puts into the same class

Precision: each float image has a ball that reaches to its k-th nearest neighbour (k = 3) among the float images. A
quantized image counts when it lies in any of them. Recall is the same with the sets exchanged. Their intervals resample
the share and keep the balls: a set drawn with replacement holds images twice, and their balls would be too small.

The Frechet distance of resampled rows is larger than that of all rows: they hold fewer distinct images, and the bias
of the distance grows as their number falls. Its interval is therefore scaled by the value over the median of the draws.
Measured on Gaussian features (8 and 16, of 64 and 200 pairs, 60 sets each): unscaled percentiles contain the mean
distance of that n in 0 to 57 % of the sets, scaled ones in 90 to 97 %. The bias at n remains: compare distances of
equal n only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.compare import StepSQNR, json_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import CallProgress
from mezzotint.runtime.streams import BOOTSTRAP

from ..frechet import Features, frechet_distance
from .feature_sums import DrawnClasses, DrawnMoments, FeatureSums

RowIndices = npt.NDArray[np.int64]
Statistic = Callable[[RowIndices], float]

RESAMPLES = 1000
LEVEL = 0.95
NEIGHBOURS = 3
BLOCK_BYTES = 64 << 20  # of distances at a time
FEATURE_METRICS = ("frechet", "sfid", "precision", "recall", "inception_score", "inception_score_float")


class PictureSQNR(StepSQNR):
    """A StepSQNR that also keeps the sums of squares of each image, in the order of the calls of `add`."""

    def __init__(self) -> None:
        super().__init__()
        self._images: dict[int, list[Doubles]] = {}

    def add(self, step: int, ref: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        """Add a reference and a result `[B, ...]` of one shape."""
        super().add(step, ref, got)
        self._images.setdefault(int(step), []).append(np.stack(squares(ref, got)))

    def sums(self) -> tuple[Doubles, Doubles]:
        """Return signal and noise, `[steps, n]` each."""
        sums = np.stack([np.concatenate(batches, axis=1) for batches in self._images.values()])
        return sums[:, 0], sums[:, 1]


def squares(ref: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[Doubles, Doubles]:
    """Return the sums of squares of each image `[B, ...]`: of the signal and of the error; `[B]` each."""
    signal = ref.astype(np.float64).reshape(len(ref), -1)
    noise = got.astype(np.float64).reshape(len(got), -1) - signal
    return (signal**2).sum(axis=1), (noise**2).sum(axis=1)


def decibels(signal: Doubles, noise: Doubles) -> float:
    """Return 10 log10 of the ratio of the sums, infinite without noise, as in runtime/compare.py."""
    above, below = float(signal.sum()), float(noise.sum())
    if math.isnan(above) or math.isnan(below):
        return math.nan
    if below == 0:
        return math.inf
    return 10 * math.log10(above / below) if above > 0 else -math.inf


@dataclass(frozen=True)
class Metric:
    """A number with its interval; without a number, `why` is the reason. An interval needs two pairs."""

    value: float | None
    low: float | None = None
    high: float | None = None
    resamples: int = 0
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        if self.value is None:
            return {"value": None, "why": self.why}
        if not math.isfinite(self.value):
            why = "there is no difference" if self.value == math.inf else "not a finite number"
            return {"value": None, "why": self.why or why}
        interval = None if self.low is None or self.high is None else [json_db(self.low), json_db(self.high)]
        return {"value": self.value, "interval": interval, "resamples": self.resamples}


def with_interval(statistic: Statistic, n: int, resamples: int, seed: int) -> Metric:
    """Return the statistic of all rows, with its interval."""
    value = statistic(np.arange(n))
    if n < 2 or resamples < 2:
        return Metric(value)
    low, high = interval(statistic, n, resamples, seed)
    return Metric(value, low, high, resamples)


def interval(statistic: Statistic, n: int, resamples: int, seed: int) -> tuple[float, float]:
    """Return the percentile bootstrap's interval at `LEVEL`.

    Its ends are draws, not interpolated: between infinite draws there is nothing to interpolate.
    """
    return interval_ends(_draws(statistic, n, resamples, seed))


def _draws(statistic: Statistic, n: int, resamples: int, seed: int) -> Doubles:
    rng = BOOTSTRAP.generator(seed)
    return np.array([statistic(rng.integers(n, size=n)) for _ in range(resamples)], np.float64)


def interval_ends(draws: Doubles) -> tuple[float, float]:
    """Return the ends of the interval at `LEVEL`; NaN for draws that have one."""
    if np.isnan(draws).any():
        return math.nan, math.nan
    tail = (1 - LEVEL) / 2
    return (
        float(np.quantile(draws, tail, method="lower")),
        float(np.quantile(draws, 1 - tail, method="higher")),
    )


@dataclass(frozen=True)
class PairNumbers:
    """Numbers of each of n pairs, and sums of their features. `missing` has the reason for each field that is None."""

    signal: Doubles  # [steps, n]
    noise: Doubles
    sample_signal: Doubles  # [n]
    sample_noise: Doubles
    psnr: Doubles | None  # [n]
    ssim: Doubles | None
    lpips: Doubles | None
    features: FeatureSums | None
    same: npt.NDArray[np.bool_] | None  # [n]
    missing: Mapping[str, str]

    def steps(self) -> list[float]:
        """Return the SQNR of epsilon at each network call."""
        return [decibels(s, n) for s, n in zip(self.signal, self.noise, strict=True)]

    def worst(self) -> int:
        """Return the call with the lowest SQNR."""
        return min(enumerate(self.steps()), key=lambda item: -math.inf if math.isnan(item[1]) else item[1])[0]


def metrics(
    pairs: PairNumbers,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: CallProgress = lambda done, total: None,
) -> dict[str, Metric]:
    """Return every metric by name. The same pairs and seed give the same numbers."""
    n, worst = pairs.signal.shape[1], pairs.worst()
    pooled = pairs.signal.sum(axis=0), pairs.noise.sum(axis=0)
    simple: dict[str, tuple[str, Statistic | None]] = {
        "eps_sqnr_db": ("", lambda rows: decibels(pooled[0][rows], pooled[1][rows])),
        "eps_sqnr_db_worst_step": ("", lambda rows: decibels(pairs.signal[worst][rows], pairs.noise[worst][rows])),
        "sample_sqnr_db": ("", lambda rows: decibels(pairs.sample_signal[rows], pairs.sample_noise[rows])),
        "psnr_db_median": ("psnr", _of(pairs.psnr, np.median)),
        "psnr_db_p10": ("psnr", _of(pairs.psnr, lambda v: np.percentile(v, 10, method="lower"))),
        "psnr_db_mean": ("psnr", _of(pairs.psnr, np.mean)),
        "ssim_mean": ("ssim", _of(pairs.ssim, np.mean)),
        "lpips_mean": ("lpips", _of(pairs.lpips, np.mean)),
        "agreement": ("agreement", _of(pairs.same, np.mean)),
    }
    results = {}
    total = len(simple) + len(FEATURE_METRICS)
    for done, (name, (field, statistic)) in enumerate(simple.items()):
        progress(done, total)
        if statistic is None:
            results[name] = Metric(None, why=pairs.missing[field])
        else:
            results[name] = with_interval(statistic, n, resamples, seed)
    for done, (name, metric) in enumerate(_of_features(pairs, resamples, seed)):
        results[name] = metric
        progress(len(simple) + done + 1, total)
    return results


def _of_features(pairs: PairNumbers, resamples: int, seed: int) -> Iterator[tuple[str, Metric]]:
    """Yield each of FEATURE_METRICS."""
    if pairs.features is None:
        yield from ((name, Metric(None, why=pairs.missing["features"])) for name in FEATURE_METRICS)
        return
    exact, quantized, missing = pairs.features.exact, pairs.features.quantized, pairs.missing
    yield "frechet", _frechet(exact.moments, quantized.moments)
    one, other = exact.spatial, quantized.spatial
    yield "sfid", Metric(None, why=missing["spatial"]) if one is None or other is None else _frechet(one, other)
    firsts = exact.first(), quantized.first()
    yield "precision", _share(firsts[1], firsts[0], resamples, seed)
    yield "recall", _share(firsts[0], firsts[1], resamples, seed)
    for name, classes in (("inception_score", quantized.classes), ("inception_score_float", exact.classes)):
        yield name, Metric(None, why=missing["agreement"]) if classes is None else _score(classes)


def _of(values: npt.NDArray[Any] | None, function: Callable[[npt.NDArray[Any]], Any]) -> Statistic | None:
    return None if values is None else lambda rows: float(function(values[rows]))


def frechet_draws(one: DrawnMoments, other: DrawnMoments) -> tuple[float, Doubles]:
    """Return the Frechet distance, and that of each draw, scaled so that their median is the distance.

    Raises InputError for fewer images than features.
    """
    value = frechet_distance(one.whole(), other.whole())
    draws = np.array([frechet_distance(one.draw(i), other.draw(i)) for i in range(one.draws)], np.float64)
    middle = float(np.median(draws)) if len(draws) else 0.0
    return value, draws * (value / middle) if middle > 0 else draws


def _frechet(one: DrawnMoments, other: DrawnMoments) -> Metric:
    try:
        value, draws = frechet_draws(one, other)
    except InputError as refused:
        return Metric(None, why=f"{refused.what}; {refused.hint}" if refused.hint else refused.what)
    return Metric(value, *interval_ends(draws), len(draws)) if len(draws) else Metric(value)


def _score(classes: DrawnClasses) -> Metric:
    value, *draws = classes.scores()
    if not draws:
        return Metric(float(value))
    return Metric(float(value), *interval_ends(np.array(draws)), len(draws))


def _share(points: Features, manifold: Features, resamples: int, seed: int) -> Metric:
    if len(manifold) <= NEIGHBOURS:
        return Metric(None, why=f"{len(manifold)} images have no {NEIGHBOURS} neighbours; take more")
    members = inside(points, manifold)
    return with_interval(lambda rows: float(members[rows].mean()), len(members), resamples, seed)


def inside(points: npt.NDArray[Any], manifold: npt.NDArray[Any], k: int = NEIGHBOURS) -> npt.NDArray[np.bool_]:
    """Return whether each point `[n, D]` lies in a ball of the manifold `[m, D]`; `[n]`.

    The ball around a point of the manifold reaches to its k-th neighbour there. Distances are computed in blocks of
    BLOCK_BYTES. Raises InputError for k > m - 1.
    """
    if not 0 < k < len(manifold):
        raise InputError(f"{len(manifold)} points have no {k} neighbours each", hint="take more images")
    # Each point is its own nearest neighbour at index 0, so its k-th other neighbour is at index k.
    reach = np.concatenate([np.partition(part, k, axis=1)[:, k] for part in _distances(manifold, manifold)])
    return np.concatenate([(part <= reach).any(axis=1) for part in _distances(points, manifold)])


def _distances(points: npt.NDArray[Any], others: npt.NDArray[Any]) -> Iterator[Doubles]:
    from scipy.spatial.distance import cdist

    rows = max(1, BLOCK_BYTES // (8 * len(others)))
    for first in range(0, len(points), rows):
        yield cdist(points[first : first + rows], others)
