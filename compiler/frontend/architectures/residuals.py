"""Inputs of a U-Net that another network computes: the residuals of a ControlNet and of a T2I-Adapter.

down_block_additional_residuals_0 ...        one for each skip connection, in their order (ControlNet)
mid_block_additional_residual                of the middle block (ControlNet)
down_intrablock_additional_residuals_0 ...   one for each block on the way down (T2I-Adapter)
"""

from __future__ import annotations

from collections.abc import Iterator

from .row import Asked, Input

_SKIPS, _MIDDLE = "down_block_additional_residuals", "mid_block_additional_residual"
_BLOCKS = "down_intrablock_additional_residuals"


def residual_inputs(asked: Asked, height: int, width: int) -> dict[str, Input]:
    """Return the residuals of which the caller has any, for a sample of this height and width."""
    channels = [int(c) for c in asked.config["block_out_channels"]]
    inputs: dict[str, Input] = {}

    def add(name: str, path: tuple[str | int, ...], count: int, level: int) -> None:
        sizes = (count, height >> level, width >> level)
        inputs[name] = Input(sizes, path=path, shrunk=2**level)

    if any(name == _MIDDLE or name.startswith(f"{_SKIPS}_") for name in asked.sizes):
        for i, (count, level) in enumerate(_skips(asked, channels)):
            add(f"{_SKIPS}_{i}", (_SKIPS, i), count, level)
        add(_MIDDLE, (_MIDDLE,), channels[-1], len(channels) - 1)
    if any(name.startswith(f"{_BLOCKS}_") for name in asked.sizes):
        last = len(channels) - 1
        for i, (count, kind) in enumerate(zip(channels, asked.config["down_block_types"], strict=True)):
            inside = "CrossAttn" in str(kind)  # it is added in front of the downsampler; in other blocks behind it
            add(f"{_BLOCKS}_{i}", (_BLOCKS, i), count, i if inside or i == last else i + 1)
    return inputs


def _skips(asked: Asked, channels: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the channels and the level of each skip connection."""
    layers = asked.config["layers_per_block"]
    yield channels[0], 0
    for level, count in enumerate(channels):
        for _ in range(layers if isinstance(layers, int) else layers[level]):
            yield count, level
        if level < len(channels) - 1:
            yield count, level + 1
