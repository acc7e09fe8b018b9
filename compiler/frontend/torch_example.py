"""Example inputs for the export of a diffusers model, and the dimensions that stay open."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from mezzotint.runtime.streams import FIXED

from .architectures.registry import architecture_row
from .architectures.row import (
    PROMPT,
    Architecture,
    ConditionSizes,
    Input,
    NetworkCall,
    NetworkInputs,
    Path,
    SampleSize,
    TokenRows,
)
from .network_inputs import network_inputs


class PositionalModel(torch.nn.Module):
    """A diffusers model with positional inputs, which torch.export needs, cut to the first `channels` of its output.

    `paths` say where the call has an input that is not an argument of its own name, `fixed` are other arguments, and
    `call` calls the model with them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        names: tuple[str, ...],
        channels: int | None,
        paths: Mapping[str, Path] | None = None,
        fixed: Mapping[str, Any] | None = None,
        call: NetworkCall | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.channels = channels
        self.paths = dict(paths or {})
        self.fixed = dict(fixed or {})
        self.call = call or _answer

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        arguments = {**self.fixed, **self._of_prompt(tensors)}
        for name, tensor in zip(self.names, tensors, strict=True):
            _put(arguments, self.paths.get(name) or (name,), tensor)
        output: torch.Tensor = self.call(self.model, arguments)
        return output if self.channels is None else output[:, : self.channels]

    def _of_prompt(self, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        """Return the arguments that have a row for each token of the prompt."""
        rows = {name: value for name, value in self.fixed.items() if isinstance(value, TokenRows)}
        return {name: value.of(tensors[self.names.index(PROMPT)].shape[1]) for name, value in rows.items()}


def _answer(model: Any, arguments: dict[str, Any]) -> Any:
    return model(**arguments, return_dict=False)[0]


def _put(arguments: dict[str, Any], path: Path, tensor: torch.Tensor) -> None:
    """Put a tensor into nested mappings and lists; those of a list come in their order."""
    holder: Any = arguments
    for key, following in pairwise(path):
        empty: Any = [] if isinstance(following, int) else {}
        holder = holder.setdefault(key, empty)
    if isinstance(holder, list):
        holder.append(tensor)
    else:
        holder[path[-1]] = tensor


@dataclass(frozen=True)
class Example:
    """Inputs by name, the sample and the timestep first, what is known of them, and the row of the class."""

    tensors: dict[str, torch.Tensor]
    known: NetworkInputs
    row: Architecture = field(repr=False)

    @property
    def sample(self) -> str:
        """Return the name of the sample."""
        return self.known.sample

    @property
    def timestep(self) -> str:
        """Return the name of the timestep."""
        return self.known.timestep

    def denoiser(self, model: torch.nn.Module, call: NetworkCall | None = None) -> PositionalModel:
        """Return the model, to be called with these inputs by position; `call` other than the row's."""
        paths = {name: value.path for name, value in self.known.conditions.items() if value.path}
        fixed = self.fixed_arguments(model)
        return PositionalModel(model, tuple(self.tensors), self.known.kept, paths, fixed, call or self.row.call)

    def fixed_arguments(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the arguments of the call that the export keeps as they are."""
        constants = {} if self.row.constants is None else self.row.constants(model, self.known)
        return {**self.known.fixed, **constants}

    def traceable(self, model: torch.nn.Module) -> PositionalModel:
        """Return the same function in the form that is exported."""
        return self.denoiser(model, None if self.row.traced is None else self.row.traced(model, self.known))

    @contextmanager
    def patched(self, model: torch.nn.Module) -> Iterator[None]:
        """Change the model as its row says, as long as the context lasts."""
        with ExitStack() as stack:
            for patch in self.row.patches:
                stack.enter_context(patch(model))
            yield

    def spatial(self) -> dict[str, dict[int, int]]:
        """Return the axes that follow height and width by input, each with its multiple of them; {} if none may."""
        multiple = self.known.multiple
        if multiple is None:
            return {}
        factors = {self.sample: multiple} | {
            name: multiple // value.shrunk for name, value in self.known.conditions.items() if value.shrunk is not None
        }
        return {
            name: {self.tensors[name].ndim - 2: factor, self.tensors[name].ndim - 1: factor}
            for name, factor in factors.items()
        }


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
    model: torch.nn.Module,
    size: SampleSize | None,
    timestep: torch.dtype,
    sizes: ConditionSizes | None = None,
    where: str = "the model",
) -> Example:
    """Return seeded inputs of two samples, the timestep of that type; `sizes` are known ones of the conditions.

    Raises ModelError for untested configurations.
    """
    config: Any = model.config
    name = type(model).__name__
    known = network_inputs(name, config, size, sizes or {}, where, model)
    generator = torch.Generator().manual_seed(FIXED)
    tensors = {
        known.sample: torch.randn(2, *known.shape, generator=generator),
        known.timestep: torch.tensor([7, 7], dtype=timestep),
    }
    tensors |= {name: _tensor(value, generator) for name, value in known.conditions.items()}
    return Example(tensors, known, architecture_row(name, where))


def _tensor(value: Input, generator: torch.Generator) -> torch.Tensor:
    """Return two rows of an input: normal numbers, classes 0 and 1, a mask whose second row hides a token."""
    if value.classes is not None:
        return torch.tensor([0, 1 % value.classes])
    if value.kind == "number":
        return torch.randn(2, *value.sizes, generator=generator)
    types = {"flag": torch.bool, "soft_mask": torch.float32}
    mask = torch.ones(2, *value.sizes, dtype=types.get(value.kind, torch.int64))
    mask[1, ..., value.hidden] = 0
    return mask
