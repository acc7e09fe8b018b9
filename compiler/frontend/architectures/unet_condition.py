"""UNet2DConditionModel: prompts, and what its configurations add to them.

    addition_embed_type    text_time (SDXL), text, text_image, image, image_hint (DeepFloyd IF, Kandinsky)
    encoder_hid_dim_type   text_proj, text_image_proj, image_proj (the same), ip_image_proj (IP-Adapter)
    class_embed_type       see unet.py (upscaler, unCLIP, AudioLDM)
    time_cond_proj_dim     the embedded guidance of LCM

No configuration says whether a ControlNet, a T2I-Adapter or a mask of tokens comes with the prompt. The graph has these
inputs where the caller has conditions of these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .residuals import residual_inputs
from .row import MASK, PROMPT, PROMPT_LENGTH, Architecture, Asked, Input, NetworkInputs, first
from .unet import CONDITIONAL, class_input

_USUAL_TOKENS = 77
_TIME_IDS = 6  # of SDXL's base model; its refiner has 5
_HINT_CHANNELS = 4  # that Kandinsky's network makes of a hint, and puts behind those of the sample
_HINT_SCALE = 8
_ADAPTER = "ip_image_proj"


def _projection(asked: Asked) -> Any:
    """Return the kind of projection of prompts and images. load_ip_adapter changes it in the module only."""
    adapters = getattr(getattr(asked.module, "encoder_hid_proj", None), "image_projection_layers", None)
    return _ADAPTER if adapters is not None else asked.config.get("encoder_hid_dim_type")


def _inputs(asked: Asked) -> NetworkInputs:
    config = asked.config
    channels, multiple = asked.number("in_channels"), 2 ** (len(config["block_out_channels"]) - 1)
    conditions: dict[str, Input] = {}
    width = _prompt_width(asked)
    if width is not None:
        masked = MASK in asked.sizes
        length = None if masked and _adds_prompts(config) else PROMPT_LENGTH
        conditions[PROMPT] = Input((asked.tokens(PROMPT, _USUAL_TOKENS), width), length=length)
        if masked:
            conditions[MASK] = Input(conditions[PROMPT].sizes[:1], kind="mask", length=length)
    if config.get("time_cond_proj_dim") is not None:
        conditions["timestep_cond"] = Input((asked.number("time_cond_proj_dim"),))
    height, side = asked.side()
    if config.get("addition_embed_type") == "image_hint":
        channels -= _HINT_CHANNELS
        sizes = (3, _HINT_SCALE * height, _HINT_SCALE * side)
        conditions["hint"] = Input(sizes, path=("added_cond_kwargs", "hint"))
    conditions |= _added(asked) | _image(asked) | class_input(asked) | residual_inputs(asked, height, side)
    fixed = {} if width is not None else {PROMPT: None}
    return NetworkInputs("sample", (channels, height, side), conditions, multiple, asked.predicted, fixed=fixed)


def _adds_prompts(config: Mapping[str, Any]) -> bool:
    """Return whether blocks attend to prompt and image at once (DeepFloyd IF): their mask has no open length.

    diffusers pads it by the tokens of the image, and torch.export finds "Not all values of tokens [...] satisfy the
    generated guard".
    """
    kinds = (*config["down_block_types"], *(config.get("up_block_types") or ()), str(config.get("mid_block_type")))
    return any("SimpleCrossAttn" in str(kind) for kind in kinds)


def _prompt_width(asked: Asked) -> int | None:
    """Return the width of the prompt, None for a network that reads none."""
    config = asked.config
    kind, width = _projection(asked), config["cross_attention_dim"]
    if kind == "image_proj":  # the image's projection takes the prompt's place
        return None
    if config.get("encoder_hid_dim") is not None and kind in (None, "text_proj", "text_image_proj", _ADAPTER):
        return asked.number("encoder_hid_dim")
    if kind not in (None, _ADAPTER):
        raise asked.error(f"a {asked.name} with encoder_hid_dim_type {kind!r} is not known")
    # AudioLDM attends to its own features where others attend to the prompt: the widths are those of its blocks.
    differs = not isinstance(width, int) and len(set(width)) > 1
    return None if differs and list(width) == list(config["block_out_channels"]) else first(width)


def _added(asked: Asked) -> dict[str, Input]:
    """Return what `addition_embed_type` adds to the time embedding, but for the hint of an image."""
    kind, width = asked.config.get("addition_embed_type"), first(asked.config["cross_attention_dim"])
    if kind == "text_time":
        sizes = _text_time(asked)
        return {name: Input(size, path=("added_cond_kwargs", name)) for name, size in sizes.items()}
    if kind == "text_image":
        return {"text_embeds": Input((width,), path=("added_cond_kwargs", "text_embeds"))} | _vector(width)
    if kind in ("image", "image_hint"):
        return _vector(asked.number("encoder_hid_dim"))
    if kind not in (None, "text"):
        raise asked.error(f"a {asked.name} with addition_embed_type {kind!r} is not known")
    return {}


def _text_time(asked: Asked) -> dict[str, tuple[int, ...]]:
    """Return the sizes of SDXL's pooled prompt and time ids, which share the width of one layer."""
    width, each = (asked.config.get(k) for k in ("projection_class_embeddings_input_dim", "addition_time_embed_dim"))
    if not isinstance(width, int) or not isinstance(each, int) or each < 1:
        raise asked.error(
            f"the configuration says no sizes of text_embeds and time_ids: {width!r}, {each!r}",
            "set projection_class_embeddings_input_dim and addition_time_embed_dim as the weights have them",
        )
    if "text_embeds" in asked.sizes:
        ids, rest = divmod(width - asked.sizes["text_embeds"][0], each)
    else:
        ids, rest = asked.sizes.get("time_ids", (_TIME_IDS,))[0], 0
    if rest or ids < 1 or width - ids * each < 1:
        raise asked.error(
            f"text_embeds and time_ids do not fit: the model takes {width} numbers of both, {each} for each time id",
            "give the conditions of this model's own pipeline: --conditions FILE.npz",
        )
    return {"text_embeds": (width - ids * each,), "time_ids": (ids,)}


