"""Audio: UNet1DModel and Stable Audio on `[B, C, L]`, AudioLDM 2 on spectrograms `[B, C, T, F]`."""

from __future__ import annotations

from typing import Any

from .row import PROMPT, PROMPT_LENGTH, Architecture, Asked, Input, NetworkInputs
from .unet import class_input

_SECOND, _SECOND_MASK, _SECOND_TOKENS = "encoder_hidden_states_1", "encoder_attention_mask_1", "tokens_1"
_GLOBAL = "global_hidden_states"


def _length(asked: Asked) -> int:
    return int(asked.size[-1]) if asked.size else asked.number("sample_size")


def _unet(asked: Asked) -> NetworkInputs:
    channels = asked.number("in_channels")
    return NetworkInputs("sample", (channels, _length(asked)), {}, None, asked.predicted)


def _stable_audio(asked: Asked) -> NetworkInputs:
    channels, tokens = asked.number("in_channels"), asked.tokens(PROMPT, 130)
    conditions = {
        PROMPT: Input((tokens, asked.number("cross_attention_input_dim")), length=PROMPT_LENGTH),
        _GLOBAL: Input((1, asked.number("global_states_input_dim"))),
    }
    return NetworkInputs("hidden_states", (channels, _length(asked)), conditions, None, channels)


def _positions(module: Any, known: NetworkInputs) -> dict[str, Any]:
    """Return the rotary embedding of a length, with one position for the token of the global states."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    width = module.config.attention_head_dim // 2
    length = known.shape[1] + 1
    return {"rotary_embedding": get_1d_rotary_pos_embed(width, length, use_real=True, repeat_interleave_real=False)}


def _audioldm2(asked: Asked) -> NetworkInputs:
    config, channels = asked.config, asked.number("in_channels")
    widths = config["cross_attention_dim"]
    if isinstance(widths, int) or isinstance(widths[0], int) or len(widths[0]) != 3 or widths[0][0] is not None:
        raise asked.error(f"prompts of an AudioLDM 2 with cross_attention_dim {widths!r} are not known")
    tokens = asked.tokens(_SECOND, 77)
    conditions = {
        PROMPT: Input((asked.tokens(PROMPT, 8), int(widths[0][1])), length=PROMPT_LENGTH),
        _SECOND: Input((tokens, int(widths[0][2])), length=_SECOND_TOKENS),
        _SECOND_MASK: Input((tokens,), kind="mask", length=_SECOND_TOKENS),
        **class_input(asked),
    }
    multiple = 2 ** (len(config["block_out_channels"]) - 1)
    height, width = asked.side() if asked.size else (256, 16)  # ten seconds
    return NetworkInputs("sample", (channels, height, width), conditions, multiple, asked.predicted)


UNET1D = Architecture("UNet1DModel", _unet, {"in_channels": 2, "out_channels": 2, "sample_size": 65536})
STABLE_AUDIO = Architecture(
    "StableAudioDiTModel",
    _stable_audio,
    {
        "in_channels": 64,
        "sample_size": 1024,
        "cross_attention_input_dim": 768,
        "global_states_input_dim": 1536,
    },
    constants=_positions,
)
AUDIOLDM2 = Architecture(
    "AudioLDM2UNet2DConditionModel",
    _audioldm2,
    {
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 1280,
        "block_out_channels": (320, 640, 1280, 1280),
    },
)
