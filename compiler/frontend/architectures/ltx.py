"""LTX-Video: packed tokens `[B, N, C]` of a video, whose size is T, H and W of its latents."""

from __future__ import annotations

from .row import Architecture, Asked, NetworkInputs, masked_prompt, tokens_of_grid
from .video import frames_of

_USUAL = (21, 16, 22)  # latents of 161 frames of 512 x 704 pixels
_FRAMES_PER_SECOND, _IN_TIME, _IN_SPACE = 25, 8, 32  # of the pipeline, and of its autoencoder


def _inputs(asked: Asked) -> NetworkInputs:
    channels, conditions = asked.number("in_channels"), masked_prompt(asked, 128, asked.number("caption_channels"))
    frames = frames_of(asked, _USUAL[0])
    height, width = asked.side() if asked.size else _USUAL[1:]
    patch, patch_t = asked.number("patch_size"), asked.number("patch_size_t")
    grid = (frames // patch_t, height // patch, width // patch)
    fixed = {
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "rope_interpolation_scale": (_IN_TIME / _FRAMES_PER_SECOND, _IN_SPACE, _IN_SPACE),
    }
    shape = (grid[0] * grid[1] * grid[2], channels)
    return NetworkInputs(
        "hidden_states", shape, conditions, None, asked.predicted, fixed=fixed, grid=grid, channel_axis=2
    )


LTX = Architecture(
    "LTXVideoTransformer3DModel",
    _inputs,
    {"in_channels": 128, "out_channels": 128, "caption_channels": 4096, "patch_size": 1, "patch_size_t": 1},
    sigmas="even",
    tokens=tokens_of_grid,
)
