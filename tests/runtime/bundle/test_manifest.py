"""mezzotint.json as a type: what is written is read again; a bundle of format 2 stays readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mezzotint.runtime.bundle.manifest import FORMAT_VERSION, Manifest, manifest_digest
from mezzotint.runtime.errors import BundleError
from tests.helpers.manifests import changed_manifest

FORMAT_2 = Path(__file__).parents[2] / "data" / "format_2.json"
"""The manifest of a bundle that version 0.1.0 wrote, with 14 passes and 13 quantizers."""


@pytest.fixture
def old() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(FORMAT_2.read_text(encoding="utf-8"))
    return data


def test_format_2_is_read_and_written_as_format_3(old: dict[str, Any]) -> None:
    assert old["format"] == 2 and manifest_digest(old) == old["digest"], "the digest of the original text"
    manifest = Manifest.from_json(old, str(FORMAT_2))
    data = manifest.to_json()
    assert data == {**old, "format": FORMAT_VERSION}
    assert list(data) == list(old), "in the same order"
    assert Manifest.from_json(data, "again") == manifest


def test_keys_of_format_2_have_their_new_names(old: dict[str, Any]) -> None:
    old["measured"] = {"bench": {"call_ms": 1.0, "faith": {"mend": [{"faith": 1}]}}}
    manifest = Manifest.from_json(old, "old")
    assert manifest.measured == {"bench": {"call_ms": 1.0, "fidelity": {"fix": [{"fidelity": 1}]}}}


def test_a_layer_may_be_called_like_an_old_key(old: dict[str, Any]) -> None:
    old["kernels"]["layers"]["mend"] = {"kernel": "Conv", "integer": False, "why": "island"}
    old["islands"]["faith"] = "first"
    manifest = Manifest.from_json(old, "old")
    assert manifest.kernels.layers["mend"].why == "island" and manifest.islands["faith"] == "first"


def test_every_key_of_format_3_comes_back(old: dict[str, Any]) -> None:
    entry = {"calls": 4, "cost": 0.5, "bytes": 1, "bytes_alone": 2, "integer_kernels": 3, "float_kernels": 4}
    recipe = {"name": "w8a8", "description": "eight bits", "passes": []}
    precision = {"file": "unet/model.onnx", "recipe": recipe, "compiled": "ab", **entry, "islands": {"conv": "why"}}
    manifest = changed_manifest(
        Manifest.from_json(old, "old"),
        card={"license": "mit"},
        noise={"form": "ptqd"},
        bits={"chosen": {}},
        measured={"eval": {}},
        digests_before=["cd"],
        precisions={"high": precision},
        precision_of_call=["high"] * 10,
        shared_bytes=7,
        precision_choice={"rule": "schedule"},
        quantizers=[{**old["quantizers"][-1], "row_bits": {"4": 3, "8": 5}, "levels": 8, "vectors": [64, 2]}],
    )
    assert Manifest.from_json(manifest.to_json(), "again") == manifest
    assert manifest.require_mixture().precisions["high"].recipe.name == "w8a8"
    assert manifest.quantizers[0].value == "h4" and manifest.quantizers[0].bits == manifest.quantizers[0].levels == 8


@pytest.mark.parametrize("name", ["inputs", "storage"])
def test_older_bundles_lack_two_keys(old: dict[str, Any], name: str) -> None:
    del old[name]
    manifest = Manifest.from_json(old, "old")
    assert name not in manifest.to_json()
    with pytest.raises(BundleError, match=f"the manifest has no `{name}`"):
        manifest.require_inputs() if name == "inputs" else manifest.require_storage()
    with pytest.raises(BundleError, match="the bundle has only one"):
        manifest.require_mixture()
