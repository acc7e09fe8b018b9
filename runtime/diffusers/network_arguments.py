"""The arguments of a network's call in diffusers, as the inputs of a bundle's graph.

Every argument has one of four ends: it is an input of the graph, it means the same as what the export kept (positions,
sizes; bundle/network_call.py), it changes nothing (None, a default, a mask of ones), or it is an error that names it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..bundle.bundle import Bundle
from ..bundle.network_call import difference
from ..errors import InputError
from ..open_sizes import known_size
from ..session import Denoiser
from ..signature import EXTRA_CHANNELS
from .network_classes import NETWORK_CLASSES, Arguments

HALF_TYPES = (torch.float16, torch.bfloat16)
_ADDED = "added_cond_kwargs"
_CPU = "bundles run on the CPU: keep the whole pipeline there, or call pipe.to('cpu') before attaching"
_RESIDUALS = (
    "ControlNets and adapters reach into the layers: compile a pipeline with its ControlNet, or with residuals in "
    "--conditions, or use the "
)
_MASK = (
    "the graph has no input for it, and a mask that is not all ones changes the prediction: leave it out, or compile "
)
_LORA = "the layers are compiled: fuse a LoRA into the weights (pipe.fuse_lora), and compile those"
_EXTRA = "the graph was compiled without it (IP adapters change the layers): use the original network"
_HINTS = {
    "ip_adapter": _EXTRA,
    "skip_layers": "the layers are compiled, and none can be left out: use the original network",
    "mask": _MASK + "with an array of this name in --conditions",
    "residual": _RESIDUALS + "original network",
    "controlnet": "ControlNets reach into the layers, which are compiled: use them with the original network",
    "attention_kwargs": _LORA,
}
_FIXED = "the graph holds it as a constant: call the pipeline as the bundle was compiled, or compile it for this call"


def given_arguments(original: type, where: str, args: tuple[Any, ...], options: Mapping[str, Any]) -> Arguments:
    """Return the arguments of a call by the names of the original's `forward`, without those that are defaults."""
    signature = inspect.signature(original.forward)  # type: ignore[attr-defined]
    try:
        arguments = signature.bind(None, *args, **options).arguments
    except TypeError as error:
        raise InputError(
            f"a {original.__name__} cannot be called like this: {error}",
            where=where,
            hint="call it as the installed version of diffusers calls the network",
        ) from None
    _self, *names = arguments
    defaults = {name: signature.parameters[name].default for name in names}
    return {name: arguments[name] for name in names if not _is_default(arguments[name], defaults[name])}


def _is_default(value: Any, default: Any) -> bool:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return plain and type(value) is type(default) and bool(value == default)


