"""Sums of features: those of draws, in constant memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from mezzotint.evaluate import feature_sums
from mezzotint.evaluate.extractors import ImageFeatures
from mezzotint.evaluate.feature_sums import DrawnClasses, DrawnMoments, FeatureSums, draw_counts
from mezzotint.frechet import Features, Moments
from mezzotint.runtime.streams import BOOTSTRAP

N, D, DRAWS = 50, 6, 9


def features(n: int = N, size: int = D) -> Features:
    rows = np.random.default_rng(n).standard_normal((n, size)) * np.arange(1, size + 1) + 1000
    return rows.astype(np.float32)


@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_draw_has_the_moments_of_its_rows(monkeypatch: pytest.MonkeyPatch, in_a_file: bool) -> None:
    """Rows far from 0, in parts of other sizes than the buffer's."""
    monkeypatch.setattr(feature_sums, "BUFFER_BYTES", 8 * D * 4)
    monkeypatch.setattr(feature_sums, "DRAWS_BYTES", 0 if in_a_file else 1 << 20)
    rows = features()
    found = DrawnMoments(draw_counts(N, DRAWS, seed=3))
    for first in range(0, N, 7):
        found.add(rows[first : first + 7])

    whole = Moments()
    whole.add(rows)
    np.testing.assert_allclose(found.whole().covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    rng = BOOTSTRAP.generator(3)
    for i in range(found.draws):
        wanted = Moments()
        wanted.add(rows[rng.integers(N, size=N)])
        got = found.draw(i)
        assert got.count == wanted.count == N
        np.testing.assert_allclose(got.mean, wanted.mean, rtol=1e-12)
        np.testing.assert_allclose(got.covariance, wanted.covariance, rtol=1e-9, atol=1e-9)
    assert found.draws == DRAWS and isinstance(found._products, np.memmap) == in_a_file


def test_many_features_have_few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_sums, "MANY_FEATURES", D - 1)
    monkeypatch.setattr(feature_sums, "FEW_DRAWS", 2)
    found = DrawnMoments(draw_counts(N, DRAWS, seed=0))
    found.add(features())
    assert found.whole().count == N and found.draws == 2


def test_the_inception_score() -> None:
    """By its formula: 1 where classes say nothing, their number where each is sure and all are as frequent."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((N, 3)).astype(np.float32)
    counts = draw_counts(N, 2, seed=0)
    classes = DrawnClasses(counts)
    for first in range(0, N, 8):
        classes.add(logits[first : first + 8])

    def score(rows: Features) -> float:
        likely = np.exp(rows.astype(np.float64))
        likely /= likely.sum(axis=1, keepdims=True)
        return float(np.exp((likely * np.log(likely / likely.mean(axis=0))).sum(axis=1).mean()))

    drawn = [np.repeat(logits, count, axis=0) for count in counts]
    assert classes.scores() == pytest.approx([score(rows) for rows in (logits, *drawn)], rel=1e-9)
    for sure, wanted in ((0.0, 1.0), (100.0, 3.0)):
        one = DrawnClasses(draw_counts(6, 0, seed=0))
        one.add(np.float32(sure) * np.tile(np.eye(3, dtype=np.float32), (2, 1)))
        assert one.scores() == pytest.approx([wanted])


def test_memory_does_not_grow_with_the_number_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 times as many images: some bytes of counts each, and none of their 64 features."""
    monkeypatch.setattr(feature_sums, "BUFFER_BYTES", 1 << 18)
    monkeypatch.setattr(feature_sums, "MANIFOLD", 1000)

    def peak(n: int) -> int:
        tracemalloc.start()
        sums = FeatureSums(n, 10)
        for _ in range(0, n, 500):
            rows = np.random.default_rng(0).standard_normal((500, 64)).astype(np.float32)
            sums.add(ImageFeatures(rows, rows, rows), ImageFeatures(rows, rows, rows))
        assert sums.quantized.moments.whole().count == n
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(2_000), peak(32_000)
    assert many - few < 2 * 11 * 30_000 + (1 << 20) < 2 * 4 * 64 * 30_000
