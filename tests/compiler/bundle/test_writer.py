"""write_bundle: large models, whose weights lie in a file of their own, and what only some cards say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.compiler.bundle import writer
from mezzotint.compiler.bundle.card import card_text
from mezzotint.compiler.errors import AcceptanceError
from mezzotint.compiler.graph import weight_store as store
from mezzotint.runtime.bundle.bundle import MODEL
from tests.helpers.models import SMALL, Compiled


def compiled(unet: Compiled, folder: Path, monkeypatch: pytest.MonkeyPatch, inline: int) -> Bundle:
    monkeypatch.setattr(writer, "EXTERNAL_BYTES", 0)
    monkeypatch.setattr(store, "SIZES_BYTES", inline)
    return compile_model(unet.exported, folder / "b", recipe="w8a8-steps", size=unet.bundle.sample_shape[1:], **SMALL)


def test_weights_lie_beside_the_graph(unet: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = compiled(unet, tmp_path, monkeypatch, store.SIZES_BYTES)
    model = onnx.load(bundle.path / MODEL, load_external_data=False)
    outside = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert outside and not any(t.data_type == onnx.TensorProto.INT64 for t in outside)
    x = np.zeros((1, *bundle.sample_shape), np.float32)
    assert np.isfinite(bundle.denoiser(1)(x, bundle.deployment.timesteps[0])).all()


def test_the_sizes_of_a_split_must_not(unet: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the limit guards against: onnxruntime's shape inference does not read other files."""
    with pytest.raises(AcceptanceError, match="Split"):
        compiled(unet, tmp_path, monkeypatch, 64)


def test_the_card_for_openvino_names_plain_bfloat16(hand: Compiled) -> None:
    """It may be the better choice, and needs no bundle."""
    manifest, folder = hand.bundle.manifest, hand.bundle.path
    assert "plain bfloat16" in card_text(replace(manifest, target="openvino"), folder)
    assert "plain bfloat16" not in card_text(manifest, folder)
