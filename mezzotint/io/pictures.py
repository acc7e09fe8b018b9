"""Picture grids: float images in [-1, 1] to a PNG file, and pairs of grids side by side."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.errors import InputError

from .files import replacing

Images = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]
GAP = 2  # pixels between pictures
PAPER = 255


def to_pixels(images: Images) -> Pixels:
    """Pictures `[n, 1 or 3, H, W]` in [-1, 1] as 8-bit pixels `[n, H, W, C]`; what lies outside is clipped."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise _no_pictures(f"samples of shape {list(images.shape)}")
    pixels: Pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels


def from_pixels(pixels: Pixels) -> Images:
    """The way back, to within 1/255: `[n, H, W, C]` as float32 `[n, C, H, W]` in [-1, 1]."""
    return (pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1)).astype(np.float32)


def picture(pixels: Pixels) -> Image.Image:
    """Pixels `[H, W, 1 or 3]` as a picture, grey or RGB."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Images, columns: int | None = None) -> Image.Image:
    """A grid of pictures `[n, 1 or 3, H, W]` in [-1, 1], as square as it gets, `columns` wide when given."""
    pixels = to_pixels(images)
    n, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    sheet = np.full((rows * (height + GAP) + GAP, columns * (width + GAP) + GAP, channels), PAPER, np.uint8)
    for i, one in enumerate(pixels):
        top, left = GAP + i // columns * (height + GAP), GAP + i % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = one
    return picture(sheet)


def side_by_side(grids: dict[str, Image.Image], scale: int = 1) -> Image.Image:
    """Grids beside each other, each with its title above, enlarged by a whole factor."""
    title, margin = 18, 8
    scaled = {
        name: g.resize((g.width * scale, g.height * scale), Image.Resampling.NEAREST) for name, g in grids.items()
    }
    width = sum(g.width + margin for g in scaled.values()) + margin
    height = max(g.height for g in scaled.values()) + title + margin
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    left = margin
    for name, drawn in scaled.items():
        draw.text((left, 3), name, fill="black")
        sheet.paste(drawn, (left, title))
        left += drawn.width + margin
    return sheet


def check_target(path: Path, channels: int | None = None) -> None:
    """Refuse what `save` cannot write, before an hour of sampling and not after: endings, latents, places."""
    if path.suffix not in (".png", ".npy"):
        raise InputError(f"cannot write a {path.suffix or 'nameless'} file", where=str(path), hint="use .png or .npy")
    if path.suffix == ".png":
        check_channels(channels, path)
    if path.is_dir():
        raise OutputError("cannot write there", where=str(path), hint="choose another place")
    check_place(path)


def check_channels(channels: int | None, path: Path) -> None:
    """Refuse latents where pictures are to be written; None is not known yet."""
    if channels not in (1, 3, None):
        raise _no_pictures(f"samples of {channels} channels", str(path))


def check_place(path: Path) -> None:
    """Refuse a path that no file can be made at."""
    if path.is_dir():
        raise OutputError("there is a folder of that name", where=str(path), hint="say which file to write")
    place = next((p for p in path.absolute().parents if p.exists()), Path())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OutputError("cannot write there", where=str(path), hint="choose another place")


def _no_pictures(what: str, where: str | None = None) -> InputError:
    return InputError(
        f"{what} are no pictures",
        where=where,
        hint="latents have to be decoded first: save them with -o FILE.npy, or in a folder with --format npz",
    )


def save(images: Images, path: Path, columns: int | None = None) -> None:
    """A PNG grid, or the raw float32 array when the file ends in .npy; a file that exists is replaced when all is well.

    Raises InputError for other endings and for latents, OutputError where it cannot be written.
    """
    check_target(path)
    with replacing(path) as part, part.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, images)
        else:
            grid(images, columns).save(file, format="PNG")
