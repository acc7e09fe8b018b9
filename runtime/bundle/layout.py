"""Where the files of a bundle lie: in a folder of their own, or in the slot of a pipeline.

    a folder                            a slot: `unet/` or `transformer/` of a pipeline's folder
    unet/model.onnx (+ .data)           model.onnx (+ .data)
    unet/config.json                    config.json
    everything else                     the same

Programs that know ONNX pipelines (optimum) look for the network of a slot in the slot itself. A pipeline's folder has a
manifest of its own (pipeline.py), of the same name as a bundle's; commands that are given a pipeline take its denoiser.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from ..errors import BundleError
from ..json_text import read_json

MANIFEST = "mezzotint.json"
MODEL = "unet/model.onnx"
CONFIG = "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
CORRECTION = "correction.safetensors"
PIPELINE_FORMAT = "pipeline_format"
"""The key that the manifest of a pipeline has, and that of a bundle lacks."""
DENOISERS = ("unet", "transformer")
"""The slots of denoisers in a pipeline's folder."""
CONTROLNET = "controlnet"
"""The slot of the network that computes conditions of the denoiser at each call."""


def located(name: str, files: Container[str]) -> str:
    """Return where a bundle with these files has MODEL or CONFIG: under that name, or without its folder."""
    flat = name.rpartition("/")[2]
    return flat if name not in files and flat in files else name


def located_in(folder: Path, name: str) -> str:
    """Return the same for the files that lie in a folder."""
    flat = name.rpartition("/")[2]
    return flat if not (folder / name).is_file() and (folder / flat).is_file() else name


def is_pipeline(manifest: Any) -> bool:
    """Return whether a manifest, as plain data, is that of a pipeline."""
    return isinstance(manifest, dict) and PIPELINE_FORMAT in manifest


def bundle_folder(path: Path) -> Path:
    """Return the slot of the denoiser for the folder of a pipeline, and any other path as it is."""
    file = path / MANIFEST
    if not file.is_file():
        return path
    data = read_json(file, "the manifest", BundleError)
    if not is_pipeline(data):
        return path
    if data.get("denoiser") not in DENOISERS:
        raise BundleError("the manifest of the pipeline names no denoiser", where=str(file), hint="compile it again")
    return path / str(data["denoiser"])
