"""Example inputs for the export of a diffusers model, and the dimensions that stay open."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mezzotint.runtime.streams import FIXED

from .network_inputs import ConditionSizes, network_inputs


class PositionalModel(torch.nn.Module):
    """A diffusers model with positional inputs, which torch.export needs, cut to the first `channels` of its output."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...], channels: int | None) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.channels = channels

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        named: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        added = {n: named.pop(n) for n in ("text_embeds", "time_ids") if n in named}
        if added:
            named["added_cond_kwargs"] = added
        output: torch.Tensor = self.model(**named, return_dict=False)[0]
        return output if self.channels is None else output[:, : self.channels]


@dataclass(frozen=True)
class Example:
    """Inputs by name, the sample and the timestep first, and the dimensions that stay open.

    Height and width are multiples of `multiple`, or fixed when that is None. `channels` is the number of channels that
    are kept of the output; None keeps all.
    """

    tensors: dict[str, torch.Tensor]
    multiple: int | None
    channels: int | None = None

    @property
    def sample(self) -> str:
        """Return the name of the sample."""
        return next(iter(self.tensors))

    def denoiser(self, model: torch.nn.Module) -> PositionalModel:
        """Return the model, to be called with these inputs by position."""
        return PositionalModel(model, tuple(self.tensors), self.channels)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the log lines and warnings of torch's ONNX exporter."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def example_of(
    model: torch.nn.Module, size: tuple[int, ...] | None, timestep: torch.dtype, sizes: ConditionSizes | None = None
) -> Example:
    """Return seeded inputs of two samples, the timestep of that type; `sizes` are known ones of the conditions.

    Raises ModelError for untested configurations.
    """
    config: Any = model.config
    known = network_inputs(type(model).__name__, config, size, sizes or {})
    generator = torch.Generator().manual_seed(FIXED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {known.sample: normal(2, *known.shape), "timestep": torch.tensor([7, 7], dtype=timestep)}
    for name, value in known.conditions.items():
        labels = value.classes is not None
        tensors[name] = torch.tensor([0, 1 % (value.classes or 1)]) if labels else normal(2, *value.sizes)
    return Example(tensors, known.multiple, known.kept)
