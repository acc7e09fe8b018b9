"""The picture of a pipeline's latents while they are denoised: `mezzotint sample --prompt --preview FILE.png`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.runtime.errors import InputError

from ..io.images import check_image_file, check_place, save_picture
from ..prompts.calls import library

PACKED, IMAGES, FRAMES = 3, 4, 5  # axes of latents: tokens of 2x2 patches, images, images of one frame


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
        if one.ndim not in (IMAGES, FRAMES) or (one.ndim == FRAMES and one.shape[2] != 1):
            raise InputError(
                f"a {type(pipe).__name__} has latents of {latents.ndim} axes, of which no preview is made",
                where="--preview",
                hint="leave it out",
            )
        with library("torch").no_grad():
            [decoded] = pipe.vae.decode(_scaled(one, pipe.vae.config), return_dict=False)
        picture = decoded[0] if one.ndim == IMAGES else decoded[0, :, 0]
        save_picture(np.asarray(picture.numpy(), np.float32), self._file)


def _scaled(latents: Any, config: Any) -> Any:
    """Return latents in the scale of the VAE: of one factor, or of a mean and a deviation for each channel."""
    if "scaling_factor" in config:
        return latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, deviation = (library("torch").tensor(config[f"latents_{name}"]).view(shape) for name in ("mean", "std"))
    return latents * deviation + mean
