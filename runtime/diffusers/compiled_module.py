"""What stands for a compiled text encoder or VAE in a pipeline: float32, on the CPU, without layers of torch."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError


class CompiledModule(torch.nn.Module):
    """The base of these modules. `original` is the class that was compiled."""

    def __init__(self, original: str) -> None:
        super().__init__()
        self.original = original

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModule:
        """Raise InputError for a change of type or device by `to`, `half`, `cuda` and similar methods."""
        probe = fn(torch.empty(0))
        if probe.device.type != "cpu" or probe.dtype != torch.float32:
            raise InputError(
                f"a compiled {self.original} cannot become {probe.dtype} on {probe.device}: it is float32 on the CPU",
                hint="keep the whole pipeline on the CPU in float32",
            )
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            what = f"a compiled {self.__dict__.get('original')} has no {name!r}: its layers are compiled"
            raise AttributeError(what) from None
