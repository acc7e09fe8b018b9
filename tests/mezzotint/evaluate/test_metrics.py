"""Numbers of each pair, the metrics computed from them, and their intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from mezzotint.evaluate import metrics as eval_metrics
from mezzotint.evaluate.extractors import ImageFeatures
from mezzotint.evaluate.feature_sums import FeatureSums
from mezzotint.evaluate.metrics import Metric, PairNumbers, PictureSQNR, decibels, inside, interval, metrics, squares
from mezzotint.frechet import Moments, frechet_distance
from mezzotint.runtime.compare import StepSQNR, psnr_db, sqnr_db
from mezzotint.runtime.errors import InputError

N, D = 40, 4
MISSING = {"psnr": "latents", "ssim": "latents", "lpips": "not here", "features": "none", "agreement": "no classes"}
MISSING["spatial"] = "no maps"


def random_images(seed: int, n: int = N) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-1, 1, (n, 1, 2, 2)).astype(np.float32)


def sums_of(exact: npt.NDArray[np.float32], other: npt.NDArray[np.float32], resamples: int = 20) -> FeatureSums:
    """The pixels are the features and the logits, the upper ones the spatial features; in shards of 7 pairs."""
    sums = FeatureSums(len(exact), resamples)
    for first in range(0, len(exact), 7):
        both = (images[first : first + 7].reshape(-1, exact[0].size) for images in (exact, other))
        sums.add(*(ImageFeatures(rows, rows, rows[:, : rows.shape[1] // 2]) for rows in both))
    return sums


def pairs_of(exact: npt.NDArray[np.float32], other: npt.NDArray[np.float32], resamples: int = 20) -> PairNumbers:
    """The pixels are the features, the brightest one the class."""
    signal, noise = squares(exact, other)
    psnr = psnr_db(exact, other, 2.0)
    same = exact.reshape(len(exact), -1).argmax(axis=1) == other.reshape(len(other), -1).argmax(axis=1)
    sums = sums_of(exact, other, resamples)
    return PairNumbers(signal[None], noise[None], signal, noise, psnr, psnr / 100, None, sums, same, MISSING)


def near(seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    exact = random_images(seed)
    return exact, exact + np.float32(0.05) * random_images(seed + 1)


def distance(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    both = Moments(), Moments()
    for moments, features in zip(both, (one, other), strict=True):
        moments.add(features)
    return frechet_distance(*both)


class TestSums:
    """Sums of squares of each image."""

    def test_they_add_up_to_the_steps(self) -> None:
        found, plain = PictureSQNR(), StepSQNR()
        for step in (3, 1):
            for seed, rows in ((step, 2), (step + 10, 3)):
                signal = random_images(seed, rows)
                for measure in (found, plain):
                    measure.add(step, signal, signal + np.float32(0.1 * step))
        sums, noise = found.sums()

        assert sums.shape == noise.shape == (2, 5)
        np.testing.assert_allclose(noise, [[4 * 0.3**2] * 5, [4 * 0.1**2] * 5], rtol=1e-5)
        assert found.per_step() == plain.per_step()
        assert decibels(sums, noise) == pytest.approx(plain.pooled(), rel=1e-12)

    def test_decibels(self) -> None:
        exact, other = near()
        assert decibels(*squares(exact, other)) == pytest.approx(sqnr_db(exact, other), rel=1e-12)
        assert decibels(*squares(exact, exact)) == math.inf
        assert decibels(np.zeros(2), np.ones(2)) == -math.inf
        assert math.isnan(decibels(np.array([np.nan]), np.ones(1)))


class TestInterval:
    """The percentile bootstrap."""

    def test_of_a_mean_it_is_the_textbook_interval(self) -> None:
        values = np.random.default_rng(1).standard_normal(400)

        low, high = interval(lambda rows: float(values[rows].mean()), 400, 1000, seed=0)

        half = 1.96 * values.std() / 20
        assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 6)

    def test_it_is_that_of_scipy(self) -> None:
        from scipy import stats

        values = np.random.default_rng(2).exponential(size=60)
        wanted = stats.bootstrap((values,), np.median, n_resamples=2000, method="percentile", rng=3).confidence_interval

        found = interval(lambda rows: float(np.median(values[rows])), 60, 2000, seed=0)

        assert found == pytest.approx(tuple(wanted), abs=0.06)
        assert wanted.high - wanted.low > 0.3

    def test_the_same_seed_gives_the_same(self) -> None:
        values = np.arange(10.0)

        first, again, other = (interval(lambda rows: float(values[rows].mean()), 10, 50, seed=s) for s in (0, 0, 1))

        assert first == again != other

    def test_an_infinite_value_has_an_infinite_end(self) -> None:
        low, high = interval(lambda rows: math.inf if (rows == 0).any() else float(rows.mean()), 5, 100, seed=0)
        assert math.isfinite(low) and high == math.inf
        assert all(map(math.isnan, interval(lambda rows: math.nan, 5, 10, seed=0)))

    def test_json(self) -> None:
        assert Metric(1.0, 0.5, math.inf, 9).to_json() == {"value": 1.0, "interval": [0.5, None], "resamples": 9}
        assert Metric(math.inf).to_json() == {"value": None, "why": "there is no difference"}
        assert Metric(math.nan).to_json() == {"value": None, "why": "not a finite number"}
        assert Metric(None, why="so").to_json() == {"value": None, "why": "so"}
        assert Metric(2.0).to_json()["interval"] is None


class TestInside:
    """Precision and recall's balls."""

    def test_by_hand(self) -> None:
        line = np.array([[0.0], [1], [3], [10]])  # the second neighbours are at 3, 2, 3, 9

        found = inside(np.array([[-3.0], [-3.1], [6], [19], [19.1]]), line, k=2)

        assert found.tolist() == [True, False, True, True, False]

    def test_by_brute_force_and_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        rng = np.random.default_rng(4)
        points, manifold = rng.standard_normal((30, D)), 0.7 * rng.standard_normal((25, D))
        reach = [sorted(np.linalg.norm(manifold - m, axis=1))[3] for m in manifold]
        wanted = [any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, reach, strict=True)) for p in points]
        assert 0 < sum(wanted) < 30

        np.testing.assert_array_equal(inside(points, manifold), wanted)
        monkeypatch.setattr(eval_metrics, "BLOCK_BYTES", 8 * 25 * 7)
        np.testing.assert_array_equal(inside(points, manifold), wanted)

    def test_disjoint_sets_and_equal_ones(self) -> None:
        points = np.random.default_rng(5).standard_normal((20, D))

        assert not inside(points + 100, points).any()
        assert inside(points, points).all()

    def test_too_few(self) -> None:
        with pytest.raises(InputError, match="3 points have no 3 neighbours"):
            inside(np.zeros((3, 1)), np.zeros((3, 1)))


