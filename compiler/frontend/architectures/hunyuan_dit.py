"""HunyuanDiT: two prompts with masks, the sizes of the image, a style, and rotary positions of one size."""

from __future__ import annotations

from typing import Any

from .positions import centred_region
from .row import Architecture, Asked, Input, NetworkInputs, kept_of_doubled

_FIRST, _SECOND = "encoder_hidden_states", "encoder_hidden_states_t5"
_FIRST_MASK, _SECOND_MASK = "text_embedding_mask", "text_embedding_mask_t5"
_SIZES = 6  # original size, target size, corner of the crop
_BASE = 512 // 8 // 2  # tokens of a side at the resolution that the positions are scaled to


def _inputs(asked: Asked) -> NetworkInputs:
    config, channels = asked.config, asked.number("in_channels")
    first, second = asked.number("text_len"), asked.number("text_len_t5")
    conditions = {
        _FIRST: Input((first, asked.number("cross_attention_dim"))),
        _FIRST_MASK: Input((first,), kind="mask"),
        _SECOND: Input((second, asked.number("cross_attention_dim_t5"))),
        _SECOND_MASK: Input((second,), kind="mask"),
    }
    if config["use_style_cond_and_image_meta_size"]:
        conditions |= {"image_meta_size": Input((_SIZES,)), "style": Input((), 1)}
    predicted = 2 * channels if config["learn_sigma"] else channels
    shape, kept = (channels, *asked.side()), kept_of_doubled(channels, predicted)
    return NetworkInputs("hidden_states", shape, conditions, None, predicted, kept)


def _positions(module: Any, known: NetworkInputs) -> dict[str, Any]:
    """Return the rotary embedding of a size, as HunyuanDiTPipeline computes it."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    height, width = (side // module.config.patch_size for side in known.shape[1:])
    region = centred_region(height, width, _BASE, _BASE)
    head = module.inner_dim // module.num_heads
    return {"image_rotary_emb": get_2d_rotary_pos_embed(head, region, (height, width), output_type="pt")}


HUNYUAN_DIT = Architecture(
    "HunyuanDiT2DModel",
    _inputs,
    {
        "sample_size": 32,
        "cross_attention_dim": 1024,
        "cross_attention_dim_t5": 2048,
        "text_len": 77,
        "text_len_t5": 256,
        "learn_sigma": True,
        "use_style_cond_and_image_meta_size": True,
    },
    constants=_positions,
    float_time=True,
)