def _image(asked: Asked) -> dict[str, Input]:
    """Return the embedding of an image that the prompt's projection reads, or those of IP-Adapters."""
    kind = _projection(asked)
    if kind == "text_image_proj":
        return _vector(first(asked.config["cross_attention_dim"]))
    if kind == "image_proj":
        return _vector(asked.number("encoder_hid_dim"))
    return _adapters(asked) if kind == _ADAPTER else {}


def _vector(width: int) -> dict[str, Input]:
    return {"image_embeds": Input((width,), path=("added_cond_kwargs", "image_embeds"))}


def _adapters(asked: Asked) -> dict[str, Input]:
    """Return an input for each IP-Adapter: `[images, width]` of one, `[images, tokens, width]` of a Plus.

    Only the module in memory has the widths. The rows that a caller has say how many images and tokens there are.
    """
    layers: Any = getattr(getattr(asked.module, "encoder_hid_proj", None), "image_projection_layers", None)
    if layers is None:
        raise asked.error(
            "the configuration asks for an IP-Adapter, whose weights are no part of a model's folder",
            "load the pipeline, call load_ip_adapter, and compile pipe.unet from memory",
        )
    inputs = {}
    for i, layer in enumerate(layers):
        name = f"image_embeds_{i}"
        linear = getattr(layer, "image_embeds", None)
        width = linear.in_features if linear is not None else _plus_width(asked, layer)
        usual = (1, width) if linear is not None else (1, _PLUS_TOKENS, width)
        known = asked.sizes.get(name, usual)
        inputs[name] = Input((*known[:-1], width), path=("added_cond_kwargs", "image_embeds", i))
    return inputs


_PLUS_TOKENS = 257  # of the image encoder of the published adapters


def _plus_width(asked: Asked, layer: Any) -> int:
    linear = getattr(layer, "proj_in", None)
    if linear is None:
        raise asked.error(f"an IP-Adapter with a {type(layer).__name__} is not known")
    return int(linear.in_features)


UNET2D_CONDITION = Architecture(
    CONDITIONAL,
    _inputs,
    {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 1280,
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    },
)
