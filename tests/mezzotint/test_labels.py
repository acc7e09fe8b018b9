"""A network whose conditions are class labels, as its configuration says, needs no files of conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.bench.pairs import compare
from mezzotint.compiler.errors import ConditionError
from mezzotint.debug.diagnose import diagnose
from mezzotint.runtime.signature import ClassLabels
from mezzotint.shards.shards import sample_to_folder
from tests.helpers.labels import CLASSES, labelled
from tests.helpers.models import SMALL


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def bundle(network: Path) -> Bundle:
    return compile_model(network, network.parent / "bundle", recipe="w8a8", guidance=3.0, **SMALL)


def test_it_compiles_and_says_what_its_labels_are(bundle: Bundle) -> None:
    assert bundle.signature.labels == (ClassLabels("class_labels", CLASSES, CLASSES),)
    assert bundle.deployment.guided and bundle.manifest.acceptance is not None


def test_image_i_has_class_i(bundle: Bundle) -> None:
    given: dict[str, Any] = {"unconditional": {"class_labels": np.array([CLASSES])}}
    turns = {"class_labels": np.array([0, 1, 2, 0, 1])}
    every = bundle.sample(5, conditions=turns, **given)
    np.testing.assert_array_equal(bundle.sample(5), every)
    np.testing.assert_array_equal(bundle.sample(2, first=3, batch=1), every[3:])
    assert np.abs(bundle.sample(5, conditions={"class_labels": np.array([0])}) - every)[1:3].max() > 1e-3


def test_shards_have_the_same_images(bundle: Bundle, tmp_path: Path) -> None:
    sample_to_folder(bundle, tmp_path / "shards", 5, shard_size=2)
    files = sorted((tmp_path / "shards").glob("*.npz"))
    drawn = np.concatenate([next(iter(np.load(file).values())) for file in files])
    np.testing.assert_array_equal(drawn, bundle.sample(5))


def test_it_is_measured_without_conditions(bundle: Bundle, network: Path) -> None:
    labels = {"class_labels": np.arange(CLASSES)}
    mine, named = (compare(bundle, network, 4, conditions=rows) for rows in (None, labels))
    np.testing.assert_array_equal(mine.float_images, named.float_images)
    np.testing.assert_array_equal(mine.psnr, named.psnr)


def test_debug_calibrates_again_on_the_same_labels(network: Path, tmp_path: Path) -> None:
    """smooth_scales rewrites the float graph from statistics; the command line gives no rows as an empty mapping."""
    bundle = compile_model(network, tmp_path / "bundle", recipe="w8a8-steps", guidance=3.0, **SMALL)
    given: tuple[dict[str, Any] | None, ...] = (None, {})
    for rows in given:
        assert diagnose(bundle, network, calls=1, conditions=rows, unconditional=rows).layers


def test_a_random_half_has_no_class(network: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMALL, "recipe": "w8a8", "guidance": 3.0}
    drawn: dict[str, Any] = {"conditions": "random", "unconditional": "random", **options}
    bundle = compile_model(network, tmp_path / "random", **drawn)
    plain = compile_model(network, tmp_path / "plain", **options)
    assert bundle.manifest.quantizers == plain.manifest.quantizers


def test_without_a_configuration_labels_are_asked_for(network: Path, tmp_path: Path) -> None:
    alone = tmp_path / "model.onnx"
    alone.write_bytes(network.read_bytes())
    with pytest.raises(ConditionError, match="no data to calibrate it on"):
        compile_model(alone, tmp_path / "bundle", recipe="w8a8", **SMALL)
