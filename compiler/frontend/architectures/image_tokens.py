"""Images as tokens of square patches, and back, for the networks whose forward cannot be traced."""

from __future__ import annotations

from typing import Any


def image_to_tokens(image: Any, patch: int) -> Any:
    """Return the patches of images `[B, C, H, W]` in rows, `[B, N, patch * patch * C]`."""
    batch, channels, height, width = image.shape
    squares = image.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return squares.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def tokens_to_image(tokens: Any, patch: int, height: int, width: int) -> Any:
    """Return images `[B, C, height, width]` of tokens `[B, N, patch * patch * C]`."""
    batch, rows, columns = tokens.shape[0], height // patch, width // patch
    squares = tokens.reshape(batch, rows, columns, patch, patch, -1)
    return squares.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)
