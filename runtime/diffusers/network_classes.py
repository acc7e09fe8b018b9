"""What pipelines of diffusers expect of a network, by its class: one entry for each class that a bundle can replace.

    slot        the component of a pipeline that holds it
    output      where diffusers has the class of its output
    arranged    (arguments, channels) -> arguments: the call of a pipeline in the form that the graph was exported in,
                where that is another one (frontend/architectures, `call` of a row); the channels are the sample's
    answered    the prediction in the form that the pipeline reads
    attributes  what pipelines read of the module beside its configuration
    prompt      the argument of prompts that are as long as the longest of their batch: a graph's length is reached by
                tokens that `{prompt}_mask` hides. "" for prompts of one length

Arguments that a graph has as inputs need no entry: their names are those of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import InputError

Arguments = dict[str, Any]
_TRANSFORMER = "modeling_outputs.Transformer2DModelOutput"
_PROMPT, _CAPTIONS, _IMAGE = "encoder_hidden_states", "cap_feats", "image_latents"


@dataclass(frozen=True)
class NetworkClass:
    """See above."""

    slot: str = "transformer"
    output: str = _TRANSFORMER
    arranged: Callable[[Arguments, int], Arguments] | None = None
    answered: Callable[[Any], Any] | None = None
    attributes: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    prompt: str = ""


def _one_row_for_each_video(arguments: Arguments, channels: int) -> Arguments:
    """AnimateDiff's pipeline repeats the prompt for each frame; the graph does that itself."""
    prompt, frames = arguments[_PROMPT], arguments["sample"].shape[2]
    if prompt is None or prompt.shape[0] == arguments["sample"].shape[0]:
        return arguments
    rows = prompt.reshape(-1, frames, *prompt.shape[1:]) if prompt.shape[0] % frames == 0 else prompt[None]
    if not bool((rows == rows[:, :1]).all()):
        raise InputError(
            "the frames of a video have different prompts, and the bundle takes one for each video",
            where=f"input {_PROMPT}",
            hint="give one prompt, or use the original network",
        )
    return {**arguments, _PROMPT: rows[:, 0]}


def _image_apart(arguments: Arguments, channels: int) -> Arguments:
    """Stable Video Diffusion's pipeline joins the latents of the noise and those of the image, along the channels."""
    sample = arguments["sample"]
    return {**arguments, "sample": sample[:, :, :channels], _IMAGE: sample[:, :, channels:]}


def _stacked(arguments: Arguments, channels: int) -> Arguments:
    """Z-Image takes lists of images with one frame, and of prompts, which may have different lengths."""
    images, prompts = arguments["x"], arguments[_CAPTIONS]
    for name, parts, axes in (("x", images, slice(None)), (_CAPTIONS, prompts, slice(1, None))):
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, torch.Tensor) for part in parts):
            raise InputError(f"{name!r} is no list of tensors, which this network takes", where=f"input {name}")
        if len({tuple(part.shape[axes]) for part in parts}) != 1:
            shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
            raise InputError(
                f"{name!r} holds tensors of different shapes: {shapes}",
                where=f"input {name}",
                hint="the images of a call have one size, and prompts one width",
            )
    if images[0].ndim != 4 or images[0].shape[1] != 1:
        raise InputError(f"'x' holds {list(images[0].shape)}, not images with one frame", where="input x")
    ones = [torch.ones(len(prompt), dtype=torch.int64) for prompt in prompts]
    rows, mask = (torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True) for parts in (prompts, ones))
    return {**arguments, "x": torch.stack(list(images))[:, :, 0], _CAPTIONS: rows, f"{_CAPTIONS}_mask": mask}


def _one_size(arguments: Arguments, channels: int) -> Arguments:
    """Qwen-Image's pipeline has a list of sizes for each image of the batch; the graph has one for all."""
    sizes = arguments.get("img_shapes")
    if isinstance(sizes, list) and sizes and all(each == sizes[0] for each in sizes):
        return {**arguments, "img_shapes": sizes[:1]}
    return arguments


def _with_variances(prediction: Any) -> Any:
    """HunyuanDiT's pipeline cuts the variances off, which the graph does not compute: zeros take their place."""
    return torch.cat([prediction, torch.zeros_like(prediction)], dim=1)


def _time_embedding(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pipelines of SDXL and Stable Video Diffusion read the width of its inputs in the layer."""
    width = config.get("projection_class_embeddings_input_dim")
    if config.get("addition_embed_type", "text_time") != "text_time" or width is None:
        return {}
    return {"add_embedding": SimpleNamespace(linear_1=SimpleNamespace(in_features=width))}


def _heads(config: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = config["num_attention_heads"]
    return {"num_heads": heads, "inner_dim": heads * config["attention_head_dim"]}


NETWORK_CLASSES: Mapping[str, NetworkClass] = {
    "UNet2DModel": NetworkClass("unet", "unets.unet_2d.UNet2DOutput"),
    "UNet2DConditionModel": NetworkClass(
        "unet", "unets.unet_2d_condition.UNet2DConditionOutput", attributes=_time_embedding
    ),
    "Kandinsky3UNet": NetworkClass("unet", "unets.unet_kandinsky3.Kandinsky3UNetOutput"),
    "UNetMotionModel": NetworkClass(
        "unet", "unets.unet_motion_model.UNetMotionOutput", arranged=_one_row_for_each_video
    ),
    "UNet3DConditionModel": NetworkClass("unet", "unets.unet_3d_condition.UNet3DConditionOutput"),
    "UNetSpatioTemporalConditionModel": NetworkClass(
        "unet",
        "unets.unet_spatio_temporal_condition.UNetSpatioTemporalConditionOutput",
        arranged=_image_apart,
        attributes=_time_embedding,
    ),
    "UNet1DModel": NetworkClass("unet", "unets.unet_1d.UNet1DOutput"),
    "AudioLDM2UNet2DConditionModel": NetworkClass("unet", "unets.unet_2d_condition.UNet2DConditionOutput"),
    "DiTTransformer2DModel": NetworkClass(),
    "PixArtTransformer2DModel": NetworkClass(),
    "HunyuanDiT2DModel": NetworkClass(answered=_with_variances, attributes=_heads),
    "SD3Transformer2DModel": NetworkClass(),
    "AuraFlowTransformer2DModel": NetworkClass(),
    "SanaTransformer2DModel": NetworkClass(),
    "FluxTransformer2DModel": NetworkClass(),
    "Flux2Transformer2DModel": NetworkClass(output="transformers.transformer_flux2.Flux2Transformer2DModelOutput"),
    "ChromaTransformer2DModel": NetworkClass(),
    "QwenImageTransformer2DModel": NetworkClass(arranged=_one_size, prompt=_PROMPT),
    "Lumina2Transformer2DModel": NetworkClass(),
    "ZImageTransformer2DModel": NetworkClass(
        arranged=_stacked,
        prompt=_CAPTIONS,
        answered=lambda prediction: list(prediction[:, :, None]),
        attributes=lambda config: {"in_channels": config["in_channels"]},
    ),
    "WanTransformer3DModel": NetworkClass(),
    "HunyuanVideoTransformer3DModel": NetworkClass(),
    "CogVideoXTransformer3DModel": NetworkClass(),
    "LTXVideoTransformer3DModel": NetworkClass(),
    "StableAudioDiTModel": NetworkClass(),
}
