"""The images that the ControlNet of a pipeline reads while it is compiled: a caller's own, or line drawings.

What a ControlNet reads (edges, depths, poses) is made by another program, so a caller gives it. Without it the images
are drawn here: white lines on black, as an edge detector makes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from mezzotint.compiler.errors import ConditionError
from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.signature import Images

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MOST_CONTROLS = 512
DRAWN = 8  # images where none are given
_HELD_OUT = 2
_SHAPES = 6  # of a drawing
_STEPS = tuple(math.sqrt(prime) % 1 for prime in (2, 3, 5, 7, 11))  # multiples of these fill an interval evenly


@dataclass(frozen=True, eq=False)
class ControlImages:
    """Images float32 `[n, 3, H, W]` in [0, 1]: those to calibrate on, and others to measure on where there are some."""

    own: Images
    held_out: Images
    words: str


def control_images(place: Path | None, height: int, width: int) -> ControlImages:
    """Return the images of a folder or of one file, in this size, or line drawings for None. Raises ConditionError."""
    if place is None:
        drawings = np.stack([line_drawing(i, height, width) for i in range(DRAWN)])
        return ControlImages(drawings[_HELD_OUT:], drawings[:_HELD_OUT], "line drawings made by the compiler")
    files = [place] if place.is_file() else _files(place)
    images = np.stack([read_control(file, height, width, ConditionError) for file in files])
    apart = min(_HELD_OUT, len(images) // 2)
    own = images[: len(images) - apart]
    words = f"{len(own)} control images" + (f", measured on {apart} others" if apart else "")
    return ControlImages(own, images[len(images) - apart :] if apart else own, words)


def _files(folder: Path) -> list[Path]:
    where = str(folder)
    if not folder.is_dir():
        raise ConditionError("there is no such folder", where=where, hint="give a folder of control images, or one")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in ENDINGS)
    if not files:
        raise ConditionError("the folder has no images", where=where, hint=f"give some of {', '.join(ENDINGS)}")
    return files[:MOST_CONTROLS]


def read_control(file: Path, height: int, width: int, error: type[MezzotintError] = InputError) -> Images:
    """Return an image file as float32 `[3, height, width]` in [0, 1]. Raises `error` for one that cannot be read."""
    try:
        with Image.open(file) as opened:
            scaled = opened.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as failure:
        line = (str(failure).splitlines() or [type(failure).__name__])[0][:300]
        raise error(
            f"the control image cannot be read: {line}", where=str(file), hint="give a .png or .jpg"
        ) from failure
    return np.asarray(scaled, np.float32).transpose(2, 0, 1) / np.float32(255)


def line_drawing(number: int, height: int, width: int) -> Images:
    """Return a drawing of lines, ellipses and rectangles, float32 `[3, height, width]` of 0 and 1; each number is
    another one."""
    sheet = Image.new("L", (width, height))
    canvas, thick = ImageDraw.Draw(sheet), max(1, min(height, width) // 128)
    for shape in range(_SHAPES):
        index = 1 + number * _SHAPES + shape
        x, y, across, down, turn = (index * step % 1 for step in _STEPS)
        left, right = sorted((x, (x + 0.15 + 0.7 * across) % 1))
        top, bottom = sorted((y, (y + 0.15 + 0.7 * down) % 1))
        box = (left * width, top * height, right * width, bottom * height)
        if shape % 3 == 0:
            canvas.ellipse(box, outline=255, width=thick)
        elif shape % 3 == 1:
            canvas.line(box if turn < 0.5 else (box[0], box[3], box[2], box[1]), fill=255, width=thick)
        else:
            canvas.rectangle(box, outline=255, width=thick)
    drawn = np.asarray(sheet, np.float32)[None] / np.float32(255)
    return np.repeat(drawn, 3, axis=0)
