"""The classes of components that can be exported, with the names that programs for ONNX pipelines expect.

One row for each class: a new one is a row, and a tiny model in tests/helpers/pipelines.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mezzotint.runtime.bundle.controlnet import residual_names

from ..errors import ModelError
from ..frontend.architectures.patches import keep_epsilon

ComponentKind = Literal["text encoder", "autoencoder", "controlnet"]
DECODER, ENCODER = "vae_decoder", "vae_encoder"
LATENTS, PICTURE, MOMENTS = "latent_sample", "sample", "latent_parameters"


@dataclass(frozen=True)
class ComponentClass:
    """A class of transformers or diffusers.

    outputs   the attributes of a text encoder's answer that become outputs, in this order
    hidden    which hidden states become outputs: "all" follow the others; of "read" those that the pipeline reads,
              in place of the others, so that no layer behind the last one of them is computed
    states    the indices of the states that the pipeline reads, found by running it; for "read" only
    moments   whether an autoencoder's encoder gives mean and logarithm of the variance, or the latents themselves
    islands   the roles (compiler/core/islands.py) that an int8 component keeps in float
    patches   what torch's exporter needs changed in the library (frontend/architectures/patches.py)
    """

    name: str
    library: str
    kind: ComponentKind
    outputs: tuple[str, ...] = ()
    hidden: Literal["none", "all", "read"] = "none"
    states: tuple[int, ...] = ()
    moments: bool = True
    islands: tuple[str, ...] = ()
    patches: tuple[Callable[[Any], AbstractContextManager[None]], ...] = ()


STATES = "hidden_states"
_TEXT = ("attention",)  # 77 tokens: products of activations gain nothing, and their factors have the widest ranges
_VAE = ("first", "last")
_LINEAR = (*_VAE, "attention")  # linear attention divides by a sum that may be all but zero
_CONTROLNET = ("first", "last")  # the last ones are 1x1 convolutions, one for each residual

COMPONENT_CLASSES: Mapping[str, ComponentClass] = {
    row.name: row
    for row in (
        ComponentClass(
            "CLIPTextModel",
            "transformers",
            "text encoder",
            ("last_hidden_state", "pooler_output"),
            hidden="all",
            islands=_TEXT,
        ),
        ComponentClass(
            "CLIPTextModelWithProjection",
            "transformers",
            "text encoder",
            ("text_embeds", "last_hidden_state"),
            hidden="all",
            islands=_TEXT,
        ),
        ComponentClass("T5EncoderModel", "transformers", "text encoder", ("last_hidden_state",), islands=_TEXT),
        ComponentClass("UMT5EncoderModel", "transformers", "text encoder", ("last_hidden_state",), islands=_TEXT),
        *(
            ComponentClass(name, "transformers", "text encoder", ("last_hidden_state",), hidden="read", islands=_TEXT)
            for name in ("Gemma2Model", "Qwen3Model")
        ),
        *(  # their answers are logits, which no pipeline reads
            ComponentClass(name, "transformers", "text encoder", hidden="read", islands=_TEXT)
            for name in ("Gemma2ForCausalLM", "Qwen3ForCausalLM", "Qwen2_5_VLForConditionalGeneration")
        ),
        ComponentClass("AutoencoderKL", "diffusers", "autoencoder", islands=_VAE),
        ComponentClass("AutoencoderKLQwenImage", "diffusers", "autoencoder", islands=_VAE),
        ComponentClass(
            "AutoencoderDC", "diffusers", "autoencoder", moments=False, islands=_LINEAR, patches=(keep_epsilon,)
        ),
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


def with_states(row: ComponentClass, slot: str, read: Mapping[str, tuple[int, ...]], where: str) -> ComponentClass:
    """Return the row of a slot with the hidden states that its pipeline reads. Raises ModelError where it reads nothing
    that the class can give."""
    if row.hidden != "read":
        return row
    if not read.get(slot) and not row.outputs:
        raise ModelError(
            f"the pipeline reads no hidden states of its {slot}, a {row.name}",
            where=where,
            hint="compile the denoiser alone: --components none",
        )
    return replace(row, states=read.get(slot, ()))


def parts_of(slot: str, row: ComponentClass) -> tuple[str, ...]:
    """Return the folders that a slot of a pipeline becomes: a VAE has two halves."""
    return (DECODER, ENCODER) if row.kind == "autoencoder" else (slot,)


def output_names(row: ComponentClass, part: str, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a graph's outputs, in their order."""
    if row.kind == "controlnet":
        return residual_names(config)
    if row.kind == "autoencoder":
        return (PICTURE,) if part == DECODER else (MOMENTS if row.moments else LATENTS,)
    if row.states:
        return tuple(f"{STATES}.{i}" for i in row.states)
    states = int(config["num_hidden_layers"]) + 1 if row.hidden == "all" else 0
    return (*row.outputs, *(f"{STATES}.{i}" for i in range(states)))
