"""Checks of a diffusers folder before diffusers reads it, and of what it loaded.

diffusers builds a network of any size that config.json asks for, waits for a pipe, and fills in random numbers for
weights that a file lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint.runtime.json_text import require_file

from ..errors import ModelError
from ..graph.limits import check_limit

WEIGHTS_STEM = "diffusion_pytorch_model"
LARGEST = 1 << 20  # of a number of the configuration; prompts and channels are far below
MOST_LAYERS = 512  # of one block, and blocks of a network
_HINT = "download the model again"


def check_folder(folder: Path, config: Mapping[str, Any], *, weights: bool = True) -> None:
    """Raise ModelError for a configuration with absurd sizes, and for `weights` that are no safetensors files."""
    where = str(folder / "config.json")
    for key, value in config.items():
        for number in value if isinstance(value, list) else [value]:
            most = MOST_LAYERS if "layer" in key else LARGEST
            if isinstance(number, (int, float)) and not isinstance(number, bool) and not -most <= number <= most:
                raise ModelError(f"the configuration's {key!r} is {value!r}"[:200], where=where, hint=_HINT)
        if isinstance(value, list) and len(value) > MOST_LAYERS:
            raise ModelError(f"the configuration's {key!r} has {len(value)} entries", where=where, hint=_HINT)
    sides = config.get("sample_size")
    height, width = sides if isinstance(sides, list) and len(sides) == 2 else (sides, sides)
    numbers = [height, width, config.get("in_channels", 1)]
    if all(isinstance(number, int) for number in numbers):
        size = abs(numbers[0] * numbers[1] * numbers[2])
        check_limit("constants", size, f"one sample of the configuration has {numbers} numbers", where)
    if weights:
        _check_weights(folder)


def _check_weights(folder: Path) -> None:
    files = [*folder.glob(f"{WEIGHTS_STEM}*.safetensors"), *folder.glob(f"{WEIGHTS_STEM}*.safetensors.index.json")]
    if not files:
        pickles = [file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in folder.glob(pattern)]
        raise ModelError(
            f"the weights are a pickle ({pickles[0]}), which may run code when it is loaded"
            if pickles
            else f"the folder has no weights ({WEIGHTS_STEM}.safetensors)",
            where=str(folder),
            hint="save the model again as safetensors: model.save_pretrained(FOLDER)",
        )
    for file in files:
        require_file(file, "the weights", ModelError, _HINT)


def check_loaded(info: Mapping[str, Sequence[Any]], place: Path) -> None:
    """Raise ModelError where diffusers filled in weights that the file lacks, or left out some that it has."""
    for kind, what in (
        ("missing_keys", "the file lacks a weight of the network"),
        ("mismatched_keys", "a weight of the file has another shape than the network's"),
        ("unexpected_keys", "the file has a weight that the network does not have"),
    ):
        if names := [str(name)[:200] for name in info.get(kind, ())]:
            raise ModelError(
                f"{what}: {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""),
                where=str(place),
                hint="check that config.json and the weights belong together and are complete",
            )
