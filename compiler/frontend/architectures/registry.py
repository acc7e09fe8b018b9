"""The rows by the names of their classes."""

from __future__ import annotations

from collections.abc import Mapping

from ...errors import ModelError
from . import (
    audio,
    cogvideox,
    dit,
    flux,
    hunyuan_dit,
    kandinsky3,
    ltx,
    lumina2,
    mmdit,
    pixart,
    qwen_image,
    sana,
    unet,
    unet_condition,
    unet_video,
    video,
    z_image,
)
from .row import Architecture

_ROWS = (
    *(unet.UNET2D, unet_condition.UNET2D_CONDITION, kandinsky3.KANDINSKY3),
    *(unet_video.ANIMATED, unet_video.UNET3D, unet_video.STABLE_VIDEO, audio.UNET1D, audio.AUDIOLDM2),
    *(dit.DIT, pixart.PIXART, hunyuan_dit.HUNYUAN_DIT, mmdit.SD3, mmdit.AURAFLOW, sana.SANA),
    *(flux.FLUX, flux.FLUX2, flux.CHROMA, qwen_image.QWEN_IMAGE, lumina2.LUMINA2, z_image.Z_IMAGE),
    *(video.WAN, video.HUNYUAN_VIDEO, cogvideox.COGVIDEOX, ltx.LTX, audio.STABLE_AUDIO),
)
ROWS: Mapping[str, Architecture] = {row.name: row for row in _ROWS}


def architecture_row(name: str, where: str) -> Architecture:
    """Return the row of a class. Raises ModelError for a class that has none."""
    if name not in ROWS:
        raise unsupported(name, where)
    return ROWS[name]


def unsupported(name: str, where: str) -> ModelError:
    """Return the error for a class that has no row."""
    return ModelError(
        f"{name} cannot be exported yet; docs/models.md lists the {len(ROWS)} classes that can",
        where=where,
        hint="export it to ONNX yourself and compile the .onnx file",
    )
