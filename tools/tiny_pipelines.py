"""Pipelines of diffusers around the tiny networks, without text encoders: prompts are given as embeddings.

They show a bundle in the place of the network: the tests run some, and `tools/measure_pipelines.py` all. Each is asked
for latents, so that no autoencoder is needed either.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tools.tiny_pipeline import TinyPipeline
from tools.tiny_unets import TOKENS

DDIM = "DDIMScheduler"
SIDE = 64  # pixels of an image; its latents have 8


def _with_sigmas(call: dict[str, Any], calls: Any) -> dict[str, Any]:
    """Give a pipeline that sets sigmas of its own those of the deployment; its scheduler does not shift."""
    return call if calls is None else {**call, "sigmas": [t / 1000 for t in calls]}


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


def _audio_parts(pipe: Any) -> None:
    """Give AudioLDM 2 what it reads of its autoencoder and its vocoder: spectrograms of 8 x 8 latents."""
    import torch

    pipe.vae_scale_factor = 1
    pipe.vocoder = SimpleNamespace(config=SimpleNamespace(upsample_rates=[1], sampling_rate=8, model_in_dim=8))
    pipe.vae = SimpleNamespace(config=SimpleNamespace(latent_channels=4))
    pipe.text_encoder_2 = SimpleNamespace(config=SimpleNamespace(model_type="t5"), dtype=torch.float32)
    pipe.language_model = SimpleNamespace(dtype=torch.float32)


def _stable_audio_parts(pipe: Any) -> None:
    """Give Stable Audio its projection of durations, and the lengths that it reads of its autoencoder."""
    import torch
    from diffusers import StableAudioProjectionModel

    torch.manual_seed(6)
    pipe.projection_model = StableAudioProjectionModel(12, 12, 0, 4).eval()
    pipe.vae = SimpleNamespace(hop_length=1, config=SimpleNamespace(sampling_rate=16, audio_channels=2))


def _image_parts(pipe: Any) -> None:
    """Give Stable Video Diffusion the embedding and the latents of an image."""
    import torch

    generator = torch.Generator().manual_seed(6)
    embedding, latents = torch.randn(1, 1, 16, generator=generator), torch.randn(1, 4, 8, 8, generator=generator)
    pipe._encode_image = lambda *args: torch.cat([torch.zeros_like(embedding), embedding])
    pipe._encode_vae_image = lambda *args, **options: torch.cat([torch.zeros_like(latents), latents])
    pipe.vae = SimpleNamespace(dtype=torch.float32, config=SimpleNamespace(force_upcast=False))


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
            "AnimateDiffPipeline",
            "UNetMotionModel",
            {"prompt_embeds": (TOKENS, 16), "negative_prompt_embeds": (TOKENS, 16)},
            {**_IMAGE, "num_frames": 2},
            scheduler=DDIM,
            settings={"clip_sample": False},
            answer="frames",
        ),
        TinyPipeline(
            "TextToVideoSDPipeline",
            "UNet3DConditionModel",
            {"prompt_embeds": (TOKENS, 16), "negative_prompt_embeds": (TOKENS, 16)},
            {**_IMAGE, "num_frames": 2},
            scheduler=DDIM,
            settings={"clip_sample": False},
            answer="frames",
        ),
        TinyPipeline(
            "StableVideoDiffusionPipeline",
            "UNetSpatioTemporalConditionModel",
            {"image": (3, SIDE, SIDE)},
            {**_IMAGE, "num_frames": 2},
            scheduler="EulerDiscreteScheduler",
            sampler="euler",
            settings={"prediction_type": "v_prediction"},
            answer="frames",
            finish=_image_parts,
        ),
        TinyPipeline(
            "Kandinsky3Pipeline",
            "Kandinsky3UNet",
            {
                "prompt_embeds": (TOKENS, 12),
                "negative_prompt_embeds": (TOKENS, 12),
                "attention_mask": (TOKENS,),
                "negative_attention_mask": (TOKENS,),
            },
            _IMAGE,
            scheduler="DDPMScheduler",
            sampler="ddpm",
            settings={"clip_sample": False},
        ),
        TinyPipeline(
            "AudioLDM2Pipeline",
            "AudioLDM2UNet2DConditionModel",
            {
                "prompt_embeds": (3, 16),
                "negative_prompt_embeds": (3, 16),
                "generated_prompt_embeds": (TOKENS, 12),
                "negative_generated_prompt_embeds": (TOKENS, 12),
                "attention_mask": (3,),
                "negative_attention_mask": (3,),
            },
            {"audio_length_in_s": 1.0},
            scheduler=DDIM,
            settings={"clip_sample": False},
            answer="audios",
            finish=_audio_parts,
        ),
        TinyPipeline(
            "StableAudioPipeline",
            "StableAudioDiTModel",
            {"prompt_embeds": (TOKENS - 2, 12), "negative_prompt_embeds": (TOKENS - 2, 12)},
            {"audio_end_in_s": 1.0},
            changes={"global_states_input_dim": 24},
            scheduler=DDIM,
            settings={"clip_sample": False},
            answer="audios",
            finish=_stable_audio_parts,
        ),
        TinyPipeline(
            "LTXPipeline",
            "LTXVideoTransformer3DModel",
            _MASKED,
            {"height": 3 * 32, "width": 4 * 32, "num_frames": 9},
            answer="frames",
        ),
    )
}