class ArgumentReader:
    """Makes the inputs of a bundle's graph from the arguments of a call."""

    def __init__(self, bundle: Bundle, denoiser: Denoiser, name: str, fixed: Mapping[str, Mapping[str, Any]]) -> None:
        self._bundle, self._name, self._fixed = bundle, name, fixed
        self._inputs = denoiser.inputs
        self._where = str(bundle.path)

    def read(self, arguments: Arguments) -> tuple[torch.Tensor, Any, dict[str, npt.NDArray[Any]]]:
        """Return the sample, the timestep and the conditions. Raises InputError for what the graph cannot follow."""
        facts = NETWORK_CLASSES[self._name]
        own = self._bundle.signature.channels(self._bundle.sample_shape)
        arguments = arguments if facts.arranged is None else facts.arranged(arguments, own)
        if facts.prompt:
            arguments = self._padded(arguments, facts.prompt)
        sample, time = next(iter(arguments)), "timestep" if "timestep" in arguments else "t"
        if time not in arguments:
            raise InputError("the call gives no timestep", where=self._where)
        signature = self._bundle.signature
        conditions = {}
        rest = {name: value for name, value in arguments.items() if name not in (sample, time)}
        self._check_fixed(rest)
        for name, shown, value in flattened({n: v for n, v in rest.items() if n not in self._fixed}):
            if name in signature.conditions:
                conditions[name] = self._condition(name, value)
            elif not ("mask" in name and _all_ones(value)):
                raise self._refusal(name, shown)
        for name in signature.conditions:
            if name not in conditions and (mask := self._mask_of_ones(name, conditions)) is not None:
                conditions[name] = np.repeat(mask, len(arguments[sample]), axis=0)
        return arguments[sample], arguments[time], conditions

    def _padded(self, arguments: Arguments, name: str) -> Arguments:
        """Return a call whose prompt has the length that the graph fixes: masked tokens change nothing."""
        hides = f"{name}_mask"
        prompt, mask = arguments.get(name), arguments.get(hides)
        tokens = self._inputs[name][1][1] if name in self._inputs else None
        if not isinstance(tokens, int) or prompt is None or hides not in self._inputs:
            return arguments
        missing = max(tokens - prompt.shape[1], 0)
        mask = torch.ones(prompt.shape[:2], dtype=torch.int64) if mask is None else mask
        pad = torch.nn.functional.pad
        return {**arguments, name: pad(prompt, (0, 0, 0, missing)), hides: pad(mask, (0, missing))}

    def _check_fixed(self, arguments: Arguments) -> None:
        """Raise InputError for an argument that is another than the one that the graph holds."""
        for name, entry in self._fixed.items():
            if name not in arguments:
                if entry.get("value", True) is not None:
                    raise InputError(
                        f"the call leaves out {name}, which the bundle was exported with",
                        where=self._where,
                        hint=_FIXED,
                    )
                continue
            rounding = max(
                (torch.finfo(t.dtype).eps for t in _tensors(arguments[name]) if t.dtype in HALF_TYPES), default=0.0
            )
            if text := difference(entry, _arrays(arguments[name]), rounding):
                raise InputError(f"{name} {text} when the bundle was exported", where=self._where, hint=_FIXED)

    def _refusal(self, name: str, shown: str) -> InputError:
        known = self._bundle.signature.conditions
        hint = next((text for word, text in _HINTS.items() if word in shown), _EXTRA)
        takes = f"; its conditions are: {', '.join(known) or 'none'}" if hint is _EXTRA else ""
        return InputError(f"a bundle cannot use {shown}{takes}", where=self._where, hint=hint)

    def _condition(self, name: str, value: Any) -> npt.NDArray[Any]:
        array = as_array(name, value)
        dtype, shape = self._inputs[name]
        if dtype.kind in "iub" and array.dtype != dtype and bool((array == array.astype(dtype)).all()):
            array = array.astype(dtype)  # a mask in another type
        if dtype.kind == "f" and array.dtype == np.bool_:
            array = self._added_mask(name, array, dtype)
        self._check_sizes(name, array, shape)
        return array

    def _added_mask(self, name: str, mask: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return a boolean mask that hides nothing for attention that adds its mask to the scores: a constant there."""
        if not bool(mask.all()):
            raise InputError(
                f"{name!r} is a boolean mask, and the bundle was compiled for numbers that attention adds to scores",
                where=f"input {name}",
                hint="give it as float32 ones and zeros, as the pipeline does that encodes the prompt itself",
            )
        return mask.astype(dtype)

    def _check_sizes(self, name: str, array: npt.NDArray[Any], shape: tuple[int | str | None, ...]) -> None:
        """Raise InputError for sizes behind the batch that the graph fixes otherwise."""
        pairs = list(zip(array.shape, shape, strict=False))[1:]
        if array.ndim == len(shape) and all(not isinstance(size, int) or size == own for own, size in pairs):
            return
        if array.ndim != len(shape):
            return  # the call reports it
        raise InputError(
            f"{name!r} has the shape {list(array.shape)}, and the bundle was compiled for {[*shape]}",
            where=f"input {name}",
            hint="give the pipeline the max_sequence_length or the prompt embeddings that the bundle was compiled for, "
            "or compile it with conditions of this length",
        )

    def _mask_of_ones(self, name: str, conditions: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[Any] | None:
        """Return one row of the mask that hides nothing, for a pipeline that leaves such a mask out (Qwen-Image).

        An open length is that of the other conditions of the call.
        """
        dtype, (_, *sizes) = self._inputs[name]
        known = {
            size: own
            for other, array in conditions.items()
            for size, own in zip(self._inputs[other][1][1:], array.shape[1:], strict=False)
            if isinstance(size, str)
        }
        found = [size if isinstance(size, int) else known_size(size, known) for size in sizes]
        whole = [size for size in found if size is not None]
        return np.ones([1, *whole], dtype) if "mask" in name and len(whole) == len(sizes) else None

    def split_sample(
        self, sample: torch.Tensor, conditions: dict[str, npt.NDArray[Any]]
    ) -> tuple[npt.NDArray[Any], dict[str, npt.NDArray[Any]]]:
        """Return the sample as an array; channels that the network does not predict become a condition."""
        signature = self._bundle.signature
        x = as_array(signature.sample, sample)
        if EXTRA_CHANNELS in signature.conditions:  # pipelines put them behind the channels of the image
            image = signature.channels(self._bundle.sample_shape)
            x, extra = np.split(x, [image], axis=signature.channel_axis)
            conditions = {**conditions, EXTRA_CHANNELS: extra}
        shape = self._inputs[signature.sample][1]
        pairs = list(zip(x.shape, shape, strict=False))[1:]
        if x.ndim == len(shape) and any(isinstance(size, int) and size != own for own, size in pairs):
            raise InputError(
                f"the pipeline's sample has the shape {list(x.shape)}, and the bundle was compiled for {[*shape]}",
                where=f"input {signature.sample}",
                hint="call the pipeline with the height, width and frames that the bundle was compiled for, or compile "
                "it for these: --size",
            )
        return x, conditions


def flattened(arguments: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield the values of nested arguments: (name of the graph's input, name for a message, value)."""
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            for key, part in value.items():
                if name == _ADDED:
                    yield from flattened({key: part})
                elif part is not None:
                    yield f"{name}.{key}", f"{name}[{key!r}]", part
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}_{i}", f"{name}[{i}]", part) for i, part in enumerate(value) if part is not None)
        elif value is not None:
            yield name, name, value


def _all_ones(value: Any) -> bool:
    """Return whether a value is a mask `[B, tokens]` that keeps every token."""
    return isinstance(value, torch.Tensor) and value.ndim == 2 and bool((value == 1).all())


def _tensors(value: Any) -> list[torch.Tensor]:
    parts = value if isinstance(value, (list, tuple)) else [value]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _arrays(value: Any) -> Any:
    """Return a value with arrays in place of its tensors."""
    if isinstance(value, (list, tuple)):
        return [_arrays(part) for part in value]
    return as_array("a constant", value) if isinstance(value, torch.Tensor) else value


def as_array(name: str, tensor: Any) -> npt.NDArray[Any]:
    """Return a tensor's memory as a numpy array; halves are widened, which is exact. Raises InputError for others."""
    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name!r} is {type(tensor).__name__}, not a tensor", where=f"input {name}")
    if tensor.device.type != "cpu":
        raise InputError(f"{name!r} lies on {tensor.device}", where=f"input {name}", hint=_CPU)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name!r} requires a gradient, and a bundle has none",
            where=f"input {name}",
            hint="call in torch.no_grad()",
        )
    array: npt.NDArray[Any] = (tensor.float() if tensor.dtype in HALF_TYPES else tensor).detach().numpy()
    return array
