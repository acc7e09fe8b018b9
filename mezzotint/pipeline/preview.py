"""The picture of a pipeline's latents while they are denoised: `mezzotint sample --prompt --preview FILE.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.runtime.errors import InputError

from ..io.images import check_image_file, check_place, save_picture
from ..prompts.calls import library

PACKED, IMAGES = 3, 4  # axes of latents: tokens of 2x2 patches, images


class Preview:
    """A PNG file that each step of a pipeline replaces with its latents, decoded by the pipeline's VAE.

    Raises InputError for another ending than .png, OutputError for a place that cannot be written.
    """

    def __init__(self, file: Path) -> None:
        check_image_file(file)
        if file.suffix != ".png":
            raise InputError("a preview is a picture", where=str(file), hint="give a file that ends in .png")
        check_place(file)
        self._file = file

    def show(self, pipe: Any, latents: Any, height: int | None, width: int | None) -> None:
        """Decode the first latents of a step and write them. Raises InputError for those of a video."""
        one = latents[:1]
        if one.ndim == PACKED and hasattr(pipe, "_unpack_latents") and height and width:
            one = pipe._unpack_latents(one, height, width, pipe.vae_scale_factor)
        if one.ndim != IMAGES:
            raise InputError(
                f"a {type(pipe).__name__} has latents of {latents.ndim} axes, of which no preview is made",
                where="--preview",
                hint="leave it out",
            )
        config = pipe.vae.config
        scaled = one / config.scaling_factor + (config.get("shift_factor") or 0.0)
        with library("torch").no_grad():
            [decoded] = pipe.vae.decode(scaled, return_dict=False)
        save_picture(np.asarray(decoded[0].numpy(), np.float32), self._file)
