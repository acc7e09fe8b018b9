"""Pipelines with tiny text encoders and tokenizers around the networks of tools/tiny_pipelines.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import Gemma2Config, Gemma2Model, T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from tests.helpers.pipelines import LETTERS, stable_diffusion, stable_diffusion_xl, text_encoder, tokenizer
from tools.tiny_network import TinyModel
from tools.tiny_pipelines import TINY_PIPELINES

VOCABULARY = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0), *((c, -3.0) for c in f"{LETTERS},.")]


def t5_tokenizer() -> Any:
    """Letters are tokens."""
    return T5Tokenizer(vocab=list(VOCABULARY), extra_ids=0)


def t5_encoder(width: int, kind: Any = T5EncoderModel, config: Any = T5Config) -> Any:
    torch.manual_seed(4)
    sizes = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return kind(config(vocab_size=len(VOCABULARY), **sizes)).eval()


def gemma(width: int) -> Any:
    torch.manual_seed(5)
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1}
    model: Any = Gemma2Model(Gemma2Config(vocab_size=len(VOCABULARY), bos_token_id=1, **sizes))
    return model.eval()


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
    if name == "SanaPipeline":
        return {**words, "text_encoder": gemma(12)}
    if name in ("WanPipeline", "AuraFlowPipeline"):
        width = 12 if name == "WanPipeline" else 16
        return {**words, "text_encoder": t5_encoder(width, UMT5EncoderModel, UMT5Config)}
    return {**words, "text_encoder": t5_encoder(12)}
