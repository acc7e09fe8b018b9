"""Float beside quantized, on the same noise."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mezzotint import compile_model
from mezzotint.bench.pairs import compare, folder_bytes, latency_ratio, unseen_seed
from tests.helpers.models import SMALL, THREADS, Compiled, hand_written, write


def test_the_same_noise_gives_nearly_the_same_pictures(hand: Compiled) -> None:
    seen: list[tuple[str, int, int]] = []

    found = compare(hand.bundle, hand.exported, 3, batch=2, threads=THREADS, progress=lambda *a: seen.append(a))

    assert found.float_images.shape == found.quantized_images.shape == (3, 1, 8, 8)
    np.testing.assert_array_equal(
        found.quantized_images, hand.bundle.sample(3, seed=unseen_seed(hand.bundle), threads=THREADS)
    )
    assert 0 < np.abs(found.float_images - found.quantized_images).max() < 0.5
    assert found.psnr.shape == (3,)
    assert seen[-1][1] == seen[-1][2]
    assert json.loads(json.dumps(found.to_json()))["eps_sqnr_db"] > 20


def test_the_float_model_beside_itself_is_identical(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("float")
    bundle = compile_model(hand.exported, folder / "bundle", recipe="float", **SMALL)

    found = compare(bundle, bundle.model_path, 2, threads=THREADS).to_json()

    assert found["eps_sqnr_db"] is found["psnr_db_median"] is None, "infinitely good, which JSON cannot say"


def test_conditions_are_sliced_like_the_noise(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("context")
    source = write(hand_written(context="context"), folder / "m.onnx")
    given = {"context": np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)}
    bundle = compile_model(source, folder / "bundle", conditions=given, **SMALL)

    whole = compare(bundle, source, 3, batch=3, threads=THREADS, conditions=given)
    parts = compare(bundle, source, 3, batch=2, threads=THREADS, conditions=given)
    other = compare(bundle, source, 3, batch=3, threads=THREADS, conditions={"context": given["context"][::-1].copy()})

    np.testing.assert_allclose(parts.float_images, whole.float_images, atol=1e-4)
    assert np.abs(other.float_images - whole.float_images).max() > 0.01


def test_latencies_are_positive(hand: Compiled) -> None:
    before, after, ratio = latency_ratio(hand.bundle, hand.exported, 2, threads=THREADS, repeats=2)

    assert before > 0
    assert after > 0
    assert ratio == pytest.approx(before / after, rel=1e-9)


def test_bytes_count_the_external_data(hand: Compiled, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    write(hand_written(), folder / "m.onnx", external="m.onnx.data")

    expected = sum(f.stat().st_size for f in folder.iterdir())
    assert folder_bytes(folder / "m.onnx") == expected
    assert folder_bytes(hand.exported) == hand.exported.stat().st_size
