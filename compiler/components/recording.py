"""What a pipeline of diffusers gives to its networks, seen by running the pipeline itself.

Every pipeline has its own way from a prompt to the inputs of its networks: which layer of a text encoder it reads, how
it joins several encoders, what it adds for the size of the image, how it scales latents. None of that is repeated here:
the pipeline runs, and its networks are watched. A denoiser is not needed for that: one that answers zeros has the same
inputs at its first call.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from mezzotint.runtime.sampling.guidance import Conditions

from ..errors import ConditionError
from ..frontend.architectures.row import NetworkInputs

Array = npt.NDArray[Any]


@dataclass
class Watched:
    """The tensors that networks were called with, by slot; each call has its arguments by name."""

    calls: dict[str, list[dict[str, Array]]] = field(default_factory=dict)

    def add(self, slot: str, arguments: Mapping[str, Any]) -> None:
        """Add a call. What is no tensor is left out."""
        tensors = {n: v.detach().cpu().numpy().copy() for n, v in arguments.items() if isinstance(v, torch.Tensor)}
        self.calls.setdefault(slot, []).append(tensors)


def recording_denoiser(kind: Any, config: Mapping[str, Any], known: NetworkInputs, calls: list[dict[str, Any]]) -> Any:
    """Return a network of this class without weights, which answers zeros and adds its arguments to `calls`."""
    parameters = inspect.signature(kind.forward)

    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        given = dict(parameters.bind(self, *arguments, **named).arguments)
        given.pop("self", None)
        calls.append(given)
        sample = given[known.sample]
        shape = list(sample.shape)
        shape[known.channel_axis] = known.predicted
        answer = torch.zeros(shape)
        return Transformer2DModelOutput(sample=answer) if given.get("return_dict", True) else (answer,)

    here = property(lambda self: torch.device("cpu"))
    watched = type(kind.__name__, (kind,), {"forward": forward, "device": here})
    with torch.device("meta"):
        return watched.from_config(dict(config))  # type: ignore[attr-defined]


@contextmanager
def watching(pipe: Any, encoders: Sequence[str]) -> Iterator[Watched]:
    """Record the calls of text encoders, and those of `vae.decode`, as long as the context lasts."""
    seen = Watched()
    handles = []
    for slot in encoders:
        module = getattr(pipe, slot)
        names = list(inspect.signature(module.forward).parameters)

        def before(_: Any, arguments: Any, named: Any, slot: str = slot, names: list[str] = names) -> None:
            seen.add(slot, {**dict(zip(names, arguments, strict=False)), **named})

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    vae = pipe.vae
    decode = vae.decode

    def decoded(z: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        answer = decode(z, *arguments, **named)
        seen.add("vae", {"z": z, "decoded": answer[0]})
        return answer

    vae.decode = decoded
    try:
        yield seen
    finally:
        del vae.decode
        for handle in handles:
            handle.remove()


def conditions_of(
    calls: Sequence[Mapping[str, Any]], known: NetworkInputs, prompts: int, where: str
) -> tuple[Conditions, Conditions]:
    """Return (conditions, unconditional rows) of a pipeline's calls for so many prompts.

    Under guidance a pipeline calls the network once with both halves, the unconditional one first, or twice with one
    half each, the unconditional one second. Without guidance the second result is empty.
    """
    first = [call for call in calls if _time(call, known) == _time(calls[0], known)]
    rows = [_rows(call, known) for call in first]
    samples = len(first[0][known.sample])
    if samples == 2 * prompts:
        halves = rows[0]
        return {n: a[len(a) // 2 :] for n, a in halves.items()}, {n: a[: len(a) // 2] for n, a in halves.items()}
    if samples != prompts:
        raise ConditionError(
            f"the pipeline calls its network with {samples} samples for {prompts} prompts",
            where=where,
            hint="give --conditions FILE.npz with the conditions of this pipeline",
        )
    return rows[0], (rows[1] if len(rows) > 1 else {})


def _time(call: Mapping[str, Any], known: NetworkInputs) -> float:
    return float(torch.as_tensor(call[known.timestep]).flatten()[0])


def _rows(call: Mapping[str, Any], known: NetworkInputs) -> dict[str, Array]:
    """Return the conditions in the arguments of one call, each at its path."""
    samples = len(call[known.sample])
    found: dict[str, Array] = {}
    for name, value in known.conditions.items():
        holder: Any = call
        for key in value.path or (name,):
            holder = holder[key]
        array = torch.as_tensor(holder).detach().cpu().numpy()
        dtype = value.value(name).dtype
        array = array.astype(np.float32 if dtype is None else dtype.numpy())
        found[name] = np.broadcast_to(array, (samples, *array.shape[1:])).copy() if array.ndim else array
    return found
