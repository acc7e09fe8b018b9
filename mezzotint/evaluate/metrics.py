"""What is told about float and quantized pictures, and how sure it is.

Everything is made of numbers for each picture, so that pictures can be drawn again with replacement: of n pictures, n
rows are drawn `resamples` times, the metric is computed of each draw, and the interval goes from the 2.5th to the
97.5th percentile of what was found (Efron's percentile bootstrap). A row stands for both pictures of a pair, and the
rows are the same for every metric. The interval tells the chance of the noise that the pictures began with, not that
of the calibration.

    epsilon          SQNR along the float trajectory, from the sums of squares [steps, n] of each picture
    pictures         PSNR, SSIM and LPIPS of each pair; SQNR of the final samples, which latents have as well
    frechet          between the features of both sets (frechet.py)
    precision        the share of quantized pictures among the float ones, in feature space, and
    recall           of float ones among the quantized (Kynkaanniemi et al. 2019, arXiv 1904.06991)
    agreement        the share of pairs that a classifier puts into the same class

Precision: each float picture has a ball that reaches to its k-th nearest neighbour (k = 3) among the float pictures; a
quantized picture counts that lies in any of them. Recall is the same with the sets exchanged. Their intervals are
those of the share with the balls as they are: a set drawn with replacement holds pictures twice, whose balls would be
too small.

The Frechet distance of resampled rows is larger than that of all: fewer pictures are different ones, and the fewer
there are, the further it is off (frechet.py). Its interval is therefore scaled by the value over the median of the
draws. Measured on Gaussian features (8 and 16, of 64 and 200 pairs, 60 sets each): percentiles as they are hold the
mean distance of that n in 0 to 57 % of the sets, scaled ones in 90 to 97 %. Nothing of it takes away the bias that the
distance has at n: it is for comparing distances of equal n.
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
from mezzotint.runtime.streams import BOOTSTRAP

from ..frechet import Features, Moments, frechet_distance

Rows = npt.NDArray[np.int64]
Statistic = Callable[[Rows], float]

RESAMPLES = 1000
FRECHET_RESAMPLES = 200  # it takes some milliseconds for 64 features,
MANY_FEATURES, FEW_RESAMPLES = 256, 40  # and ten seconds for Inception's 2048
LEVEL = 0.95
NEIGHBOURS = 3
BLOCK_BYTES = 64 << 20  # of distances at a time


class PictureSQNR(StepSQNR):
    """A StepSQNR that also keeps the sums of squares of each picture, in the order in which they were added."""

    def __init__(self) -> None:
        super().__init__()
        self._pictures: dict[int, list[Doubles]] = {}

    def add(self, step: int, ref: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        """Two results `[B, ...]` of one shape."""
        super().add(step, ref, got)
        self._pictures.setdefault(int(step), []).append(np.stack(squares(ref, got)))

    def sums(self) -> tuple[Doubles, Doubles]:
        """Signal and noise, `[steps, pictures]` each."""
        found = np.stack([np.concatenate(parts, axis=1) for parts in self._pictures.values()])
        return found[:, 0], found[:, 1]


def squares(ref: npt.NDArray[Any], got: npt.NDArray[Any]) -> tuple[Doubles, Doubles]:
    """Sums of squares of each picture `[B, ...]`: of the signal, and of what was added to it; `[B]` each."""
    wanted = ref.astype(np.float64).reshape(len(ref), -1)
    noise = got.astype(np.float64).reshape(len(got), -1) - wanted
    return (wanted**2).sum(axis=1), (noise**2).sum(axis=1)


def decibels(signal: Doubles, noise: Doubles) -> float:
    """10 log10 of the sums' ratio, as runtime/compare.py has it: infinite without noise."""
    above, below = float(signal.sum()), float(noise.sum())
    if math.isnan(above) or math.isnan(below):
        return math.nan
    if below == 0:
        return math.inf
    return 10 * math.log10(above / below) if above > 0 else -math.inf


@dataclass(frozen=True)
class Metric:
    """A number with its interval, or `why` there is none. An interval needs two pictures."""

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


def measured(statistic: Statistic, n: int, resamples: int, seed: int) -> Metric:
    """The statistic of all rows, with its interval."""
    value = statistic(np.arange(n))
    if n < 2 or resamples < 2:
        return Metric(value)
    low, high = interval(statistic, n, resamples, seed)
    return Metric(value, low, high, resamples)


def interval(statistic: Statistic, n: int, resamples: int, seed: int) -> tuple[float, float]:
    """The percentile bootstrap's interval of `LEVEL`; ends that were found, as infinite ones have nothing between."""
    return _ends(_draws(statistic, n, resamples, seed))


def _draws(statistic: Statistic, n: int, resamples: int, seed: int) -> Doubles:
    rng = BOOTSTRAP.generator(seed)
    return np.array([statistic(rng.integers(n, size=n)) for _ in range(resamples)], np.float64)


