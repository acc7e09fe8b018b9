"""CogVideoX: latents `[B, T, C, H, W]`, a prompt, and in the larger models rotary positions of one size."""

from __future__ import annotations

from typing import Any

from .positions import centred_region
from .row import PROMPT, PROMPT_LENGTH, Architecture, Asked, Input, NetworkInputs
from .video import frames_of


def _inputs(asked: Asked) -> NetworkInputs:
    config, channels = asked.config, asked.number("in_channels")
    if asked.predicted != channels:
        raise asked.error("a CogVideoX that takes an image besides cannot be exported yet", "use the text model")
    own = (asked.number("sample_height"), asked.number("sample_width"))
    height, width = asked.side() if asked.size else own
    frames = frames_of(asked, (asked.number("sample_frames") - 1) // asked.number("temporal_compression_ratio") + 1)
    if not config["use_rotary_positional_embeddings"] and (height, width) != own:
        raise asked.error(f"the model's positions are for {own[0]}x{own[1]}, not {height}x{width}", "drop --size")
    tokens = asked.tokens(PROMPT, asked.number("max_text_seq_length"))
    # Positions that are learned, or added, are those of one length.
    rotary = config["use_rotary_positional_embeddings"] and not config.get("use_learned_positional_embeddings")
    conditions = {PROMPT: Input((tokens, asked.number("text_embed_dim")), length=PROMPT_LENGTH if rotary else None)}
    shape = (frames, channels, height, width)
    return NetworkInputs("hidden_states", shape, conditions, None, channels, channel_axis=2)


def _positions(module: Any, known: NetworkInputs) -> dict[str, Any]:
    """Return the rotary embedding of a size, as the pipeline of CogVideoX computes it; nothing for a smaller model."""
    config = module.config
    if not config.use_rotary_positional_embeddings:
        return {}
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    patch, patch_t = config.patch_size, config.patch_size_t
    frames, _, height, width = known.shape
    grid = (height // patch, width // patch)
    base = (config.sample_height // patch, config.sample_width // patch)
    options: dict[str, Any] = {"crops_coords": centred_region(*grid, *base), "temporal_size": frames}
    if patch_t is not None:
        steps = (frames + patch_t - 1) // patch_t
        options = {"crops_coords": None, "temporal_size": steps, "grid_type": "slice", "max_size": base}
    rotary = get_3d_rotary_pos_embed(embed_dim=config.attention_head_dim, grid_size=grid, **options)
    return {"image_rotary_emb": rotary}


COGVIDEOX = Architecture(
    "CogVideoXTransformer3DModel",
    _inputs,
    {
        "in_channels": 16,
        "out_channels": 16,
        "text_embed_dim": 4096,
        "sample_width": 90,
        "sample_height": 60,
        "sample_frames": 49,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "use_rotary_positional_embeddings": False,
    },
    constants=_positions,
)
