"""The two halves of a compiled VAE in a diffusers pipeline: `decode`, `encode`, and the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin

from ..component import ComponentNetwork
from ..errors import InputError
from .compiled_module import CompiledModule

_LATENTS_ONLY = ("AutoencoderDC",)
_ATTRIBUTES = {"AutoencoderKLQwenImage": "temperal_downsample"}  # which its pipeline reads beside the configuration


class AutoencoderStandIn(CompiledModule, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The module that a pipeline calls instead of its VAE; float32, on the CPU, without parameters.

    `encoder` is None for a pipeline that was compiled without one.
    """

    config_name = "config.json"

    def __init__(self, decoder: Path, encoder: Path | None, class_name: str, *, threads: int | None = None) -> None:
        super().__init__(class_name)
        self.decoder_network = ComponentNetwork(decoder, threads=threads)
        self.encoder_network = None if encoder is None else ComponentNetwork(encoder, threads=threads)
        values = json.loads((decoder.parent / "config.json").read_text(encoding="utf-8"))
        self.register_to_config(**{name: value for name, value in values.items() if not name.startswith("_")})
        if class_name in _ATTRIBUTES:
            setattr(self, _ATTRIBUTES[class_name], values[_ATTRIBUTES[class_name]])

    def decode(self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """Return the pictures of latents `[B, C, h, w]`, float32 `[B, 3, H, W]`."""
        [pictures] = self.decoder_network({"latent_sample": z.detach().numpy()}).values()
        sample = torch.from_numpy(pictures)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        """Return the distribution of the latents of pictures `[B, 3, H, W]`, or the latents where the class has no
        distribution. Raises InputError without an encoder."""
        if self.encoder_network is None:
            raise InputError(
                "the pipeline was compiled without the encoder of its VAE", where=str(self.decoder_network.file)
            )
        [moments] = self.encoder_network({"sample": x.detach().numpy()}).values()
        if self.original in _LATENTS_ONLY:
            latents = torch.from_numpy(moments)
            return EncoderOutput(latent=latents) if return_dict else (latents,)
        found = DiagonalGaussianDistribution(torch.from_numpy(moments))
        return AutoencoderKLOutput(latent_dist=found) if return_dict else (found,)

    def forward(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InputError("a compiled VAE is called by its decode and encode", where=str(self.decoder_network.file))

    def save_pretrained(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InputError("a compiled VAE cannot be saved as a model of diffusers", hint="copy the pipeline's folder")
