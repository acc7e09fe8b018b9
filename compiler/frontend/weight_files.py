"""Which weights of a diffusers folder are read: the plain ones, or a variant of them, as fp16.

Files are `diffusion_pytorch_model.safetensors`, with a variant `diffusion_pytorch_model.fp16.safetensors`; shards have
an index, `diffusion_pytorch_model.safetensors.index.json`, or `diffusion_pytorch_model.safetensors.index.fp16.json`.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from mezzotint.runtime.errors import CompileWarning

from ..errors import ModelError
from .folder_checks import WEIGHTS_STEM

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
"""Endings of files whose loading may run code."""
_FILE = re.compile(rf"{WEIGHTS_STEM}(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors")
_INDEX = re.compile(rf"{WEIGHTS_STEM}\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json")


def variants(folder: Path) -> list[str | None]:
    """Return the variants of a folder's weights, None for the plain ones, which come first."""
    matches = [pattern.fullmatch(file.name) for file in folder.iterdir() for pattern in (_FILE, _INDEX)]
    found = {match["variant"] for match in matches if match}
    return sorted(found, key=lambda variant: variant or "")


def chosen_variant(folder: Path, requested: str | None) -> str | None:
    """Return the variant to read: the one asked for, else the plain weights, else the only one, with a warning.

    Raises ModelError for a variant that the folder does not have, and where there are several and no plain weights.
    """
    known = variants(folder)
    names = ", ".join("the plain ones" if variant is None else str(variant) for variant in known)
    if requested is not None:
        if requested not in known:
            raise ModelError(
                f"the folder has no weights of the variant {requested!r}: it has {names}",
                where=str(folder),
                hint="name one of these with --variant, or leave it out",
            )
        return requested
    if None in known or not known:
        return None
    if len(known) > 1:
        raise ModelError(
            f"the folder has weights of several variants: {names}",
            where=str(folder),
            hint=f"choose one: --variant {known[0]}",
        )
    warnings.warn(
        f"{folder}: the weights are those of the variant {known[0]}, the only one here", CompileWarning, stacklevel=2
    )
    return known[0]
