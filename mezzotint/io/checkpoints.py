"""Single-file checkpoints (.safetensors), pickles, and ids of models on the hub, as a MODEL argument.

A checkpoint has weights only. The configuration of its network is that of a diffusers folder, which need not have any
weights: one that is named, or one next to the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.weight_files import PICKLES

CHECKPOINT = ".safetensors"
_CONFIG = "config.json"
_SLOTS = ("unet", "transformer", ".")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def missing_model(path: Path) -> ModelError:
    """Return the error for a MODEL that is not there, which may be an id of the hub."""
    name = path.as_posix()
    if _HUB.fullmatch(name) and not path.parent.exists():
        return ModelError(
            f"{name!r} is no local folder, and Mezzotint downloads nothing",
            where=name,
            hint=f"a model of the Hugging Face hub: hf download {name} --local-dir FOLDER, then compile FOLDER",
        )
    return ModelError(
        "there is no such model",
        where=str(path),
        hint="give `digits`, `digits-dit`, a diffusers folder, or an .onnx file",
    )


def refuse_pickle(path: Path) -> None:
    """Raise ModelError for a file whose loading may run code."""
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"a {path.suffix} file is a pickle, which may run code when it is loaded",
            where=str(path),
            hint="convert it to .safetensors where you trust it",
        )


def config_folder(checkpoint: Path, config: str | Path | None) -> Path:
    """Return the folder with the config.json of a checkpoint's network. Raises ModelError where there is none."""
    places = [checkpoint.parent] if config is None else [Path(config)]
    if config is not None and places[0].name == _CONFIG:
        places = [places[0].parent]
    folders = [place / slot for place in places for slot in _SLOTS]
    found = next((folder for folder in folders if (folder / _CONFIG).is_file()), None)
    if found is None:
        raise ModelError(
            "a checkpoint has no configuration of its network"
            if config is None
            else f"there is no config.json in {places[0]} or its unet/ or transformer/",
            where=str(checkpoint),
            hint="name a diffusers folder of the same architecture with --config FOLDER; its unet/config.json (or "
            "transformer/config.json) and scheduler/ are enough",
        )
    return found
