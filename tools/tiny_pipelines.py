"""Pipelines of diffusers around the tiny networks, without text encoders: prompts are given as embeddings.

They show a bundle in the place of the network: the tests run some, and `tools/models_page.py` all. Each is asked for
latents, so that no autoencoder is needed either.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mezzotint import Schedule
from tools.tiny_models import TINY
from tools.tiny_network import TinyModel
from tools.tiny_unets import TOKENS

STEPS = 4
FLOW, DDIM = "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"
SIDE = 64  # pixels of an image; its latents have 8


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline around a network of TINY, whose configuration takes `changes`.

    `prompts` are the shapes of prompt embeddings by argument, without their batch; an array of integers is a mask.
    `options` are other arguments of the call, `settings` those of the scheduler, and `answer` holds the latents.
    """

    cls: str
    network: str
    prompts: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = FLOW
    sampler: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    answer: str = "images"
    adapt: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None

    @property
    def tiny(self) -> TinyModel:
        """Return the network."""
        known = TINY[self.network]
        size = known.size or ((8, 8) if "sample_size" in self.changes else None)
        return replace(known, config={**known.config, **self.changes}, size=size)

    def build(self, network: Any = None) -> Any:
        """Return the pipeline, around a new network if none is given."""
        import diffusers

        kind = getattr(diffusers, self.cls)
        parameters = inspect.signature(kind.__init__).parameters.values()
        parts = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
        slot = "unet" if "unet" in parts else "transformer"
        scheduler = getattr(diffusers, self.scheduler)(**self.settings)
        flags = {"requires_safety_checker": False} if "requires_safety_checker" in (p.name for p in parameters) else {}
        pipe = kind(**{**parts, slot: network or self.tiny.build(), "scheduler": scheduler, **flags})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def schedule(self) -> Schedule:
        """Return the schedule of its scheduler."""
        import diffusers

        config = getattr(diffusers, self.scheduler)(**self.settings).config
        return Schedule.from_config({**config, "_class_name": self.scheduler})

    def call(self, calls: Any = None) -> dict[str, Any]:
        """Return the arguments of a call with seeded prompts; `calls` are the deployed timesteps."""
        import torch

        generator = torch.Generator().manual_seed(3)
        given: dict[str, Any] = {}
        for name, shape in self.prompts.items():
            if "mask" in name:
                given[name] = torch.ones(1, *shape, dtype=torch.int64)
                given[name][:, -1] = 0
            else:
                given[name] = torch.randn(1, *shape, generator=generator)
        call = {"num_inference_steps": STEPS, "output_type": "latent", **given, **self.options}
        return call if self.adapt is None else self.adapt(call, calls)

    def latents(self, pipe: Any, calls: Any = None) -> np.ndarray[Any, Any]:
        """Return what the pipeline draws with a seed, float32."""
        import torch

        found = getattr(pipe(generator=torch.Generator().manual_seed(1), **self.call(calls)), self.answer)
        tensor = found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))
        latents: np.ndarray[Any, Any] = tensor.float().numpy()
        return latents


def _with_sigmas(call: dict[str, Any], calls: Any) -> dict[str, Any]:
    """Give a pipeline that sets sigmas of its own those of the deployment; its scheduler does not shift."""
    return call if calls is None else {**call, "sigmas": [t / 1000 for t in calls]}


def _with_timesteps(call: dict[str, Any], calls: Any) -> dict[str, Any]:
    """Give LTX's pipeline, which takes no sigmas, the timesteps of the deployment."""
    return call if calls is None else {**call, "timesteps": list(calls)}


def _with_soft_masks(call: dict[str, Any], calls: Any) -> dict[str, Any]:
    """Give Chroma's pipeline its masks in the type in which it makes them."""
    return _with_sigmas({n: v.float() if "mask" in n else v for n, v in call.items()}, calls)


def _prompts_in_lists(call: dict[str, Any], calls: Any) -> dict[str, Any]:
    """Give Z-Image's pipeline the prompts as it takes them: a list of tensors without a batch."""
    import torch

    generator = torch.Generator().manual_seed(5)
    prompts = {
        name: [torch.randn(TOKENS, 12, generator=generator)] for name in ("prompt_embeds", "negative_prompt_embeds")
    }
    return _with_sigmas({**call, **prompts}, calls)


def _two(suffix: str, prompt: tuple[int, ...], mask: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"prompt_embeds{suffix}": prompt,
        f"negative_prompt_embeds{suffix}": prompt,
        f"prompt_attention_mask{suffix}": mask,
        f"negative_prompt_attention_mask{suffix}": mask,
    }


