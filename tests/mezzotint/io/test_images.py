"""Grids of images, and the files that they are saved to."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mezzotint.compiler.errors import OutputError
from mezzotint.io.images import (
    MARGIN,
    PAPER,
    check_image_file,
    from_pixels,
    grid,
    picture,
    save_images,
    side_by_side,
    to_pixels,
)
from mezzotint.runtime.errors import InputError


def images_of(n: int, channels: int = 1, height: int = 4, width: int = 6) -> npt.NDArray[np.float32]:
    """Picture i is uniform: -1, then higher by 2 / n each."""
    levels = np.linspace(-1, 1, n, endpoint=False, dtype=np.float32)
    return np.broadcast_to(levels[:, None, None, None], (n, channels, height, width)).copy()


@pytest.mark.parametrize(("n", "columns", "shape"), [(1, 1, (1, 1)), (4, 2, (2, 2)), (5, 3, (2, 3)), (64, 8, (8, 8))])
def test_a_grid_is_as_square_as_it_gets(n: int, columns: int, shape: tuple[int, int]) -> None:
    sheet = grid(images_of(n))

    rows, across = shape
    assert sheet.size == (across * (6 + MARGIN) + MARGIN, rows * (4 + MARGIN) + MARGIN)
    assert grid(images_of(n), columns).size == sheet.size


def test_every_picture_is_in_its_place() -> None:
    pixels = np.asarray(grid(images_of(4), columns=4))

    assert [int(pixels[MARGIN, MARGIN + i * (6 + MARGIN)]) for i in range(4)] == [0, 64, 128, 191]
    assert int(pixels[0, 0]) == PAPER


def test_pixels_span_minus_one_to_one_and_the_rest_is_clipped() -> None:
    images = np.array([-2.0, -1.0, 0.0, 1.0, 3.0], np.float32).reshape(5, 1, 1, 1)
    pixels = np.asarray(grid(images, columns=5))

    assert pixels[MARGIN, MARGIN :: 1 + MARGIN].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_back(channels: int) -> None:
    every = np.arange(256 * channels, dtype=np.uint8).reshape(4, 8, 8, channels)
    images = np.random.default_rng(0).uniform(-1, 1, (5, channels, 4, 6)).astype(np.float32)

    back = from_pixels(to_pixels(images))

    np.testing.assert_array_equal(to_pixels(from_pixels(every)), every)
    assert back.dtype == np.float32
    assert back.shape == images.shape
    assert np.abs(back - images).max() <= 1 / 255 + 1e-6
    assert (from_pixels(every).min(), from_pixels(every).max()) == (-1, 1)
    assert picture(every[0]).mode == ("L" if channels == 1 else "RGB")
    np.testing.assert_array_equal(np.asarray(picture(every[0])).reshape(8, 8, channels), every[0])


def test_colours_are_kept() -> None:
    images = images_of(1, channels=3)
    images[:, 0] = 1.0

    sheet = grid(images)

    assert sheet.mode == "RGB"
    assert sheet.getpixel((MARGIN, MARGIN)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (8, 8), (2, 2, 8, 8)])
def test_latents_are_not_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="not images") as caught:
        grid(np.zeros(shape, np.float32))

    assert ".npy" in (caught.value.hint or "")


def test_grids_stand_side_by_side() -> None:
    one, other = grid(images_of(4)), grid(images_of(9))
    sheet = side_by_side({"one": one, "other": other}, scale=2)

    assert sheet.width > 2 * (one.width + other.width)
    assert sheet.height > 2 * other.height


def test_latents_are_refused_before_sampling(tmp_path: Path) -> None:
    check_image_file(tmp_path / "x.npy", (4, 8, 8))
    check_image_file(tmp_path / "x.png", (3, 8, 8))
    with pytest.raises(InputError, match="4 channels are latents"):
        check_image_file(tmp_path / "x.png", (4, 8, 8))


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "folder.png"):
        with pytest.raises(OutputError, match="cannot write") as caught:
            check_image_file(path)
        assert caught.value.where == str(path)


def test_a_failure_keeps_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.npy"
    save_images(images_of(1), target)
    before = target.read_bytes()

    def full(file: IO[bytes], array: npt.NDArray[np.float32]) -> None:
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_images(images_of(2), target)

    assert target.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["x.npy"]


def test_files(tmp_path: Path) -> None:
    images = images_of(4)
    save_images(images, tmp_path / "new" / "grid.png")
    save_images(images, tmp_path / "raw.npy")

    with Image.open(tmp_path / "new" / "grid.png") as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(grid(images)))
    np.testing.assert_array_equal(np.load(tmp_path / "raw.npy"), images)


@pytest.mark.parametrize("name", ["grid.jpg", "grid"])
def test_other_endings_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="cannot write a") as caught:
        check_image_file(tmp_path / name)
    with pytest.raises(InputError):
        save_images(images_of(1), tmp_path / name)

    assert ".png or .npy" in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())