class TestMetrics:
    """All metrics, and the effect of planted faults."""

    def test_values_are_those_of_the_functions(self) -> None:
        exact, other = near()
        pairs = pairs_of(exact, other)

        found = metrics(pairs, resamples=20)

        flat = exact.reshape(N, -1), other.reshape(N, -1)
        assert found["frechet"].value == pytest.approx(distance(*flat), rel=1e-9)
        assert found["sfid"].value == pytest.approx(distance(*(rows[:, :2] for rows in flat)), rel=1e-9)
        assert found["eps_sqnr_db"].value == pytest.approx(sqnr_db(exact, other), rel=1e-9)
        assert pairs.psnr is not None and pairs.same is not None
        assert found["psnr_db_median"].value == np.median(pairs.psnr)
        assert found["psnr_db_p10"].value in pairs.psnr
        assert found["agreement"].value == pairs.same.mean()
        assert found["lpips_mean"] == Metric(None, why="not here")
        for name in ("eps_sqnr_db", "psnr_db_mean", "ssim_mean", "inception_score", "inception_score_float"):
            metric = found[name]
            assert metric.value is not None and metric.low is not None and metric.high is not None
            assert metric.low < metric.value < metric.high and metric.resamples == 20
        assert metrics(pairs, resamples=20) == found

    def test_shuffled_pairs(self) -> None:
        """Lower where pairs count, the same where sets do."""
        exact, other = near()
        right, wrong = (metrics(pairs_of(exact, o), resamples=2) for o in (other, np.roll(other, 1, axis=0)))

        def values(name: str) -> tuple[Any, Any]:
            return right[name].value, wrong[name].value

        for name in ("psnr_db_median", "eps_sqnr_db", "agreement"):
            good, bad = values(name)
            assert bad < 0.7 * good, name
        for name in ("frechet", "precision", "recall"):
            assert values(name)[1] == pytest.approx(values(name)[0], abs=1e-9), name

    def test_a_shifted_set(self) -> None:
        exact, other = near()
        right, moved, gone = (metrics(pairs_of(exact, other + np.float32(s)), resamples=2) for s in (0, 0.3, 20))

        assert moved["frechet"].value == pytest.approx(4 * 0.3**2, rel=0.1) and moved["frechet"].value is not None
        assert right["frechet"].value is not None and right["frechet"].value < 0.01
        assert (gone["precision"].value, gone["recall"].value) == (0, 0)
        assert right["precision"].value == right["recall"].value == 1

    def test_the_interval_of_the_distance_holds_it(self) -> None:
        """Draws with replacement are further apart; as they are, they would all lie above the value."""
        rng = np.random.default_rng(6)
        one = rng.standard_normal((64, 16)).astype(np.float32)
        other = one + np.float32(0.1) * rng.standard_normal((64, 16)).astype(np.float32)

        sums = sums_of(one, other, 40)
        found = eval_metrics._frechet(sums.exact.moments, sums.quantized.moments)
        draws = eval_metrics._draws(lambda rows: distance(one[rows], other[rows]), 64, 40, 0)

        assert found.value == pytest.approx(distance(one, other), rel=1e-9)
        assert found.low is not None and found.high is not None and found.value is not None
        assert found.low < found.value < found.high
        assert found.value < draws.min(), "the twin: it does not hold by itself"
        low, high = np.quantile(draws, 0.025, method="lower"), np.quantile(draws, 0.975, method="higher")
        assert found.low == pytest.approx(low * found.value / np.median(draws), rel=1e-9)
        assert found.high == pytest.approx(high * found.value / np.median(draws), rel=1e-9)

    def test_a_set_that_lost_its_variety(self) -> None:
        """Every quantized image is near a float one, and most float images are near none."""
        exact = random_images(0)
        found = metrics(pairs_of(exact, exact[:1] + np.float32(1e-3) * random_images(1)), resamples=2)

        assert found["precision"].value == 1
        assert found["recall"].value is not None and found["recall"].value < 0.3

    def test_the_worst_step(self) -> None:
        pairs = pairs_of(*near())
        pairs = replace(pairs, signal=np.ones((3, N)), noise=np.array([[1e-3], [1e-1], [1e-2]]) * np.ones((3, N)))

        assert pairs.worst() == 1
        assert pairs.steps() == pytest.approx([30, 10, 20])
        assert metrics(pairs, resamples=2)["eps_sqnr_db_worst_step"].value == pytest.approx(10)

    def test_too_few_images_give_a_reason(self) -> None:
        exact, other = near()
        found = metrics(pairs_of(exact[:3], other[:3]), resamples=5)

        assert found["frechet"].value is None and "3 images are too few for 4 features" in found["frechet"].why
        assert found["precision"].value is None and "no 3 neighbours" in found["precision"].why
        one = metrics(pairs_of(exact[:1], other[:1]), resamples=5)["psnr_db_mean"]
        assert one.value is not None and one.low is None, "one picture has no interval"

    def test_latents_have_an_sqnr_only(self) -> None:
        pairs = replace(pairs_of(*near()), psnr=None, ssim=None, features=None, same=None)
        found = metrics(pairs, resamples=2)

        reasons = {name: metric.why for name, metric in found.items() if metric.value is None}
        assert set(found) - set(reasons) == {"eps_sqnr_db", "eps_sqnr_db_worst_step", "sample_sqnr_db"}
        assert (reasons["psnr_db_mean"], reasons["recall"], reasons["agreement"]) == ("latents", "none", "no classes")
        assert reasons["sfid"] == reasons["inception_score"] == "none"

    def test_progress_ends(self) -> None:
        seen: list[tuple[int, int]] = []
        metrics(pairs_of(*near()), resamples=2, progress=lambda done, total: seen.append((done, total)))
        assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
