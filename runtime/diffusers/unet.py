"""A bundle in the place of a diffusers network: the modules that pipelines call instead of a UNet or a transformer.

In runtime/ only this file and scheduler.py import torch and diffusers, and both are imported only with a pipeline (see
mezzotint/diffusers.py). A stand-in is a `ModelMixin`, so that pipelines accept it like the network, also in
`from_pretrained(..., unet=...)`. It has the configuration and the call of the network, and no parameters: the bundle's
engine holds the weights. Contiguous tensors are passed without copies in both directions.

A stand-in raises InputError for unsupported requests instead of ignoring them: half precision and GPUs (the kernels are
the CPU's, on float32 inputs), gradients, residuals and scales inside layers (ControlNet, LoRA, IP adapters), masks. It
has no layers, and it cannot be saved as a diffusers model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar, NoReturn

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from ..bundle.bundle import Bundle
from ..bundle.model_config import CLASS, bundle_config
from ..errors import InputError, TimestepNotDeployed
from ..session import Denoiser
from ..signature import EXTRA_CHANNELS, Timestep

Tensors = Mapping[str, torch.Tensor | None]
_FLOAT32 = "load the pipeline with torch_dtype=torch.float32, or call pipe.to(torch.float32) before attaching"
_CPU = "bundles run on the CPU: keep the whole pipeline there, or call pipe.to('cpu') before attaching"
_RESIDUALS = "ControlNets and adapters reach into the layers, which are compiled: use them with the original network"
_MASK = "the compiled graph has no input for masks: leave it out, or use the original network"
_HINTS = {
    "attention_mask": _MASK,
    "encoder_attention_mask": _MASK,
    "cross_attention_kwargs": "the layers are compiled: fuse a LoRA into the weights (pipe.fuse_lora), compile those",
    "down_block_additional_residuals": _RESIDUALS,
    "mid_block_additional_residual": _RESIDUALS,
    "down_intrablock_additional_residuals": _RESIDUALS,
}
_EXTRA = "the graph was compiled without it (IP adapters change the layers): use the original network"


class StandIn(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The common part of the stand-ins; make one with `bundle_stand_in`."""

    config_name = "config.json"
    original: ClassVar[str]
    slot: ClassVar[str]
    output: ClassVar[Callable[..., Any]]

    def __init__(self, bundle: Bundle, config: Mapping[str, Any], *, threads: int | None = None) -> None:
        super().__init__()
        self.bundle = bundle
        self.denoiser = bundle.denoiser(threads)
        self._of_timestep = _precisions(bundle, threads)
        channels = self.denoiser.channels_out
        # A DiT that learned its variances is compiled without their channels, and pipelines read here how many come.
        known = {} if channels is None else {"out_channels": channels}
        self.register_to_config(**{**completed(config), **known})

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            what = f"a bundle that stands in for a {type(self).original} has no {name!r}: its layers are compiled"
            raise AttributeError(what) from None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StandIn:
        """Raise InputError for a change by `to`, `half`, `cuda` and similar methods."""
        probe = fn(torch.empty(0))
        if probe.device.type != "cpu":
            raise InputError(f"a bundle cannot move to {probe.device}", where=str(self.bundle.path), hint=_CPU)
        if probe.dtype != torch.float32:
            raise InputError(f"a bundle cannot become {probe.dtype}", where=str(self.bundle.path), hint=_FLOAT32)
        return self

    def save_pretrained(self, *args: Any, **options: Any) -> NoReturn:
        raise InputError(
            "a bundle cannot be saved as a diffusers model",
            where=str(self.bundle.path),
            hint="save the pipeline before attaching the bundle, and copy the bundle's folder next to it",
        )

    def _predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        conditions: Tensors,
        return_dict: bool,
        unsupported: Mapping[str, Any] | None = None,
    ) -> Any:
        for name, value in (unsupported or {}).items():
            if value is not None and not (isinstance(value, dict) and not value):
                raise InputError(f"a bundle cannot use {name}", where=str(self.bundle.path), hint=_HINTS[name])
        x = _array(self.bundle.signature.sample, sample)
        known = self.bundle.signature.conditions
        if extra := [name for name, value in conditions.items() if value is not None and name not in known]:
            takes = f"its conditions are: {', '.join(known) or 'none'}"
            raise InputError(f"a bundle cannot use {extra[0]}; {takes}", where=str(self.bundle.path), hint=_EXTRA)
        given = {name: _array(name, value) for name, value in conditions.items() if value is not None}
        if EXTRA_CHANNELS in known:  # pipelines put them behind the channels of the image
            signature = self.bundle.signature
            image = signature.channels(self.bundle.sample_shape)
            x, given[EXTRA_CHANNELS] = np.split(x, [image], axis=signature.channel_axis)
        t = timestep.detach().cpu().numpy() if isinstance(timestep, torch.Tensor) else np.asarray(timestep)
        try:
            found = torch.from_numpy(self._network(t)(x, t, **given))
        except TimestepNotDeployed as error:
            raise TimestepNotDeployed(error.what, where=str(self.bundle.path), hint=self._deployed()) from None
        return type(self).output(sample=found) if return_dict else (found,)

    def _network(self, t: npt.NDArray[Any]) -> Denoiser:
        """Return the network of the nearest timestep in a bundle of several precisions, else the only one."""
        known = self._of_timestep
        return known[min(known, key=lambda mine: abs(mine - float(t.flat[0])))] if known else self.denoiser

    def _deployed(self) -> str:
        """Return a hint for a timestep without a row, in terms of a pipeline."""
        counts, schedule = self.bundle.deployed_steps(), self.bundle.schedule
        return (
            f"call the pipeline with num_inference_steps={' or '.join(map(str, counts[-8:]))}, and a scheduler with "
            f"timestep_spacing {schedule.timestep_spacing!r} and steps_offset {schedule.steps_offset}; "
            "or compile for the steps that you want"
        )


