"""Qwen-Image: packed tokens `[B, N, C]`, a prompt with a mask, positions by the size of the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .flux import MOST_TOKENS, PACKED, packed_grid
from .rotary import Rotation, real_rotary
from .row import PROMPT, PROMPT_LENGTH, Architecture, Asked, Input, NetworkCall, NetworkInputs, tokens_of_grid

_MASK = "encoder_hidden_states_mask"


def _inputs(asked: Asked) -> NetworkInputs:
    if asked.config.get("zero_cond_t") or asked.config.get("use_additional_t_cond"):
        raise asked.error("a Qwen-Image that edits or layers images cannot be exported yet", "use the base model")
    grid, tokens = packed_grid(asked), asked.tokens(PROMPT, 512)
    conditions = {
        PROMPT: Input((tokens, asked.number("joint_attention_dim")), length=PROMPT_LENGTH),
        _MASK: Input((tokens,), kind="mask", length=PROMPT_LENGTH),
    }
    if asked.config.get("guidance_embeds"):
        conditions["guidance"] = Input(())
    channels = asked.number("in_channels")
    return NetworkInputs(
        "hidden_states",
        (grid[0] * grid[1], channels),
        conditions,
        None,
        PACKED**2 * asked.number("out_channels"),
        fixed={"img_shapes": [[(1, *grid)]]},
        grid=grid,
        channel_axis=2,
    )


def _traced(module: Any, known: NetworkInputs) -> NetworkCall:
    """Return a call whose positions are constants in real arithmetic; diffusers keeps them as complex tables."""
    import torch

    tables = module.pos_embed(known.fixed["img_shapes"], max_txt_seq_len=MOST_TOKENS, device=torch.device("cpu"))
    image, text = (Rotation.of(table) for table in tables)

    def call(network: Any, arguments: dict[str, Any]) -> Any:
        positions = image, text.at(torch.arange(arguments[PROMPT].shape[1]))
        network.pos_embed.forward = lambda *sizes, **options: positions
        try:
            return network(**arguments, return_dict=False)[0]
        finally:
            del network.pos_embed.forward

    return call


@contextmanager
def open_length(module: Any) -> Iterator[None]:
    """Leave out what diffusers computes of a prompt's mask and does not use: the length of each row.

    It makes a tensor of the number of tokens, which torch.export fixes: "You marked tokens as dynamic but your code
    specialized it to be a constant".
    """
    from diffusers.models.transformers import transformer_qwenimage as library

    computed = library.compute_text_seq_len_from_mask

    def length(prompt: Any, mask: Any) -> tuple[Any, None, Any]:
        return prompt.shape[1], None, None if mask is None else mask.bool()

    library.compute_text_seq_len_from_mask = length
    try:
        yield
    finally:
        library.compute_text_seq_len_from_mask = computed


QWEN_IMAGE = Architecture(
    "QwenImageTransformer2DModel",
    _inputs,
    {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 3584},
    unit="fraction",
    sigmas="even",
    tokens=tokens_of_grid,
    patches=(real_rotary, open_length),
    traced=_traced,
)
