"""LoRA files fused into a network's weights: W + weight * scale * B A, in float32.

The names of a file's tensors are those of diffusers, peft, kohya's scripts, or of the tools that diffusers' own loaders
know; these loaders translate them. `scale` is alpha over rank: by the file's alphas, else by the settings of its
adapter, else 1. No peft is needed, and nothing is left out in silence.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file

from mezzotint.runtime.errors import CompileWarning

from ..errors import ModelError
from .lora_files import LoraFile

_LOADERS = {
    "AuraFlowTransformer2DModel": "AuraFlowLoraLoaderMixin",
    "ChromaTransformer2DModel": "FluxLoraLoaderMixin",
    "CogVideoXTransformer3DModel": "CogVideoXLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoLoraLoaderMixin",
    "LTXVideoTransformer3DModel": "LTXVideoLoraLoaderMixin",
    "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "SD3Transformer2DModel": "SD3LoraLoaderMixin",
    "SanaTransformer2DModel": "SanaLoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
"""The loaders of diffusers for classes of transformers; U-Nets have that of Stable Diffusion, other classes none."""
_DENOISERS = ("unet.", "transformer.", "base_model.model.")
_ENCODER = re.compile(r"(text_encoder|te\d?)(_\d+)?\.")
_SHOWN = 3  # names in a message
LoraTensors = dict[str, torch.Tensor]


def fuse(model: torch.nn.Module, lora: LoraFile, kept: dict[str, torch.nn.Parameter] | None = None) -> int:
    """Fuse a LoRA into a module in float32 and return the number of layers that it changed.

    With `kept` the changed parameters are new ones, and those that they replace are in it. Raises ModelError for names
    and shapes that the module does not have; warns of the parts of text encoders.
    """
    where, layers = str(lora.path), dict(model.named_modules())
    pairs = _pairs(_translated(model, lora), where)
    if missing := [name for name in pairs if not isinstance(getattr(layers.get(name), "weight", None), torch.Tensor)]:
        raise ModelError(
            f"the LoRA is for layers that a {type(model).__name__} of this configuration does not have: "
            + _names(missing),
            where=where,
            hint="use a LoRA that was trained on this model",
        )
    for name, (down, up, bias, scale) in pairs.items():
        layer = layers[name]
        _add(layer, "weight", f"{name}.weight", _delta(name, layer.weight, down, up, where), lora.weight * scale, kept)
        if bias is not None:
            if layer.bias is None:
                raise ModelError(f"the LoRA has a bias for {name!r}, which has none", where=where)
            _add(layer, "bias", f"{name}.bias", bias.to(torch.float32), lora.weight, kept)
    return len(pairs)


def _add(
    layer: Any, leaf: str, name: str, delta: torch.Tensor, weight: float, kept: dict[str, torch.nn.Parameter] | None
) -> None:
    parameter = getattr(layer, leaf)
    if kept is not None and name not in kept:
        kept[name] = parameter
        parameter = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        setattr(layer, leaf, parameter)
    parameter.data.add_(delta, alpha=weight)


def _delta(name: str, weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, where: str) -> torch.Tensor:
    """Return B A in the shape of the weight; the kernel of a convolution is in A, and B is 1x1."""
    rows, columns = up.flatten(1).to(torch.float32), down.flatten(1).to(torch.float32)
    if rows.shape[0] != weight.shape[0] or columns.shape[1] * rows.shape[0] != weight.numel():
        raise ModelError(
            f"the LoRA of {name!r} has the shape {list(up.shape)} x {list(down.shape)}, "
            f"the layer's weight {list(weight.shape)}",
            where=where,
            hint="use a LoRA that was trained on this model",
        )
    return (rows @ columns).reshape(weight.shape)


def _pairs(
    tensors: LoraTensors, where: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float]]:
    """Return A, B, the bias of B and the scale of each layer. Raises ModelError for tensors that are none of these."""
    alphas = {key.removesuffix(".alpha"): float(tensors[key]) for key in tensors if key.endswith(".alpha")}
    usual = Counter(alphas.values()).most_common(1)
    names = sorted({key.partition(".lora_A.")[0] for key in tensors if ".lora_A." in key})
    found, read = {}, {f"{name}.alpha" for name in names}
    for name in names:
        down, up, bias = (f"{name}.{part}" for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias"))
        if down in tensors and up in tensors:
            a, b = tensors[down], tensors[up]
            rank = a.shape[0]
            if rank != b.flatten(1).shape[1]:
                raise ModelError(f"the two matrices of {name!r} have the ranks {rank} and {b.shape[1]}", where=where)
            scale = alphas.get(name, usual[0][0] if usual else rank) / rank
            found[name] = (a, b, tensors.get(bias), scale)
            read |= {down, up, bias}
    if unread := sorted(tensors.keys() - read):
        raise ModelError(f"the LoRA has tensors that nothing here reads: {_names(unread)}", where=where)
    if not found:
        raise ModelError("the LoRA changes nothing of the denoiser", where=where, hint="give a LoRA of the denoiser")
    return found


def _translated(model: torch.nn.Module, lora: LoraFile) -> LoraTensors:
    """Return the tensors of the denoiser by the names of peft, behind those of its modules, with an alpha of each."""
    lora.keys()
    tensors, settings, where = load_file(lora.path), lora.settings(), str(lora.path)
    modules = {name for name, _ in model.named_modules()}
    own = {key: value for key, value in tensors.items() if _bare(key).partition(".lora_")[0] in modules}
    if len(own) < len(tensors):
        tensors = _by_diffusers(model, tensors, where)
    kept, left = {}, []
    for key, value in tensors.items():
        if _ENCODER.match(key):
            left.append(key)
        else:
            kept[_bare(key)] = value
    if left:
        warnings.warn(
            f"{where}: {len(left)} tensors of this LoRA change a text encoder ({_names(left)}), which is no part of a "
            "denoiser; load them into the pipeline that makes the prompts",
            CompileWarning,
            stacklevel=2,
        )
    kept = _peft_names(kept)
    return kept | _alphas_of_settings(kept, {_bare(key): value for key, value in settings.items()})


def _by_diffusers(model: torch.nn.Module, tensors: LoraTensors, where: str) -> LoraTensors:
    """Return the tensors by the names of diffusers, and their alphas. Raises ModelError for a file it cannot read."""
    from diffusers.loaders import lora_pipeline

    name = type(model).__name__
    unet = "UNet" in name
    loader: Any = getattr(lora_pipeline, "StableDiffusionLoraLoaderMixin" if unet else _LOADERS.get(name, ""), None)
    if loader is None:
        return tensors
    options: dict[str, Any] = {"unet_config": model.config} if unet else {}
    options |= {"return_alphas": True} if name in ("FluxTransformer2DModel", "ChromaTransformer2DModel") else {}
    try:
        answer = loader.lora_state_dict(dict(tensors), **options)
    except Exception as error:  # its translators raise many kinds of errors for names that they do not know
        line = (str(error).splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(
            f"diffusers cannot read this LoRA for a {name}: {line}",
            where=where,
            hint="use a LoRA that was trained on this model",
        ) from error
    found, alphas = answer if isinstance(answer, tuple) else (answer, None)
    return {**found, **{key: torch.as_tensor(value) for key, value in (alphas or {}).items()}}


def _peft_names(tensors: LoraTensors) -> LoraTensors:
    from diffusers.utils import convert_unet_state_dict_to_peft

    alphas = {key: value for key, value in tensors.items() if key.endswith(".alpha")}
    rest = {key: value for key, value in tensors.items() if key not in alphas}
    if all(".lora_A" in key or ".lora_B" in key for key in rest):
        return {**rest, **alphas}
    # Some alphas have the whole name of a matrix in front of them.
    named = convert_unet_state_dict_to_peft({key.removesuffix(".alpha"): value for key, value in alphas.items()})
    alphas = {f"{key.partition('.lora_')[0]}.alpha": value for key, value in named.items()}
    return {**convert_unet_state_dict_to_peft(rest), **alphas}


def _alphas_of_settings(tensors: LoraTensors, settings: Mapping[str, Any]) -> LoraTensors:
    """Return an alpha for each layer by the settings of its adapter, where the file has none itself."""
    if "lora_alpha" not in settings or any(key.endswith(".alpha") for key in tensors):
        return {}
    patterns: Mapping[str, float] = settings.get("alpha_pattern") or {}
    found = {}
    for key, value in tensors.items():
        name, part, _ = key.partition(".lora_A.")
        if part:
            own = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), settings["lora_alpha"])
            rank = value.shape[0]
            found[f"{name}.alpha"] = torch.tensor(float(own) * (rank**0.5 if settings.get("use_rslora") else 1.0))
    return found


def _bare(key: str) -> str:
    return next((key.removeprefix(prefix) for prefix in _DENOISERS if key.startswith(prefix)), key)


def _names(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(map(repr, keys[:_SHOWN])) + more


def fused_rows(model: torch.nn.Module, loras: tuple[LoraFile, ...], kept: Any = None) -> Iterator[dict[str, Any]]:
    """Fuse LoRAs one after the other, and yield what the manifest has of each."""
    from mezzotint.runtime.bundle.bundle import file_sha256

    for lora in loras:
        layers = fuse(model, lora, kept)
        yield {"name": lora.path.name, "sha256": file_sha256(lora.path), "weight": lora.weight, "layers": layers}
