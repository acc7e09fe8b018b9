"""Image files: grids of float images in [-1, 1] as PNG, raw arrays, and grids side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from mezzotint.compiler.bundle.staging import Claim
from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import Images, no_image

from .files import replacing

Pixels = npt.NDArray[np.uint8]
MARGIN = 2  # pixels between the images of a grid
PAPER = 255


def to_pixels(images: Images) -> Pixels:
    """Return images `[n, 1 or 3, H, W]` in [-1, 1] as 8-bit pixels `[n, H, W, C]`; values outside are clipped."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise _not_images(f"samples of shape {list(images.shape)} are not images")
    pixels: Pixels = np.rint((np.clip(images, -1, 1) + 1) * 127.5).astype(np.uint8).transpose(0, 2, 3, 1)
    return pixels


def from_pixels(pixels: Pixels) -> Images:
    """Return pixels `[n, H, W, C]` as float32 `[n, C, H, W]` in [-1, 1]: the inverse of `to_pixels` to within 1/255."""
    return (pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - np.float32(1)).astype(np.float32)


def picture(pixels: Pixels) -> Image.Image:
    """Return pixels `[H, W, 1 or 3]` as a Pillow image, grey or RGB."""
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def grid(images: Images, columns: int | None = None) -> Image.Image:
    """Return a grid of images `[n, 1 or 3, H, W]` in [-1, 1]: `columns` wide, or nearly square when left out."""
    pixels = to_pixels(images)
    n, height, width, channels = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    size = (rows * (height + MARGIN) + MARGIN, columns * (width + MARGIN) + MARGIN, channels)
    sheet = np.full(size, PAPER, np.uint8)
    for i, one in enumerate(pixels):
        top, left = MARGIN + i // columns * (height + MARGIN), MARGIN + i % columns * (width + MARGIN)
        sheet[top : top + height, left : left + width] = one
    return picture(sheet)


def side_by_side(grids: dict[str, Image.Image], scale: int = 1) -> Image.Image:
    """Return one image with the grids next to each other, each below its title, enlarged by a whole factor."""
    title, margin = 18, 8
    scaled = {
        name: g.resize((g.width * scale, g.height * scale), Image.Resampling.NEAREST) for name, g in grids.items()
    }
    width = sum(g.width + margin for g in scaled.values()) + margin
    height = max(g.height for g in scaled.values()) + title + margin
    sheet = Image.new("RGB", (width, height), "white")
    canvas = ImageDraw.Draw(sheet)
    left = margin
    for name, drawn in scaled.items():
        canvas.text((left, 3), name, fill="black")
        sheet.paste(drawn, (left, title))
        left += drawn.width + margin
    return sheet


def check_image_file(path: Path, shape: Sequence[int] | None = None) -> None:
    """Refuse a path that `save_images` cannot write, before an hour of sampling: by ending, sizes and place."""
    if path.suffix not in (".png", ".npy"):
        raise InputError(f"cannot write a {path.suffix or 'nameless'} file", where=str(path), hint="use .png or .npy")
    if path.suffix == ".png":
        check_images(shape, path)
    if path.is_dir():
        raise OutputError("cannot write there", where=str(path), hint="choose another place")
    check_place(path)


def check_images(shape: Sequence[int] | None, path: Path | str) -> None:
    """Refuse other samples than images where an image file is to be written. None stands for an unknown shape."""
    if shape is not None and (reason := no_image(shape)) is not None:
        raise _not_images(reason, str(path))


def check_place(path: Path) -> None:
    """Raise OutputError for a path where no file can be created."""
    if path.is_dir():
        raise OutputError("there is a folder of that name", where=str(path), hint="give the path of a file")
    place = next((p for p in path.absolute().parents if p.exists()), Path())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise OutputError("cannot write there", where=str(path), hint="choose another place")


def _not_images(reason: str, where: str | None = None) -> InputError:
    hint = "save the samples with -o FILE.npy, or in a folder with --format npz; latents have to be decoded first"
    return InputError(reason, where=where, hint=hint)


def save_picture(image: Images, path: Path, claim: Claim | None = None) -> None:
    """Write one image `[1 or 3, H, W]` in [-1, 1] as a PNG of its size. Raises as `save_images`."""
    check_image_file(path)
    with replacing(path, claim) as part, part.open("wb") as file:
        picture(to_pixels(image[None])[0]).save(file, format="PNG")


def save_images(images: Images, path: Path, columns: int | None = None, claim: Claim | None = None) -> None:
    """Write a PNG grid, or the float32 array for a path that ends in .npy. An earlier file is replaced at the end.

    A `claim` was made on that file when a long command began.

    Raises InputError for other endings and for latents, OutputError for a place that cannot be written.
    """
    check_image_file(path)
    with replacing(path, claim) as part, part.open("wb") as file:
        if path.suffix == ".npy":
            np.save(file, images)
        else:
            grid(images, columns).save(file, format="PNG")
