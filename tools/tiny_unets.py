"""U-Nets made small, in the configurations of the pipelines that they are published with."""

from __future__ import annotations

from typing import Any

from tools.tiny_network import TinyModel

LATENTS = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
UNET = {
    **LATENTS,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
}
TOKENS = 5
PROMPT = "encoder_hidden_states"
COND = "UNet2DConditionModel"


def _ip_adapter(unet: Any) -> None:
    """Load an IP-Adapter of random weights, for embeddings of 24 numbers."""
    import torch

    width, attentions = 16, sum(name.endswith("attn2.processor") for name in unet.attn_processors)
    image = {
        "proj.weight": torch.randn(4 * width, 24),
        "proj.bias": torch.randn(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers = {
        f"{2 * i + 1}.to_{part}_ip.weight": 0.3 * torch.randn(8, width) for i in range(attentions) for part in "kv"
    }
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}], low_cpu_mem_usage=False)
    unet.eval()


TINY_UNETS: dict[str, TinyModel] = {
    "UNet2DModel": TinyModel(
        "UNet2DModel",
        {
            **LATENTS,
            "layers_per_block": 1,
            "block_out_channels": (8,),
            "norm_num_groups": 4,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D",),
            "mid_block_type": None,
            "up_block_types": ("UpBlock2D",),
            "class_embed_type": "timestep",
        },
    ),
    "UNet2DConditionModel, SDXL with LCM, ControlNet and T2I-Adapter": TinyModel(
        COND,
        {
            **UNET,
            "block_out_channels": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "mid_block_type": "UNetMidBlock2D",
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 36,
            "time_cond_proj_dim": 8,
        },
        {
            "encoder_hidden_states": (TOKENS, 16),
            "time_ids": (5,),
            "mid_block_additional_residual": (16, 4, 4),
            "down_intrablock_additional_residuals_0": (8, 8, 8),
        },
    ),
    "UNet2DConditionModel, DeepFloyd IF": TinyModel(
        COND,
        {
            **UNET,
            "in_channels": 7,
            "addition_embed_type": "text",
            "addition_embed_type_num_heads": 2,
            "encoder_hid_dim": 24,
            "encoder_hid_dim_type": "text_proj",
            "class_embed_type": "timestep",
            "down_block_types": ("SimpleCrossAttnDownBlock2D",),
            "up_block_types": ("ResnetUpsampleBlock2D",),
            "resnet_time_scale_shift": "scale_shift",
        },
        {"encoder_hidden_states": (TOKENS, 24), "encoder_attention_mask": (TOKENS,)},
    ),
    "UNet2DConditionModel, Kandinsky 2.1": TinyModel(
        COND,
        {
            **UNET,
            "addition_embed_type": "text_image",
            "encoder_hid_dim": 24,
            "encoder_hid_dim_type": "text_image_proj",
        },
        {"encoder_hidden_states": (TOKENS, 24)},
    ),
    "UNet2DConditionModel, Kandinsky 2.2 with a hint": TinyModel(
        COND,
        {
            **UNET,
            "in_channels": 8,
            "addition_embed_type": "image_hint",
            "encoder_hid_dim": 24,
            "encoder_hid_dim_type": "image_proj",
        },
    ),
    "UNet2DConditionModel, Kandinsky 2.2": TinyModel(
        COND,
        {**UNET, "addition_embed_type": "image", "encoder_hid_dim": 24, "encoder_hid_dim_type": "image_proj"},
    ),
    "UNet2DConditionModel, unCLIP": TinyModel(
        COND,
        {**UNET, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
        {"encoder_hidden_states": (TOKENS, 16)},
    ),
    "UNet2DConditionModel, AudioLDM": TinyModel(
        COND,
        {
            **UNET,
            "block_out_channels": (8, 16),
            "cross_attention_dim": (8, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D"),
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 24,
            "class_embeddings_concat": True,
        },
    ),
    "UNet2DConditionModel, upscaler": TinyModel(
        COND,
        {**UNET, "in_channels": 7, "num_class_embeds": 10},
        {"encoder_hidden_states": (TOKENS, 16)},
    ),
    "UNet2DConditionModel, a class embedding as it is": TinyModel(
        COND, {**UNET, "class_embed_type": "identity"}, {"encoder_hidden_states": (TOKENS, 16)}
    ),
    "UNet2DConditionModel, IP-Adapter": TinyModel(
        COND, UNET, {"encoder_hidden_states": (TOKENS, 16)}, prepare=_ip_adapter
    ),
    "Kandinsky3UNet": TinyModel(
        "Kandinsky3UNet",
        {
            "in_channels": 4,
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 8,
            "layers_per_block": 2,
            "block_out_channels": (16,),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 12,
        },
        {PROMPT: (TOKENS, 12)},
        size=(8, 8),
    ),
    "UNetMotionModel": TinyModel(
        "UNetMotionModel",
        {
            **LATENTS,
            "layers_per_block": 1,
            "block_out_channels": (8,),
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
            "down_block_types": ("CrossAttnDownBlockMotion",),
            "up_block_types": ("UpBlockMotion",),
            "motion_max_seq_length": 4,
        },
        {PROMPT: (TOKENS, 16)},
        size=(2, 8, 8),
    ),
    "UNet3DConditionModel": TinyModel(
        "UNet3DConditionModel",
        {
            **LATENTS,
            "layers_per_block": 1,
            "block_out_channels": (8,),
            "norm_num_groups": 4,
            "cross_attention_dim": 16,
            "attention_head_dim": 4,
            "down_block_types": ("CrossAttnDownBlock3D",),
            "up_block_types": ("UpBlock3D",),
        },
        {PROMPT: (TOKENS, 16)},
        size=(2, 8, 8),
    ),
    "UNetSpatioTemporalConditionModel": TinyModel(
        "UNetSpatioTemporalConditionModel",
        {
            "sample_size": 8,
            "in_channels": 8,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (32,),
            "cross_attention_dim": 16,
            "num_attention_heads": (2,),
            "num_frames": 2,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal",),
            "up_block_types": ("UpBlockSpatioTemporal",),
        },
        size=(2, 8, 8),
    ),
    "UNet1DModel": TinyModel(
        "UNet1DModel",
        {
            "sample_size": 16,
            "in_channels": 2,
            "out_channels": 2,
            "extra_in_channels": 32,
            "layers_per_block": 1,
            "block_out_channels": (32, 32),
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
            "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
            "mid_block_type": "UNetMidBlock1D",
            "time_embedding_type": "positional",
            "use_timestep_embedding": False,
        },
    ),
    "AudioLDM2UNet2DConditionModel": TinyModel(
        "AudioLDM2UNet2DConditionModel",
        {
            **LATENTS,
            "layers_per_block": 1,
            "block_out_channels": (8,),
            "norm_num_groups": 4,
            "cross_attention_dim": ((None, 12, 16),),
            "attention_head_dim": 2,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("UpBlock2D",),
        },
        {PROMPT: (TOKENS, 12), "encoder_hidden_states_1": (3, 16)},
        size=(8, 8),
    ),
}
