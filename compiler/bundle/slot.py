"""The bundle of a denoiser becomes the slot of a pipeline's folder, where other programs look for `model.onnx`."""

from __future__ import annotations

from pathlib import Path

from mezzotint.runtime.bundle.bundle import open_bundle, seal_bundle
from mezzotint.runtime.bundle.layout import MODEL

from .card import CARD, card_text
from .staging import write_text


def make_slot(bundle: Path) -> None:
    """Move the network and its configuration to the top of a bundle's folder, write its card again, and seal it.

    The folder must not be in use: `bundle` is one that this process has just written.
    """
    manifest = open_bundle(bundle, verify=False).manifest
    folder = (bundle / MODEL).parent
    for file in sorted(folder.iterdir()):
        file.rename(bundle / file.name)
    folder.rmdir()
    write_text(bundle / CARD, card_text(manifest, bundle))
    seal_bundle(bundle, manifest)
