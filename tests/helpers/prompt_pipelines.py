"""Pipelines with tiny text encoders and tokenizers around the networks of tools/tiny_pipelines.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.helpers.pipelines import LETTERS, stable_diffusion, stable_diffusion_xl, text_encoder, tokenizer
from tools.tiny_network import TinyModel
from tools.tiny_pipelines import TINY_PIPELINES

VOCABULARY = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((c, -3.0) for c in f"{LETTERS},.")]

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5_tokenizer() -> Any:
    """Letters are tokens."""
    return T5Tokenizer(vocab=list(VOCABULARY), extra_ids=0)


def t5_encoder(width: int, kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    torch.manual_seed(4)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return kind(config(vocab_size=len(VOCABULARY), **sizes)).eval()


def gemma(width: int) -> Any:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    model: Any = Gemma2Model(Gemma2Config(vocab_size=len(VOCABULARY), bos_token_id=1, **sizes))
    return model.eval()


def qwen_tokenizer() -> Any:
    """Bytes are tokens; nothing is merged."""
    words = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()))
    made = Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    made.add_special_tokens({"additional_special_tokens": list(words[1:3])})
    made.chat_template = CHAT
    return made


def qwen(width: int, kind: Any) -> Any:
    torch.manual_seed(6)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 259}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": 0}
    if kind is Qwen3Model:
        model: Any = kind(Qwen3Config(head_dim=4, **sizes))
        return model.eval()
    eyes = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 8, "out_hidden_size": width}
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}
    config = Qwen2_5_VLConfig(text_config={**sizes, "rope_parameters": rotary}, vision_config=eyes)
    made: Any = kind(config)
    return made.eval()


def prompt_pipeline_of(name: str, folder: Path) -> Any:
    """Return a pipeline of a class; `folder` is for the files of its tokenizer."""
    if name == "StableDiffusionPipeline":
        return stable_diffusion(folder)
    if name == "StableDiffusionXLPipeline":
        return stable_diffusion_xl(folder)
    tiny = TINY_PIPELINES[name]
    parts = {**tiny.build(_network(name)).components, **_encoders(name, folder)}
    return getattr(diffusers, name)(**parts)


def _network(name: str) -> Any:
    """Return the network, whose prompt has the width of the encoders here."""
    changes: dict[str, Any] = {}
    if name == "StableDiffusion3Pipeline":  # the embeddings of two CLIPs side by side, padded to the width of T5
        changes = {"joint_attention_dim": 32, "pooled_projection_dim": 16}
    if name == "Lumina2Pipeline":
        changes = {"axes_lens": (320, 8, 8)}  # its prompts have 256 tokens
    if name == "ZImagePipeline":
        changes = {"axes_lens": (1024, 8, 8)}
    tiny = TINY_PIPELINES[name].tiny
    return TinyModel(tiny.cls, {**tiny.config, **changes}).build()


def _encoders(name: str, folder: Path) -> dict[str, Any]:
    words = {"tokenizer": t5_tokenizer()}
    if name == "StableDiffusion3Pipeline":
        clips = {f"text_encoder{i}": text_encoder(8, projected=True) for i in ("", "_2")}
        clip = tokenizer(folder)
        tokenizers = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": t5_tokenizer()}
        return {**clips, **tokenizers, "text_encoder_3": t5_encoder(32)}
    if name == "FluxPipeline":
        encoders = {"text_encoder": text_encoder(12), "text_encoder_2": t5_encoder(12)}
        return {**encoders, "tokenizer": tokenizer(folder), "tokenizer_2": t5_tokenizer()}
    if name in ("SanaPipeline", "Lumina2Pipeline"):
        return {**words, "text_encoder": gemma(12)}
    if name in ("QwenImagePipeline", "ZImagePipeline"):
        kind = Qwen3Model if name == "ZImagePipeline" else Qwen2_5_VLForConditionalGeneration
        return {"tokenizer": qwen_tokenizer(), "text_encoder": qwen(12, kind)}
    if name in ("WanPipeline", "AuraFlowPipeline"):
        width = 12 if name == "WanPipeline" else 16
        return {**words, "text_encoder": t5_encoder(width, UMT5EncoderModel, UMT5Config)}
    return {**words, "text_encoder": t5_encoder(12)}
