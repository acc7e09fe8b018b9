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

from ..errors import ModelError

DIT = "DiTTransformer2DModel"
SUPPORTED = ("UNet2DModel", "UNet2DConditionModel", DIT)


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


def unsupported(name: str, where: str) -> ModelError:
    """Return the error for a class that is not in SUPPORTED."""
    return ModelError(
        f"{name} cannot be exported yet; {', '.join(SUPPORTED[:-1])} and {SUPPORTED[-1]} can",
        where=where,
        hint="export it to ONNX yourself and compile the .onnx file",
    )


def example_of(model: torch.nn.Module, size: tuple[int, int] | None, timestep: torch.dtype) -> Example:
    """Return seeded inputs of two samples, the timestep of that type. Raises ModelError for untested configurations."""
    config: Any = model.config
    side = config.sample_size or 32
    height, width = size or ((side, side) if isinstance(side, int) else tuple(side))
    generator = torch.Generator().manual_seed(FIXED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    if type(model).__name__ == DIT:
        if (height, width) != (side, side):
            raise ModelError(f"the model's samples are {side}x{side}, not {height}x{width}", hint="drop --size")
        named = {
            "hidden_states": normal(2, config.in_channels, side, side),
            "timestep": torch.tensor([7, 7], dtype=timestep),
        }
        learned = config.out_channels == 2 * config.in_channels
        labels = torch.tensor([0, 1 % config.num_embeds_ada_norm])
        return Example({**named, "class_labels": labels}, None, config.in_channels if learned else None)
    tensors = {"sample": normal(2, config.in_channels, height, width), "timestep": torch.tensor([7, 7], dtype=timestep)}
    for key, known in (
        ("addition_embed_type", "text_time"),
        ("class_embed_type", None),
        ("encoder_hid_dim_type", None),
    ):
        if (value := config.get(key)) not in (None, known):
            raise ModelError(
                f"a {type(model).__name__} with {key} {value!r} cannot be exported yet",
                hint="export it to ONNX yourself and compile the .onnx file",
            )
    if type(model).__name__ == "UNet2DConditionModel":
        tensors["encoder_hidden_states"] = normal(2, 77, _first(config.cross_attention_dim))
        if config.addition_embed_type == "text_time":
            width_in = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            tensors |= {"text_embeds": normal(2, width_in), "time_ids": normal(2, 6)}
    if config.num_class_embeds is not None:
        tensors["class_labels"] = torch.tensor([0, 1 % config.num_class_embeds])
    return Example(tensors, 2 ** (len(config.block_out_channels) - 1))


def _first(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
