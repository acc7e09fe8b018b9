"""Lumina 2: prompts with a mask, whose length moves the positions of the image.

Its forward copies each prompt's tokens in front of the image's, in a loop over lengths that are read from the mask
(`tolist`), which torch.export cannot trace for a batch. The traced call keeps the padded prompt where it is, and masks
it: attention does not depend on the order of its keys.
"""

from __future__ import annotations

from typing import Any

from .image_tokens import image_to_tokens, tokens_to_image
from .rotary import Rotation, joined_positions, real_rotary
from .row import MASK, PROMPT, Architecture, Asked, NetworkCall, NetworkInputs, masked_prompt


def _inputs(asked: Asked) -> NetworkInputs:
    channels, conditions = asked.number("in_channels"), masked_prompt(asked, 256, asked.number("cap_feat_dim"))
    return NetworkInputs("hidden_states", (channels, *asked.side()), conditions, None, asked.predicted)


def _traced(module: Any, known: NetworkInputs) -> NetworkCall:
    import torch

    _, height, width = known.shape
    patch = int(module.config.patch_size)
    rows, columns = height // patch, width // patch
    first, *rest = (Rotation.of(table) for table in module.rope_embedder.freqs_cis)
    origin = [table.at(0) for table in rest]
    row, column = torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)
    places = [table.at(index) for table, index in zip(rest, (row, column), strict=True)]

    def call(network: Any, arguments: dict[str, Any]) -> Any:
        image, mask = arguments["hidden_states"], arguments[MASK]
        batch = image.shape[0]
        text = _of_text(first.at(torch.arange(mask.shape[1])), origin)
        temb, prompt = network.time_caption_embed(image, arguments["timestep"], arguments[PROMPT])
        positions = _of_image(first, mask.sum(dim=1), places)
        words = Rotation(text.real.expand(batch, -1, -1), text.imaginary.expand(batch, -1, -1))
        hidden = network.x_embedder(image_to_tokens(image, patch))
        for layer in network.context_refiner:
            prompt = layer(prompt, mask, words)
        for layer in network.noise_refiner:
            hidden = layer(hidden, None, positions, temb)
        hidden = torch.cat([prompt, hidden], dim=1)
        keep = torch.cat([mask.bool(), torch.ones(batch, rows * columns, dtype=torch.bool)], dim=1)
        for layer in network.layers:
            hidden = layer(hidden, keep, joined_positions(words, positions), temb)
        hidden = network.norm_out(hidden, temb)[:, prompt.shape[1] :]
        return tokens_to_image(hidden, patch, height, width)

    return call


def _of_text(tokens: Rotation, origin: list[Rotation]) -> Rotation:
    """Return the positions of a prompt `[1, N, D]`: its tokens along the first axis, zero along the others."""
    import torch

    both = []
    for name in ("real", "imaginary"):
        start = getattr(tokens, name)
        both.append(torch.cat([start, *(getattr(o, name).expand(start.shape[0], -1) for o in origin)], dim=-1)[None])
    return Rotation(*both)


def _of_image(first: Rotation, lengths: Any, places: list[Rotation]) -> Rotation:
    """Return the positions of an image `[B, N, D]`: the length of its prompt, the row, the column."""
    import torch

    count, batch = places[0].real.shape[0], lengths.shape[0]
    both = []
    for name in ("real", "imaginary"):
        start = getattr(first, name)[lengths][:, None].expand(-1, count, -1)
        both.append(torch.cat([start, *(getattr(p, name).expand(batch, -1, -1) for p in places)], dim=-1))
    return Rotation(*both)


LUMINA2 = Architecture(
    "Lumina2Transformer2DModel",
    _inputs,
    {"sample_size": 128, "in_channels": 16, "cap_feat_dim": 1024},
    unit="reversed_fraction",
    reversed_velocity=True,
    sigmas="even",
    tokens=lambda known: known.channels,  # the axis of the latents that its pipeline takes for their length
    patches=(real_rotary,),
    traced=_traced,
)
