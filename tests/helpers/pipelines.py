"""Real diffusers pipelines made small, with random seeded weights: text encoders, tokenizer and VAE included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from mezzotint.runtime.sampling.schedule import NAMED_SCHEDULES

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = (*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>")
LENGTH = 77  # tokens of a prompt
WIDTH = 32  # of the prompt's embeddings
SIDE = 8  # of the latents; pictures have twice that
STABLE: dict[str, Any] = {key: value for key, value in NAMED_SCHEDULES["sd"].items() if key != "_class_name"}


def tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters are tokens; nothing is merged."""
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def text_encoder(width: int, *, projected: bool = False, layers: int = 2) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(TOKENS),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=len(TOKENS) - 2,
        eos_token_id=len(TOKENS) - 1,
    )
    torch.manual_seed(1)
    model: Any = CLIPTextModelWithProjection if projected else CLIPTextModel
    return model(config).eval()


def autoencoder(channels: tuple[int, ...] = (8, 16)) -> Any:
    torch.manual_seed(2)
    return AutoencoderKL(
        block_out_channels=channels,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=2 ** (len(channels) - 1) * SIDE,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
    ).eval()


def unet(**changes: Any) -> Any:
    """Two levels, one of them with attention: torch takes eight seconds to export it."""
    config: dict[str, Any] = {
        "sample_size": SIDE,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**config, **changes}).eval()


def stable_diffusion(folder: Path) -> Any:
    """StableDiffusionPipeline: latents 4x8x8, pictures 3x16x16."""
    pipe = StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(WIDTH),
        tokenizer=tokenizer(folder),
        unet=unet(),
        scheduler=DDIMScheduler(**STABLE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipe)


def smallest(folder: Path) -> Any:
    """StableDiffusionPipeline of one block each: what is exported four times in seconds."""
    network = unet(block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",))
    pipe = StableDiffusionPipeline(
        vae=autoencoder((8,)),
        text_encoder=text_encoder(WIDTH, layers=1),
        tokenizer=tokenizer(folder),
        unet=network,
        scheduler=DDIMScheduler(**STABLE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return quiet(pipe)


def controlnet(network: Any, channels: tuple[int, ...]) -> Any:
    """A ControlNet for a U-Net; each of the channels but the first halves its images.

    The last convolutions, of the residuals and of the image, are zeros before training; they have random weights.
    """
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    made = ControlNetModel.from_unet(network, conditioning_embedding_out_channels=channels)
    residuals = (*made.controlnet_down_blocks, made.controlnet_mid_block)
    for last in (*residuals, made.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(last.weight, std=0.1)
    return made.eval()


def controlled(pipe: Any) -> Any:
    """The same pipeline with a ControlNet, and with the middle block in its U-Net that a ControlNet needs."""
    import diffusers

    torch.manual_seed(0)
    network: Any = UNet2DConditionModel.from_config({**pipe.unet.config, "mid_block_type": "UNetMidBlock2D"})
    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", "ControlNetPipeline"))
    settings = {"requires_safety_checker": False} if "XL" not in kind.__name__ else {}
    parts = {
        **pipe.components,
        "unet": network.eval(),
        "controlnet": controlnet(network, pipe.vae.config.block_out_channels),
    }
    return quiet(kind(**parts, **settings))


def stable_diffusion_xl(folder: Path) -> Any:
    """StableDiffusionXLPipeline: two text encoders, whose embeddings lie side by side, and the sizes as conditions."""
    time = 8
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=time,
        projection_class_embeddings_input_dim=6 * time + WIDTH // 2,
        use_linear_projection=True,
        block_out_channels=(WIDTH,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    words = tokenizer(folder)
    pipe = StableDiffusionXLPipeline(
        vae=autoencoder(),
        text_encoder=text_encoder(WIDTH // 2),
        text_encoder_2=text_encoder(WIDTH // 2, projected=True),
        tokenizer=words,
        tokenizer_2=words,
        unet=network,
        scheduler=DDIMScheduler(**STABLE),
    )
    return quiet(pipe)


def diffusion_transformer() -> Any:
    """DiTPipeline with learned variances, as trained DiTs have them: 4 channels in, 8 out; 1000 classes and none."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=SIDE,
        patch_size=2,
        norm_num_groups=8,
    )
    return quiet(DiTPipeline(model.eval(), autoencoder(), DDIMScheduler(clip_sample=False)))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
