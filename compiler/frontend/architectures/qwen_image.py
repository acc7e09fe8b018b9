"""Qwen-Image: packed tokens `[B, N, C]`, a prompt with a mask, positions by the size of the image."""

from __future__ import annotations

from typing import Any

from .flux import PACKED, packed_grid
from .rotary import Rotation, real_rotary
from .row import Architecture, Asked, Input, NetworkCall, NetworkInputs, tokens_of_grid

_PROMPT, _MASK = "encoder_hidden_states", "encoder_hidden_states_mask"


def _inputs(asked: Asked) -> NetworkInputs:
    if asked.config.get("zero_cond_t") or asked.config.get("use_additional_t_cond"):
        raise asked.error("a Qwen-Image that edits or layers images cannot be exported yet", "use the base model")
    grid, tokens = packed_grid(asked), asked.tokens(_PROMPT, 512)
    conditions = {
        _PROMPT: Input((tokens, asked.number("joint_attention_dim"))),
        _MASK: Input((tokens,), kind="mask"),
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

    tokens = known.conditions[_PROMPT].sizes[0]
    tables = module.pos_embed(known.fixed["img_shapes"], max_txt_seq_len=tokens, device=torch.device("cpu"))
    positions = tuple(Rotation.of(table) for table in tables)

    def call(network: Any, arguments: dict[str, Any]) -> Any:
        network.pos_embed.forward = lambda *sizes, **options: positions
        try:
            return network(**arguments, return_dict=False)[0]
        finally:
            del network.pos_embed.forward

    return call


QWEN_IMAGE = Architecture(
    "QwenImageTransformer2DModel",
    _inputs,
    {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 3584},
    unit="fraction",
    sigmas="even",
    tokens=tokens_of_grid,
    patches=(real_rotary,),
    traced=_traced,
)
