"""Configurations: what describes an architecture, whatever wrote it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.runtime.bundle.bundle import Bundle, open_bundle, seal_bundle
from mezzotint.runtime.bundle.model_config import (
    CONFIG,
    architecture,
    bundle_config,
    config_hash,
    differing_keys,
    public_config,
)
from mezzotint.runtime.errors import BundleError
from tests.helpers.models import Compiled

UNET: dict[str, Any] = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.42.1",
    "_name_or_path": "somewhere/on/this/machine",
    "block_out_channels": [32, 64],
    "class_embed_type": None,
    "norm_eps": 1e-5,
    "sample_size": 8,
    "freq_shift": 0,
    "encoder": {"widths": (1, 2.0)},
}
values = st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.integers())


def test_the_hash_is_that_of_canonical_json() -> None:
    text = '{"_class_name":"UNet2DModel","block_out_channels":[32,64],"encoder":{"widths":[1,2]},'
    text += '"freq_shift":0,"norm_eps":1e-05}'

    assert config_hash(UNET) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"_diffusers_version": "0.30.0"},
        {"_name_or_path": "elsewhere"},
        {"block_out_channels": (32, 64)},
        {"a_key_of_a_later_version": None},
        {"sample_size": 64},
        {"freq_shift": 0.0},
        {"encoder": {"widths": [1.0, 2]}},
    ],
)
def test_spellings_of_one_architecture(change: dict[str, Any]) -> None:
    changed = {**UNET, **change}

    assert config_hash(changed) == config_hash(UNET)
    assert differing_keys(changed, UNET) == {}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"_class_name": "UNet1DModel"}, {"_class_name": ("UNet1DModel", "UNet2DModel")}),
        ({"block_out_channels": [64, 32]}, {"block_out_channels": ([64, 32], [32, 64])}),
        ({"class_embed_type": "identity"}, {"class_embed_type": ("identity", "absent")}),
        ({"norm_eps": 1e-6}, {"norm_eps": (1e-6, 1e-5)}),
        ({"freq_shift": None}, {"freq_shift": ("absent", 0)}),
        ({"encoder": {"widths": [1, 3]}}, {"encoder": ({"widths": [1, 3]}, {"widths": [1, 2]})}),
    ],
)
def test_another_architecture(change: dict[str, Any], difference: dict[str, Any]) -> None:
    changed = {**UNET, **change}

    assert config_hash(changed) != config_hash(UNET)
    assert differing_keys(changed, UNET) == difference


def test_the_size_of_a_transformer_counts() -> None:
    transformer = {**UNET, "_class_name": "DiTTransformer2DModel"}

    assert config_hash({**transformer, "sample_size": 16}) != config_hash(transformer)


@given(st.dictionaries(st.text(), values), st.randoms())
def test_the_order_of_keys_does_not_count(config: dict[str, Any], random: Any) -> None:
    keys = list(config)
    random.shuffle(keys)
    shuffled = {key: config[key] for key in keys}

    assert config_hash(shuffled) == config_hash(config)
    assert config_hash(architecture(config)) == config_hash(config)


@given(st.dictionaries(st.text(), values), st.dictionaries(st.text(), values))
def test_hashes_differ_where_keys_do(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert (config_hash(one) == config_hash(other)) == (not differing_keys(one, other))


def test_where_a_model_came_from_is_not_kept() -> None:
    kept = public_config(UNET)

    assert list(kept) == sorted(set(UNET) - {"_name_or_path"})
    assert kept["class_embed_type"] is None, "what is not there is part of a configuration"


class TestBundle:
    """The file in a bundle."""

    def resealed(self, bundle: Bundle, folder: Path, text: str) -> Bundle:
        """A copy whose configuration is another, with hashes that fit."""
        for name in ("unet/model.onnx", "scheduler/scheduler_config.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes((bundle.path / name).read_bytes())
        (folder / CONFIG).write_text(text)
        seal_bundle(folder, bundle.manifest)
        return open_bundle(folder)

    def test_it_is_read(self, hand: Compiled, tmp_path: Path) -> None:
        config = public_config(UNET)

        assert bundle_config(self.resealed(hand.bundle, tmp_path, json.dumps(config))) == {
            **config,
            "encoder": {"widths": [1, 2.0]},
        }
        assert bundle_config(hand.bundle) is None, "an ONNX file that came without"

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"_class_name": 1}'])
    def test_nonsense_is_refused(self, hand: Compiled, tmp_path: Path, text: str) -> None:
        bundle = self.resealed(hand.bundle, tmp_path, text)

        with pytest.raises(BundleError, match=r"not readable JSON|does not name its class") as caught:
            bundle_config(bundle)
        assert caught.value.where == str(tmp_path / CONFIG)
