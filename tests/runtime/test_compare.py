"""Decibels against their definition, and where they are not numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.compare import StepSQNR, json_db, psnr_db, sqnr_db, ssim
from mezzotint.runtime.errors import InputError


def random_pair(seed: int, size: int = 64) -> tuple[AnyArray, AnyArray]:
    rng = np.random.default_rng(seed)
    signal = rng.normal(size=(2, 1, 4, size // 8)).astype(np.float32)
    return signal, signal + rng.normal(scale=0.1, size=signal.shape).astype(np.float32)


def check_ratio(found: float, signal: AnyArray, noisy: AnyArray) -> None:
    assert 10 ** (found / 10) == pytest.approx(np.mean(signal**2) / np.mean((noisy - signal) ** 2), rel=1e-4)


def test_sqnr_is_its_definition() -> None:
    signal, noisy = random_pair(1)
    check_ratio(sqnr_db(signal, noisy), signal, noisy)
    with pytest.raises(AssertionError):
        check_ratio(sqnr_db(signal * 1.01, noisy * 1.01 + 0.01), signal, noisy)


def test_one_percent_of_gain_is_forty_decibels() -> None:
    signal, _ = random_pair(2)
    assert sqnr_db(signal, signal * 1.01) == pytest.approx(40, abs=1e-3)


def test_the_ends_of_the_scale() -> None:
    signal, noisy = random_pair(3)
    assert sqnr_db(signal, signal.copy()) == math.inf
    assert sqnr_db(np.zeros(4), np.ones(4)) == -math.inf
    assert math.isnan(sqnr_db(signal, np.full_like(signal, np.nan)))
    assert [json_db(value) for value in (math.inf, -math.inf, math.nan, 3.5)] == [None, None, None, 3.5]
    with pytest.raises(InputError, match="cannot be compared"):
        sqnr_db(signal, noisy[:1])
    with pytest.raises(InputError, match="cannot be compared"):
        sqnr_db(np.zeros(0), np.zeros(0))


def test_integers_do_not_wrap() -> None:
    one, other = np.array([[0, 255]], dtype=np.uint8), np.array([[255, 0]], dtype=np.uint8)
    assert psnr_db(one, other, peak=255).tolist() == [0.0]


def test_psnr_of_each_image() -> None:
    reference = np.zeros((3, 1, 4, 4), dtype=np.float32)
    image = reference + np.array([0.0, 0.02, 0.2], dtype=np.float32)[:, None, None, None]
    found = psnr_db(reference, image, peak=2.0)
    assert found[0] == math.inf
    assert found[1:] == pytest.approx([40.0, 20.0], abs=1e-5)
    assert psnr_db(reference, image * 1.01, peak=2.0)[1:] != pytest.approx([40.0, 20.0], abs=1e-5)
    for peak, images in ((0.0, reference), (2.0, np.zeros(3))):
        with pytest.raises(InputError, match="peak"):
            psnr_db(images, images, peak=peak)


@given(cuts=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=12))
def test_parts_add_up_to_the_whole(cuts: list[tuple[int, bool]]) -> None:
    left, right, whole = StepSQNR(), StepSQNR(), StepSQNR()
    data: dict[int, list[tuple[AnyArray, AnyArray]]] = {}
    for seed, (step, to_left) in enumerate(cuts):
        pair = random_pair(seed)
        (left if to_left else right).add(step, *pair)
        whole.add(step, *pair)
        data.setdefault(step, []).append(pair)
    merged = left + right
    assert merged.pooled() == pytest.approx(whole.pooled(), rel=1e-12)
    assert set(merged.per_step()) == set(data)
    for step, pairs in data.items():
        signal, noisy = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        assert merged.per_step()[step] == pytest.approx(sqnr_db(signal, noisy), rel=1e-9)
        assert merged.per_step()[step] == pytest.approx(whole.per_step()[step], rel=1e-12)


def test_worst_step_and_json() -> None:
    steps = StepSQNR()
    signal, noisy = random_pair(4)
    steps.add(900, signal, signal)
    steps.add(500, signal, noisy)
    assert steps.worst() == (500, sqnr_db(signal, noisy))
    assert list(steps.per_step()) == [900, 500]
    data = json.loads(json.dumps(steps.to_json(), allow_nan=False))
    assert data["per_step"] == {"900": None, "500": sqnr_db(signal, noisy)}
    steps.add(100, signal, np.full_like(signal, np.nan))
    assert steps.worst()[0] == 100


def test_nothing_to_compare() -> None:
    assert math.isnan(StepSQNR().pooled())
    with pytest.raises(InputError, match="nothing was compared"):
        StepSQNR().worst()


def test_structural_similarity() -> None:
    """1 for the same picture, less the more of it is gone; a change of brightness alone matters little."""
    rng = np.random.default_rng(5)
    picture = rng.uniform(0, 2, (3, 1, 16, 12)).astype(np.float32)
    noise = rng.standard_normal(picture.shape).astype(np.float32)
    assert ssim(picture, picture, peak=2.0) == pytest.approx(np.ones(3))
    little, much = (ssim(picture, picture + np.float32(a) * noise, peak=2.0) for a in (0.1, 0.5))
    assert (much < little).all() and (little < 0.99).all() and (much > 0).all()
    assert (ssim(picture, picture + np.float32(0.05), peak=2.0) > little).all()
    tiny = ssim(picture[..., :3, :3], 2 - picture[..., :3, :3], peak=2.0)
    assert (tiny < 0).all()


def test_structural_similarity_of_other_ranks_has_windows_of_their_rank() -> None:
    """Audio is an image of height 1; of a video of equal frames each window is that of one frame."""
    rng = np.random.default_rng(5)
    audio = rng.uniform(0, 2, (2, 3, 20)).astype(np.float32)
    moved = audio + np.float32(0.1) * rng.standard_normal(audio.shape).astype(np.float32)
    image = ssim(audio[:, :, None], moved[:, :, None], peak=2.0)
    assert ssim(audio, moved, peak=2.0) == pytest.approx(image, rel=1e-12)
    one, other = (a.reshape(2, 3, 1, 4, 5).repeat(8, axis=2) for a in (audio, moved))
    frame = ssim(one[:, :, 0], other[:, :, 0], peak=2.0)
    assert ssim(one, other, peak=2.0) == pytest.approx(frame, rel=1e-9)
    assert ssim(one, other[:, :, ::-1] * 0.9, peak=2.0) != pytest.approx(frame, rel=1e-9)


@pytest.mark.parametrize(("shape", "peak"), [((4, 4), 2.0), ((1, 1, 4, 4), 0.0)])
def test_structural_similarity_refuses(shape: tuple[int, ...], peak: float) -> None:
    with pytest.raises(InputError, match="peak"):
        ssim(np.zeros(shape, np.float32), np.zeros(shape, np.float32), peak=peak)
