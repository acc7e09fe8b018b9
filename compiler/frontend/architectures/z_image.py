"""Z-Image: lists of images and of prompts, each padded to a multiple of 32 tokens.

A list has a length that torch.export fixes, so that no batch stays open. The traced call computes the same for a batch
of images of one size. Prompts of several lengths are one array with a mask, whose ones stand in front: behind its own
tokens a prompt has the learned padding up to a multiple of 32, and what stands behind that is hidden from attention.
"""

from __future__ import annotations

from typing import Any

from .image_tokens import image_to_tokens, tokens_to_image
from .rotary import Rotation, joined_positions, real_rotary
from .row import PROMPT_LENGTH, Architecture, Asked, Input, NetworkCall, NetworkInputs

_PROMPT, _MASK = "cap_feats", "cap_feats_mask"
_MULTIPLE = 32  # of tokens
_PATCH = 2


def _inputs(asked: Asked) -> NetworkInputs:
    channels, config = asked.number("in_channels"), asked.config
    if _PATCH not in config["all_patch_size"] or 1 not in config["all_f_patch_size"]:
        raise asked.error(f"a Z-Image with patches of {config['all_patch_size']} is not known")
    tokens = asked.tokens(_PROMPT, 512)
    conditions = {
        _PROMPT: Input((tokens, asked.number("cap_feat_dim")), length=PROMPT_LENGTH),
        _MASK: Input((tokens,), kind="mask", length=PROMPT_LENGTH),
    }
    return NetworkInputs("x", (channels, *asked.side(128)), conditions, None, channels, timestep="t")


def _lists(module: Any, arguments: dict[str, Any]) -> Any:
    """Call the network with lists; an image has one frame."""
    import torch

    rows = zip(arguments[_PROMPT], arguments[_MASK], strict=True)
    images, prompts = list(arguments["x"].unsqueeze(2)), [row[mask.bool()] for row, mask in rows]
    return torch.stack(module(images, arguments["t"], prompts, return_dict=False)[0])[:, :, 0]


def _ids(tokens: Any) -> Any:
    """Return the ids of a prompt's tokens: their place, and zeros."""
    import torch

    return torch.cat([tokens[:, None], torch.zeros(tokens.shape[0], 2, dtype=torch.int64)], dim=1)


def _traced(module: Any, known: NetworkInputs) -> NetworkCall:
    import torch

    _, height, width = known.shape
    rows, columns = height // _PATCH, width // _PATCH
    pad = -(rows * columns) % _MULTIPLE
    most = int(module.config.axes_lens[0])
    # Tokens of the prompt stand along the first axis from 1 on, and those of the image behind them.
    words = Rotation.of(module.rope_embedder(_ids(torch.arange(most))))
    places = torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), torch.arange(rows), torch.arange(columns))
    places = torch.cat([places, torch.zeros(pad, 3, dtype=places.dtype)])
    image_at_zero = Rotation.of(module.rope_embedder(places))
    first = int(module.config.axes_dims[0]) // 2  # numbers of a position that stand for the first axis

    def padded(hidden: Any, count: int, token: Any) -> Any:
        return hidden if not count else torch.cat([hidden, token.expand(hidden.shape[0], count, -1)], dim=1)

    def behind(ends: Any) -> Rotation:
        """Return the positions of each image behind so many tokens `[B]`; those of its padding are zero."""
        both, batch = [], ends.shape[0]
        for name in ("real", "imaginary"):
            own, start = getattr(image_at_zero, name), getattr(words, name)[ends + 1][:, None, :first]
            padding = own[rows * columns :, :first].expand(batch, -1, -1)
            front = torch.cat([start.expand(-1, rows * columns, -1), padding], dim=1)
            both.append(torch.cat([front, own[:, first:].expand(batch, -1, -1)], dim=2))
        return Rotation(*both)

    def call(network: Any, arguments: dict[str, Any]) -> Any:
        tokens, lengths = arguments[_PROMPT].shape[1], arguments[_MASK].sum(dim=1)
        total, ends = ((count + _MULTIPLE - 1) // _MULTIPLE * _MULTIPLE for count in (tokens, lengths))
        place = torch.arange(total)
        keep = place < ends[:, None]
        text, image = words.at(place + 1).unsqueeze(0), behind(ends)
        text = Rotation(*(part.expand(ends.shape[0], -1, -1) for part in (text.real, text.imaginary)))
        time = network.t_embedder(arguments["t"] * network.t_scale)
        hidden = network.all_x_embedder[f"{_PATCH}-1"](image_to_tokens(arguments["x"], _PATCH))
        hidden = padded(hidden, pad, network.x_pad_token)
        for layer in network.noise_refiner:
            hidden = layer(hidden, None, image, time)
        # One token less than a multiple is enough for any length. A slice to that length would have a guard.
        prompt = padded(network.cap_embedder(arguments[_PROMPT]), _MULTIPLE - 1, network.cap_pad_token)
        prompt = prompt.index_select(1, place)
        prompt = torch.where((place < lengths[:, None])[:, :, None], prompt, network.cap_pad_token)
        for layer in network.context_refiner:
            prompt = layer(prompt, keep, text)
        keep = torch.cat([torch.ones(hidden.shape[:2], dtype=torch.bool), keep], dim=1)
        hidden = torch.cat([hidden, prompt], dim=1)
        for layer in network.layers:
            hidden = layer(hidden, keep, joined_positions(image, text), time)
        hidden = network.all_final_layer[f"{_PATCH}-1"](hidden, c=time)[:, : rows * columns]
        return tokens_to_image(hidden, _PATCH, height, width)

    return call


Z_IMAGE = Architecture(
    "ZImageTransformer2DModel",
    _inputs,
    {"in_channels": 16, "cap_feat_dim": 2560, "all_patch_size": (2,), "all_f_patch_size": (1,)},
    unit="reversed_fraction",
    reversed_velocity=True,
    sigmas="even",
    tokens=lambda known: (known.shape[1] // _PATCH) * (known.shape[2] // _PATCH),
    patches=(real_rotary,),
    call=_lists,
    traced=_traced,
)
