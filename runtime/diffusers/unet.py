"""A bundle in the place of a diffusers network: the module that pipelines call instead of a UNet or a transformer.

In runtime/ only the files of this room import torch and diffusers, and all are imported only with a pipeline (see
mezzotint/diffusers.py). A stand-in is a `ModelMixin`, so that pipelines accept it like the network, also in
`from_pretrained(..., unet=...)`. It has the configuration and the call of the network, and no parameters: the bundle's
engine holds the weights. network_classes.py says what pipelines expect of each class, network_arguments.py what may
be in a call. Contiguous float32 tensors are passed without copies in both directions.

In a pipeline of half precision the inputs are widened to float32, which is exact, and the prediction is rounded to the
pipeline's type. One warning says so. GPUs and gradients are refused, and so are calls that the graph cannot follow.
It has no layers, and it cannot be saved as a diffusers model.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import diffusers
import numpy.typing as npt
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from ..bundle.bundle import Bundle
from ..bundle.model_config import CLASS, bundle_config
from ..bundle.network_call import bundle_call
from ..errors import HalfPipeline, InputError, TimestepNotDeployed
from ..session import Denoiser
from ..signature import Timestep
from .network_arguments import HALF_TYPES, ArgumentReader, given_arguments
from .network_classes import NETWORK_CLASSES
from .network_time import training_time
from .timestep_hint import timestep_hint

_TYPES = "load the pipeline with torch_dtype=torch.float32, torch.float16 or torch.bfloat16"
_CPU = "bundles run on the CPU: keep the whole pipeline there, or call pipe.to('cpu') before attaching"


class StandIn(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The module that replaces the network of a bundle; make one with `bundle_stand_in`.

    `original` is the name of the network's class in diffusers, `slot` the component of a pipeline that holds it.
    """

    config_name = "config.json"

    def __init__(self, bundle: Bundle, config: Mapping[str, Any], *, threads: int | None = None) -> None:
        super().__init__()
        self.original = str(config[CLASS])
        self._class = NETWORK_CLASSES[self.original]
        self.slot = self._class.slot
        self.bundle = bundle
        self.denoiser = bundle.denoiser(threads)
        self._reader = ArgumentReader(bundle, self.denoiser, self.original, bundle_call(bundle))
        self._of_timestep = _precisions(bundle, threads)
        self._dtype = torch.float32
        self._warned = False
        full, channels = completed(config), self.denoiser.channels_out
        # A network that learned its variances is compiled without their channels, and pipelines read here how many
        # come.
        cut = channels is not None and full.get("out_channels") == 2 * channels
        self.register_to_config(**{**full, **({"out_channels": channels} if cut else {})})
        if self._class.attributes is not None:
            for name, value in self._class.attributes(full).items():
                setattr(self, name, value)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            what = f"a bundle that stands in for a {original} has no {name!r}: its layers are compiled"
            raise AttributeError(what) from None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> StandIn:
        """Take on the type of a pipeline. Raise InputError for another device, and for a type that no pipeline has."""
        probe = fn(torch.empty(0, dtype=self._dtype))
        if probe.device.type != "cpu":
            raise InputError(f"a bundle cannot move to {probe.device}", where=str(self.bundle.path), hint=_CPU)
        self.take_type(probe.dtype)
        return self

    def take_type(self, dtype: torch.dtype) -> None:
        """Answer in this type from now on: float32 or, with one warning, a half. Raises InputError for others.

        Inputs may have any of these types.
        """
        if dtype not in (torch.float32, *HALF_TYPES):
            raise InputError(f"a bundle cannot become {dtype}", where=str(self.bundle.path), hint=_TYPES)
        self._warn_of_half(dtype)
        self._dtype = dtype

    def _warn_of_half(self, dtype: torch.dtype) -> None:
        if dtype in HALF_TYPES and not self._warned:
            self._warned = True
            warnings.warn(
                f"the pipeline is in {dtype}: the bundle computes in its own types on the CPU, its inputs are widened "
                f"to float32, and each prediction is rounded to {dtype}",
                HalfPipeline,
                stacklevel=2,
            )

    def cache_context(self, name: str, **options: Any) -> AbstractContextManager[None]:
        """Return a context that does nothing: pipelines name their calls by it for caches inside the layers."""
        return nullcontext()

    def save_pretrained(self, *args: Any, **options: Any) -> NoReturn:
        raise InputError(
            "a bundle cannot be saved as a diffusers model",
            where=str(self.bundle.path),
            hint="save the pipeline before attaching the bundle, and copy the bundle's folder next to it",
        )

    def forward(self, *args: Any, **options: Any) -> Any:
        """Return the prediction, for the arguments of the original's `forward`.

        Raises InputError for arguments that the graph cannot follow, MixedTimesteps, TimestepNotDeployed.
        """
        arguments = given_arguments(getattr(diffusers, self.original), str(self.bundle.path), args, options)
        return_dict = arguments.pop("return_dict", True)
        sample, timestep, conditions = self._reader.read(arguments)
        x, conditions = self._reader.split_sample(sample, conditions)
        t = training_time(timestep, self.bundle.signature, self.bundle.deployed_timesteps)
        try:
            found = torch.from_numpy(self._network(t)(x, t, **conditions))
        except TimestepNotDeployed as error:
            hint = timestep_hint(self.bundle)
            raise TimestepNotDeployed(error.what, where=str(self.bundle.path), hint=hint) from None
        answer = self._rounded(found, sample.dtype)
        answer = answer if self._class.answered is None else self._class.answered(answer)
        return _output(self._class.output)(sample=answer) if return_dict else (answer,)

    def _rounded(self, prediction: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a prediction in the type of the sample. Raises InputError where it leaves the type's range."""
        if dtype not in HALF_TYPES:
            return prediction
        self._warn_of_half(dtype)
        rounded = prediction.to(dtype)
        if bool((rounded.isinf() & prediction.isfinite()).any()):
            raise InputError(
                f"the prediction reaches {float(prediction.abs().max()):.0f}, beyond the range of {dtype}",
                where=str(self.bundle.path),
                hint="load the pipeline with torch_dtype=torch.bfloat16 or torch.float32",
            )
        return rounded

    def _network(self, t: npt.NDArray[Any]) -> Denoiser:
        """Return the network of the nearest timestep in a bundle of several precisions, else the only one."""
        known = self._of_timestep
        return known[min(known, key=lambda mine: abs(mine - float(t.flat[0])))] if known else self.denoiser


def _output(name: str) -> Any:
    """Return the class of an output by its place behind diffusers.models."""
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(f"diffusers.models.{module}"), kind)


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
    if config[CLASS] not in NETWORK_CLASSES:
        raise InputError(
            f"no pipeline of a {config[CLASS]} can use a bundle; {', '.join(NETWORK_CLASSES)} can be replaced",
            where=str(bundle.path),
            hint="sample from the bundle itself",
        )
    if not hasattr(diffusers, config[CLASS]):
        raise InputError(
            f"the installed diffusers {diffusers.__version__} has no {config[CLASS]}",
            where=str(bundle.path),
            hint="install the version of diffusers that the model was saved by, or a later one",
        )
    return StandIn(bundle, config, threads=threads)


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with its missing keys, as the installed diffusers fills them in."""
    parameters = inspect.signature(getattr(diffusers, config[CLASS]).__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {**defaults, **config}
