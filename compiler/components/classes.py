"""The classes of components that can be exported, with the names that programs for ONNX pipelines expect.

One row for each class: a new one is a row, and a tiny model in tests/helpers/pipelines.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mezzotint.runtime.bundle.controlnet import residual_names

from ..errors import ModelError

ComponentKind = Literal["text encoder", "autoencoder", "controlnet"]
DECODER, ENCODER = "vae_decoder", "vae_encoder"
LATENTS, PICTURE, MOMENTS = "latent_sample", "sample", "latent_parameters"


@dataclass(frozen=True)
class ComponentClass:
    """A class of transformers or diffusers.

    outputs   the attributes of a text encoder's answer that become outputs, in this order; its hidden states follow
    hidden    whether they do. Pipelines read those of CLIP; T5 has as many as layers, and nothing reads them
    moments   whether an autoencoder's encoder gives mean and logarithm of the variance, or the latents themselves
    islands   the roles (compiler/core/islands.py) that an int8 component keeps in float
    """

    name: str
    library: str
    kind: ComponentKind
    outputs: tuple[str, ...] = ()
    hidden: bool = False
    moments: bool = True
    islands: tuple[str, ...] = ()


_TEXT = ("attention",)  # 77 tokens: products of activations gain nothing, and their factors have the widest ranges
_VAE = ("first", "last")
_CONTROLNET = ("first", "last")  # the last ones are 1x1 convolutions, one for each residual

COMPONENT_CLASSES: Mapping[str, ComponentClass] = {
    row.name: row
    for row in (
        ComponentClass(
            "CLIPTextModel",
            "transformers",
            "text encoder",
            ("last_hidden_state", "pooler_output"),
            hidden=True,
            islands=_TEXT,
        ),
        ComponentClass(
            "CLIPTextModelWithProjection",
            "transformers",
            "text encoder",
            ("text_embeds", "last_hidden_state"),
            hidden=True,
            islands=_TEXT,
        ),
        ComponentClass("T5EncoderModel", "transformers", "text encoder", ("last_hidden_state",), islands=_TEXT),
        ComponentClass("UMT5EncoderModel", "transformers", "text encoder", ("last_hidden_state",), islands=_TEXT),
        ComponentClass("AutoencoderKL", "diffusers", "autoencoder", islands=_VAE),
        ComponentClass("AutoencoderKLWan", "diffusers", "autoencoder", islands=_VAE),
        ComponentClass("ControlNetModel", "diffusers", "controlnet", islands=_CONTROLNET),
    )
}


def component_class(name: str, slot: str, where: str | Path) -> ComponentClass:
    """Return the row of a class. Raises ModelError, which names the slot, for a class without one."""
    if name not in COMPONENT_CLASSES:
        raise ModelError(
            f"the pipeline's {slot} is a {name}, which cannot be compiled yet",
            where=str(where),
            hint=f"compile the denoiser alone: --components none. Classes that can: {', '.join(COMPONENT_CLASSES)}",
        )
    return COMPONENT_CLASSES[name]


def parts_of(slot: str, row: ComponentClass) -> tuple[str, ...]:
    """Return the folders that a slot of a pipeline becomes: a VAE has two halves."""
    return (DECODER, ENCODER) if row.kind == "autoencoder" else (slot,)


def output_names(row: ComponentClass, part: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a graph's outputs, in their order."""
    if row.kind == "controlnet":
        return residual_names(config)
    if row.kind == "autoencoder":
        return (PICTURE,) if part == DECODER else (MOMENTS if row.moments else LATENTS,)
    states = int(config["num_hidden_layers"]) + 1 if row.hidden else 0
    return (*row.outputs, *(f"hidden_states.{i}" for i in range(states)))