_IMAGE = {"height": SIDE, "width": SIDE}
_VIDEO = {**_IMAGE, "num_frames": 5}
_MASKED = {
    "prompt_embeds": (TOKENS, 12),
    "negative_prompt_embeds": (TOKENS, 12),
    "prompt_attention_mask": (TOKENS,),
    "negative_prompt_attention_mask": (TOKENS,),
}
_NO_BINNING = {**_IMAGE, "use_resolution_binning": False, "negative_prompt": None}
TINY_PIPELINES: dict[str, TinyPipeline] = {
    pipeline.cls: pipeline
    for pipeline in (
        TinyPipeline(
            "StableDiffusion3Pipeline",
            "SD3Transformer2DModel",
            {
                "prompt_embeds": (TOKENS, 16),
                "negative_prompt_embeds": (TOKENS, 16),
                "pooled_prompt_embeds": (12,),
                "negative_pooled_prompt_embeds": (12,),
            },
            _IMAGE,
            settings={"shift": 3.0},
        ),
        TinyPipeline(
            "FluxPipeline",
            "FluxTransformer2DModel",
            {"prompt_embeds": (TOKENS, 12), "pooled_prompt_embeds": (12,)},
            _IMAGE,
            adapt=_with_sigmas,
        ),
        TinyPipeline(
            "PixArtSigmaPipeline",
            "PixArtTransformer2DModel, Sigma",
            _MASKED,
            _NO_BINNING,
            scheduler="DPMSolverMultistepScheduler",
            sampler="dpmpp-2m",
        ),
        TinyPipeline(
            "PixArtAlphaPipeline",
            "PixArtTransformer2DModel, alpha",
            _MASKED,
            _NO_BINNING,
            changes={"sample_size": 128, "use_additional_conditions": None},  # of the models that read the resolution
            scheduler=DDIM,
            settings={"clip_sample": False},
        ),
        TinyPipeline(
            "SanaPipeline",
            "SanaTransformer2DModel",
            _MASKED,
            {**_NO_BINNING, "height": 8 * 32, "width": 8 * 32},
            changes={"guidance_embeds": False},
            settings={"shift": 3.0},
        ),
        TinyPipeline(
            "AuraFlowPipeline",
            "AuraFlowTransformer2DModel",
            {**_MASKED, "prompt_embeds": (TOKENS, 16), "negative_prompt_embeds": (TOKENS, 16)},
            _IMAGE,
            settings={"shift": 1.73},
        ),
        TinyPipeline(
            "ChromaPipeline",
            "ChromaTransformer2DModel",
            _MASKED,
            _IMAGE,
            adapt=_with_soft_masks,
        ),
        TinyPipeline(
            "Flux2Pipeline",
            "Flux2Transformer2DModel",
            {"prompt_embeds": (TOKENS, 12)},
            _IMAGE,
            adapt=_with_sigmas,
        ),
        TinyPipeline(
            "QwenImagePipeline",
            "QwenImageTransformer2DModel",
            {"prompt_embeds": (TOKENS, 12), "prompt_embeds_mask": (TOKENS,)},
            _IMAGE,
            adapt=_with_sigmas,
        ),
        TinyPipeline(
            "Lumina2Pipeline",
            "Lumina2Transformer2DModel",
            _MASKED,
            _IMAGE,
            adapt=_with_sigmas,
        ),
        TinyPipeline(
            "ZImagePipeline",
            "ZImageTransformer2DModel",
            {},
            _IMAGE,
            adapt=_prompts_in_lists,
        ),
        TinyPipeline(
            "HunyuanDiTPipeline",
            "HunyuanDiT2DModel",
            {
                **_two("", (3, 12), (3,)),
                **_two("_2", (4, 16), (4,)),
            },
            {**_IMAGE, "use_resolution_binning": False},
            scheduler="DDPMScheduler",
            sampler="ddpm",
            settings={"clip_sample": False},
        ),
        TinyPipeline(
            "WanPipeline",
            "WanTransformer3DModel",
            {"prompt_embeds": (TOKENS, 12), "negative_prompt_embeds": (TOKENS, 12)},
            _VIDEO,
            settings={"shift": 3.0},
            answer="frames",
        ),
        TinyPipeline(
            "HunyuanVideoPipeline",
            "HunyuanVideoTransformer3DModel",
            {"prompt_embeds": (TOKENS, 12), "pooled_prompt_embeds": (12,), "prompt_attention_mask": (TOKENS,)},
            _VIDEO,
            answer="frames",
            adapt=_with_sigmas,
        ),
        TinyPipeline(
            "CogVideoXPipeline",
            "CogVideoXTransformer3DModel",
            {"prompt_embeds": (TOKENS, 12), "negative_prompt_embeds": (TOKENS, 12)},
            {**_VIDEO, "num_frames": 5},
            scheduler="CogVideoXDDIMScheduler",
            settings={"snr_shift_scale": 1.0},
            answer="frames",
        ),
        TinyPipeline(
            "LTXPipeline",
            "LTXVideoTransformer3DModel",
            _MASKED,
            {"height": 3 * 32, "width": 4 * 32, "num_frames": 9},
            answer="frames",
            adapt=_with_timesteps,
        ),
    )
}
