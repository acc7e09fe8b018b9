"""Denoisers of tokens, audio and video: from an exported file to samples, pages and figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from mezzotint import compile_model, open_bundle, read_shards, sample_to_folder
from mezzotint.bench.pairs import compare
from mezzotint.compiler.errors import ModelError
from mezzotint.debug.diagnose import diagnose
from mezzotint.evaluate.run import evaluate_bundle
from mezzotint.inspect.measure import PageOptions, measure_sections
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.web.page import check_bundle
from tests.helpers.models import Cli
from tests.helpers.ranks import KINDS, Kind, write_rank

RECIPE = {"tokens": "d2-dpm"}  # with a noise correction
INTEGER_CONVS = {"tokens": 0, "audio": 8, "video": 6}
INTEGER_MATMULS = {"tokens": 6, "audio": 0, "video": 0}


@dataclass(frozen=True)
class Ranked:
    kind: Kind
    module: torch.nn.Module
    file: Path
    bundle: Bundle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ranked]:
    """The network of a name with its float file and its bundle, each compiled once."""
    folder = tmp_path_factory.mktemp("ranks")

    @cache
    def compiled(name: str) -> Ranked:
        kind, file, exported = KINDS[name], folder / f"{name}.onnx", folder / f"{name}-float.onnx"
        module = write_rank(kind, file)
        bundle = compile_model(
            file,
            folder / name,
            recipe=RECIPE.get(name, "w8a8-steps"),
            scheduler="ddpm-linear",
            steps=3,
            calibration_samples=24,
            calibration_batch=12,
            size=kind.size,
            threads=2,
            export=exported,
            acceptance_seconds=0,
        )
        return Ranked(kind, module, exported, bundle)

    return compiled


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_of_any_rank_compiles_to_integers(made: Callable[[str], Ranked], name: str) -> None:
    """Its layers are integer kernels, its prediction is near torch's, and its samples near those of the float file."""
    net = made(name)
    bundle = open_bundle(net.bundle.path)
    operations, facts = bundle.manifest.kernels.operations, bundle.manifest.to_json()

    assert bundle.sample_shape == net.kind.shape and bundle.signature.channel_axis == net.kind.channel_axis
    assert ("channel_axis" in facts["signature"]) == (net.kind.channel_axis != 1)
    assert operations.get("QLinearConv", 0) >= INTEGER_CONVS[name]
    assert operations.get("com.microsoft.MatMulIntegerToFloat", 0) >= INTEGER_MATMULS[name]
    assert bundle.manifest.kernels.integer > bundle.manifest.kernels.floating
    x, t = np.random.default_rng(1).standard_normal((3, *net.kind.shape)).astype(np.float32), bundle.deployment.calls[0]
    with torch.no_grad():
        want = net.module(torch.from_numpy(x), torch.full((3,), t)).numpy()
    error = bundle.denoiser(threads=2)(x, t) - want
    assert 10 * np.log10(np.mean(want**2) / np.mean(error**2)) > 20
    found = compare(bundle, net.file, 3, batch=2, threads=2)
    assert found.quantized_images.shape == (3, *net.kind.shape)
    assert found.sqnr.pooled() > 20
    np.testing.assert_allclose(bundle.sample(1, seed=4, first=2), bundle.sample(3, seed=4)[2:], atol=1e-4)


def test_open_sizes_take_others(made: Callable[[str], Ranked]) -> None:
    net = made("video")
    x = np.random.default_rng(1).standard_normal((1, 4, 5, 4, 6)).astype(np.float32)
    with torch.no_grad():
        want = net.module(torch.from_numpy(x), torch.tensor([500])).numpy()
    error = net.bundle.denoiser(threads=2)(x, net.bundle.deployment.calls[0]) - want
    assert error.shape == x.shape
    for size, words in ((None, "--size NxNxN"), ((3, 8), "--size NxNxN"), ((3, 8, 8, 2), "--size NxNxN")):
        with pytest.raises(ModelError, match="open shape") as caught:
            compile_model(net.file, net.bundle.path.parent / "no", scheduler="ddpm-linear", size=size)
        assert words in (caught.value.hint or "")
    tokens = made("tokens")
    with pytest.raises(ModelError, match="samples are 12, not 13"):
        compile_model(tokens.file, tokens.bundle.path.parent / "no", scheduler="ddpm-linear", size=(13,))


def test_the_correction_knows_the_channels_of_tokens(made: Callable[[str], Ranked]) -> None:
    bundle = open_bundle(made("tokens").bundle.path)
    table = bundle.correction

    assert table is not None and table.channel_axis == 2 and table.shift.shape == (3, 6)
    with_table, without = (bundle.sample(2, correction=on) for on in (True, False))
    assert with_table.shape == (2, 12, 6) and not np.array_equal(with_table, without)


def test_what_is_for_images_says_so(made: Callable[[str], Ranked], tmp_path: Path, cli: Cli) -> None:
    for name, shape in (("tokens", "12x6"), ("audio", "6x16"), ("video", "4x3x8x8")):
        bundle = made(name).bundle
        said = cli("sample", bundle.path, "-n", 2, "-o", tmp_path / "x.png", "--quiet")
        assert said.code != 0 and f"samples of shape {shape} are not images" in said.err
        with pytest.raises(InputError, match="the page has no decoder"):
            check_bundle(bundle)
        assert cli("sample", bundle.path, "-n", 2, "-o", tmp_path / f"{name}.npy", "--quiet").code == 0
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), bundle.sample(2), atol=1e-5)
    with pytest.raises(InputError, match="are not images"):
        sample_to_folder(made("audio").bundle, tmp_path / "s", 3, format="png")
    sample_to_folder(made("audio").bundle, tmp_path / "s", 3, shard_size=2, threads=2)
    np.testing.assert_allclose(
        np.concatenate([rows for _, rows in read_shards(tmp_path / "s")]), made("audio").bundle.sample(3), atol=1e-5
    )


@pytest.mark.parametrize(("name", "view"), [("tokens", "sheet of its values"), ("video", "the middle frame")])
def test_measurements_take_any_rank(made: Callable[[str], Ranked], name: str, view: str) -> None:
    net = made(name)
    found = evaluate_bundle(net.bundle, net.file, 3, threads=2, speed=False, resamples=10)

    assert found.metrics["eps_sqnr_db"]["value"] > 20
    assert "are not images" in found.metrics["psnr_db_mean"]["why"]
    assert found.reference["same_weights"]
    assert len(diagnose(net.bundle, net.file, 1, calls=1, threads=2).layers) > 4
    page = measure_sections(net.bundle, PageOptions(net.file, pictures=2, calls=0, profile=False, threads=2))
    assert view in page["pictures"]["view"]
    assert [len(row["images"]) for row in page["pictures"]["rows"]] == [2, 2, 2]
