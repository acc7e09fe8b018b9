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

from .classes import STATES

Array = npt.NDArray[Any]


@dataclass
class Watched:
    """The tensors that networks were called with, by slot; each call has its arguments by name.

    `states` are the indices of the hidden states that were read of a text encoder's answers, by slot.
    """

    calls: dict[str, list[dict[str, Array]]] = field(default_factory=dict)
    states: dict[str, set[int]] = field(default_factory=dict)

    def add(self, slot: str, arguments: Mapping[str, Any]) -> None:
        """Add a call, with the arguments inside of mappings beside the others. What is no tensor is left out."""
        inner = {n: v for value in arguments.values() if isinstance(value, Mapping) for n, v in value.items()}
        arguments = {**arguments, **inner}
        tensors = {n: v.detach().cpu().numpy().copy() for n, v in arguments.items() if isinstance(v, torch.Tensor)}
        self.calls.setdefault(slot, []).append(tensors)


class _ReadStates(tuple[Any, ...]):
    """Hidden states that note which of them are read."""

    seen: set[int]

    def __getitem__(self, index: Any) -> Any:
        self.seen.update([range(len(self))[index]] if isinstance(index, int) else range(len(self))[index])
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self.seen.update(range(len(self)))
        return super().__iter__()


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

        def after(_: Any, arguments: Any, answer: Any, slot: str = slot) -> None:
            if getattr(answer, STATES, None) is not None:
                watched = _ReadStates(getattr(answer, STATES))
                watched.seen = seen.states.setdefault(slot, set())
                setattr(answer, STATES, watched)

        handles.append(module.register_forward_hook(after))
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
