"""The weights of a module in memory as the export reads them: in float32 and with LoRAs, in copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .lora import fused_rows
from .lora_files import LoraFile

_HALVES = (torch.float16, torch.bfloat16)  # each of their numbers is one of float32


@contextmanager
def exported_weights(model: torch.nn.Module, loras: tuple[LoraFile, ...]) -> Iterator[list[dict[str, Any]]]:
    """Give a module weights of its own while the context lasts; yield what the manifest has of each LoRA.

    The caller's parameters and buffers are never written to: where they change, copies take their places.
    """
    with _widened(model):
        kept: dict[str, torch.nn.Parameter] = {}
        try:
            yield list(fused_rows(model, loras, kept))
        finally:
            for name, parameter in kept.items():
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, parameter)


@contextmanager
def _widened(model: torch.nn.Module) -> Iterator[None]:
    """Put float32 copies into the places of parameters and buffers in half precision."""
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    copies: dict[int, torch.Tensor] = {}  # a tensor in several places stays one
    try:
        for module in model.modules():
            holders: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in holders:
                for name, tensor in list(tensors.items()):
                    if tensor is None or tensor.dtype not in _HALVES:
                        continue
                    places.append((tensors, name, tensor))
                    wide = copies.setdefault(id(tensor), tensor.detach().to(torch.float32))
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(wide, requires_grad=False) if is_parameter else wide
        yield
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor
