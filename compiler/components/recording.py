"""What a pipeline of diffusers gives to its networks, seen by running the pipeline itself.

Every pipeline has its own way from a prompt to the inputs of its networks: which layer of a text encoder it reads, how
it joins several encoders, what it adds for the size of the image, how it scales latents. None of that is repeated here:
the pipeline runs, and its networks are watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
import torch

Array = npt.NDArray[Any]


@dataclass
class Watched:
    """The tensors that networks were called with, by slot; each call has its arguments by name."""

    calls: dict[str, list[dict[str, Array]]] = field(default_factory=dict)

    def add(self, slot: str, arguments: Mapping[str, Any]) -> None:
        """Add a call, with the arguments inside of mappings beside the others. What is no tensor is left out."""
        inner = {n: v for value in arguments.values() if isinstance(value, Mapping) for n, v in value.items()}
        arguments = {**arguments, **inner}
        tensors = {n: v.detach().cpu().numpy().copy() for n, v in arguments.items() if isinstance(v, torch.Tensor)}
        self.calls.setdefault(slot, []).append(tensors)


@contextmanager
def watching(pipe: Any, encoders: Sequence[str]) -> Iterator[Watched]:
    """Record the calls of these networks, and those of `vae.decode`, as long as the context lasts."""
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