def _ends(found: Doubles) -> tuple[float, float]:
    if np.isnan(found).any():
        return math.nan, math.nan
    tail = (1 - LEVEL) / 2
    return (
        float(np.quantile(found, tail, method="lower")),
        float(np.quantile(found, 1 - tail, method="higher")),
    )


@dataclass(frozen=True)
class Pairs:
    """Numbers for each of n pairs. `missing` says why a field is None."""

    signal: Doubles  # [steps, n]
    noise: Doubles
    sample_signal: Doubles  # [n]
    sample_noise: Doubles
    psnr: Doubles | None  # [n]
    ssim: Doubles | None
    lpips: Doubles | None
    features: tuple[Features, Features] | None  # [n, D] of the float and of the quantized pictures
    same: npt.NDArray[np.bool_] | None  # [n]
    missing: Mapping[str, str]

    def steps(self) -> list[float]:
        """SQNR of epsilon at each network call."""
        return [decibels(s, n) for s, n in zip(self.signal, self.noise, strict=True)]

    def worst(self) -> int:
        """The call with the lowest SQNR."""
        return min(enumerate(self.steps()), key=lambda item: -math.inf if math.isnan(item[1]) else item[1])[0]


def metrics(
    pairs: Pairs,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Metric]:
    """Every metric by name. The same pairs and seed give the same numbers."""
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
    found = {}
    for done, (name, (field, statistic)) in enumerate(simple.items()):
        progress(done, len(simple) + 3)
        if statistic is None:
            found[name] = Metric(None, why=pairs.missing[field])
        else:
            found[name] = measured(statistic, n, resamples, seed)
    if pairs.features is None:
        return {
            **found,
            **dict.fromkeys(("frechet", "precision", "recall"), Metric(None, why=pairs.missing["features"])),
        }
    one, other = pairs.features
    found["frechet"] = _frechet(one, other, resamples, seed)
    progress(len(simple) + 1, len(simple) + 3)
    for i, (name, points, manifold) in enumerate((("precision", other, one), ("recall", one, other))):
        found[name] = _share(points, manifold, resamples, seed)
        progress(len(simple) + 2 + i, len(simple) + 3)
    return found


def _of(values: npt.NDArray[Any] | None, function: Callable[[npt.NDArray[Any]], Any]) -> Statistic | None:
    return None if values is None else lambda rows: float(function(values[rows]))


def _frechet(one: Features, other: Features, resamples: int, seed: int) -> Metric:
    most = FRECHET_RESAMPLES if one.shape[1] <= MANY_FEATURES else FEW_RESAMPLES

    def distance(rows: Rows) -> float:
        both = Moments(), Moments()
        for moments, features in zip(both, (one, other), strict=True):
            moments.add(features[rows])
        return frechet_distance(*both)

    n, resamples = len(one), min(resamples, most)
    try:
        value = distance(np.arange(n))
    except InputError as refused:
        return Metric(None, why=f"{refused.what}; {refused.hint}" if refused.hint else refused.what)
    draws = _draws(distance, n, resamples, seed)
    middle = float(np.median(draws))
    low, high = _ends(draws * (value / middle) if middle > 0 else draws)
    return Metric(value, low, high, resamples)


def _share(points: Features, manifold: Features, resamples: int, seed: int) -> Metric:
    if len(manifold) <= NEIGHBOURS:
        return Metric(None, why=f"{len(manifold)} pictures have no {NEIGHBOURS} neighbours; take more")
    found = inside(points, manifold)
    return measured(lambda rows: float(found[rows].mean()), len(found), resamples, seed)


def inside(points: npt.NDArray[Any], manifold: npt.NDArray[Any], k: int = NEIGHBOURS) -> npt.NDArray[np.bool_]:
    """Which of the points `[n, D]` lie in a ball around one of `[m, D]` that reaches to its k-th neighbour; `[n]`.

    Distances are computed in blocks of BLOCK_BYTES. Raises InputError for k neighbours among m - 1 others, k > m - 1.
    """
    if not 0 < k < len(manifold):
        raise InputError(f"{len(manifold)} points have no {k} neighbours each", hint="take more pictures")
    # Each is its own nearest neighbour, so that the k-th other one comes at index k.
    reach = np.concatenate([np.partition(part, k, axis=1)[:, k] for part in _distances(manifold, manifold)])
    return np.concatenate([(part <= reach).any(axis=1) for part in _distances(points, manifold)])


def _distances(points: npt.NDArray[Any], others: npt.NDArray[Any]) -> Iterator[Doubles]:
    from scipy.spatial.distance import cdist

    rows = max(1, BLOCK_BYTES // (8 * len(others)))
    for first in range(0, len(points), rows):
        yield cdist(points[first : first + rows], others)
