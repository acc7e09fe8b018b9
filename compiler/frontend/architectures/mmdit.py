"""Transformers whose blocks join the tokens of image and prompt: Stable Diffusion 3 and 3.5, and AuraFlow."""

from __future__ import annotations

from .row import PROMPT, PROMPT_LENGTH, Architecture, Asked, Input, NetworkInputs


def _sd3(asked: Asked) -> NetworkInputs:
    conditions = {
        PROMPT: Input((asked.tokens(PROMPT, 77 + 256), asked.number("joint_attention_dim")), length=PROMPT_LENGTH),
        "pooled_projections": Input((asked.number("pooled_projection_dim"),)),
    }
    return _latents(asked, conditions)


def _patches(known: NetworkInputs) -> int:
    _, height, width = known.shape
    patch = known.multiple or 1
    return (height // patch) * (width // patch)


def _auraflow(asked: Asked) -> NetworkInputs:
    tokens, width = asked.tokens(PROMPT, 256), asked.number("joint_attention_dim")
    return _latents(asked, {PROMPT: Input((tokens, width), length=PROMPT_LENGTH)})


def _latents(asked: Asked, conditions: dict[str, Input]) -> NetworkInputs:
    channels = asked.number("in_channels")
    shape = (channels, *asked.side())
    return NetworkInputs("hidden_states", shape, conditions, asked.number("patch_size"), asked.predicted)


SD3 = Architecture(
    "SD3Transformer2DModel",
    _sd3,
    {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    },
    tokens=_patches,
)
AURAFLOW = Architecture(
    "AuraFlowTransformer2DModel",
    _auraflow,
    {"sample_size": 64, "patch_size": 2, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 2048},
    unit="fraction",
)