class UNet2DStandIn(StandIn):
    """Stand-in of a UNet2DModel: `sample` float32 `[B, C, H, W]`, one timestep, perhaps `class_labels` `[B]`."""

    original = "UNet2DModel"
    slot = "unet"
    output = UNet2DOutput

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        return self._predict(sample, timestep, {"class_labels": class_labels}, return_dict)


class UNet2DConditionStandIn(StandIn):
    """Stand-in of a UNet2DConditionModel: `encoder_hidden_states` `[B, tokens, width]`; SDXL's two more."""

    original = "UNet2DConditionModel"
    slot = "unet"
    output = UNet2DConditionOutput

    def __init__(self, bundle: Bundle, config: Mapping[str, Any], *, threads: int | None = None) -> None:
        super().__init__(bundle, config, threads=threads)
        if self.config.addition_embed_type == "text_time":  # SDXL's pipelines read the width of its inputs here
            width = self.config.projection_class_embeddings_input_dim
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor, ...] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        conditions = {
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            **(added_cond_kwargs or {}),
        }
        unsupported = {
            "attention_mask": attention_mask,
            "encoder_attention_mask": encoder_attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
        }
        return self._predict(sample, timestep, conditions, return_dict, unsupported)


class DiTStandIn(StandIn):
    """Stand-in of a DiTTransformer2DModel: `hidden_states` `[B, C, H, W]`, one timestep, `class_labels` int64 `[B]`.

    The prediction has the channels of the noise only (compiler/frontend/from_torch.py); `config.out_channels` says so.
    """

    original = "DiTTransformer2DModel"
    slot = "transformer"
    output = Transformer2DModelOutput

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        unsupported = {"cross_attention_kwargs": cross_attention_kwargs}
        return self._predict(hidden_states, timestep, {"class_labels": class_labels}, return_dict, unsupported)


STAND_INS: dict[str, type[StandIn]] = {
    kind.original: kind for kind in (UNet2DStandIn, UNet2DConditionStandIn, DiTStandIn)
}


def _precisions(bundle: Bundle, threads: int | None) -> dict[Timestep, Denoiser]:
    """Return the network for each timestep; empty for a single network. A pipeline gives no position of a call."""
    if bundle.precisions is None:
        return {}
    calls, names = bundle.deployment.calls, bundle.precisions.calls
    found = dict(zip(calls, names, strict=True))
    if twice := [t for t, name in zip(calls, names, strict=True) if found[t] != name]:
        raise InputError(
            f"two calls at timestep {twice[0]:g} use different precisions, which a pipeline cannot tell apart",
            where=str(bundle.path),
            hint="mix the bundle for a sampler that calls each timestep once, or sample with mezzotint",
        )
    return {t: bundle.denoiser(threads, name) for t, name in found.items()}


def bundle_stand_in(bundle: Bundle, *, threads: int | None = None) -> StandIn:
    """Return the module that replaces the network of a bundle. Raises InputError if its class is not known."""
    config = bundle_config(bundle)
    if config is None:
        raise InputError(
            "the bundle keeps no configuration of its model, so no pipeline can use it",
            where=str(bundle.path),
            hint="compile the diffusers model, or put its config.json next to the .onnx file and compile again",
        )
    if config[CLASS] not in STAND_INS:
        raise InputError(
            f"no pipeline of a {config[CLASS]} can use a bundle yet; {', '.join(STAND_INS)} can be replaced",
            where=str(bundle.path),
            hint="sample from the bundle itself",
        )
    return STAND_INS[config[CLASS]](bundle, config, threads=threads)


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with its missing keys, as the installed diffusers fills them in."""
    parameters = inspect.signature(getattr(diffusers, config[CLASS]).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {**defaults, **config}


def _array(name: str, tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Return a tensor's memory as a numpy array. Raises InputError if that needs a conversion."""
    if tensor.device.type != "cpu":
        raise InputError(f"{name!r} lies on {tensor.device}", where=f"input {name}", hint=_CPU)
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise InputError(f"{name!r} is {tensor.dtype}, not float32", where=f"input {name}", hint=_FLOAT32)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name!r} requires a gradient, and a bundle has none",
            where=f"input {name}",
            hint="call in torch.no_grad()",
        )
    array: npt.NDArray[Any] = tensor.detach().numpy()
    return array
