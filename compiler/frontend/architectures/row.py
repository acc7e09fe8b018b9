"""The data of a row: a class of diffusers, its inputs by configuration, its conventions, its patches.

A new architecture is one `Architecture` in a file of this room, a line in registry.py, and a tiny configuration in
tools/tiny_models.py, which the tests of all rows compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import onnx_ir as ir

from mezzotint.runtime.sampling.flow_sigmas import BY_LENGTH
from mezzotint.runtime.signature import CHANNELS_FIRST, ClassLabels, TimestepUnit

from ...errors import ModelError

ConditionSizes = Mapping[str, tuple[int, ...]]
"""Sizes of conditions behind their rows, by name."""
SampleSize = tuple[int, ...]
PROMPT, MASK = "encoder_hidden_states", "encoder_attention_mask"
"""Names of the arguments that most networks have for a prompt and for the mask of its tokens."""
PROMPT_LENGTH = "tokens"
"""The name of the open length of a prompt."""
Path = tuple[str | int, ...]
"""Where the keyword arguments of a call hold a tensor: ("added_cond_kwargs", "image_embeds", 0)."""
Kind = Literal["number", "label", "mask", "flag", "soft_mask"]
"""float32; int64 class labels; int64 and boolean masks, whose ones keep a token; float32 masks that attention adds."""
_TYPES = {
    "number": ir.DataType.FLOAT,
    "label": ir.DataType.INT64,
    "mask": ir.DataType.INT64,
    "flag": ir.DataType.BOOL,
    "soft_mask": ir.DataType.FLOAT,
}


@dataclass(frozen=True)
class Input:
    """One input: its sizes behind the batch, and the number of classes of an input of labels. `null` is the label of
    no class, where it has one.

    `path` is where the call has it, () for an argument of its own name. The last two axes of an input with `shrunk`
    follow height and width of the sample, which are so many times larger. `hidden` is the token that the mask of an
    example hides. The first of the sizes stays open in the export if `length` names it: inputs of one name have one
    length, or differ by a fixed number.
    """

    sizes: tuple[int, ...]
    classes: int | None = None
    null: int | None = None
    kind: Kind = "number"
    path: Path = ()
    shrunk: int | None = None
    hidden: int = -1
    length: str | None = None

    def value(self, name: str) -> ir.Value:
        """Return it as a graph input with an open batch."""
        dtype = ir.DataType.INT64 if self.classes is not None else _TYPES[self.kind]
        return ir.Value(name=name, shape=ir.Shape(["batch", *self.sizes]), type=ir.TensorType(dtype))


@dataclass(frozen=True)
class TokenRows:
    """An argument with a row for each token of the prompt, `[tokens, numbers]`: row i is `first + i * step`."""

    first: tuple[float, ...]
    step: tuple[float, ...]

    def of(self, tokens: Any) -> Any:
        """Return the tensor for so many tokens, which may be a symbol of torch's exporter."""
        import torch

        return torch.tensor(self.first) + torch.arange(tokens)[:, None] * torch.tensor(self.step)


@dataclass(frozen=True)
class NetworkInputs:
    """The sample and the conditions by name, the names of sample and output channels, and what stays open.

    `shape` is that of a sample behind its batch. Height and width, the last two axes, are multiples of `multiple`, or
    fixed when that is None. `predicted` are the output's channels, and `kept` those that the export keeps. `fixed` are
    arguments of the call that the export keeps as they are: None, numbers, lists of them. `grid` says what a sample of
    packed tokens stands for: their rows and columns, behind the frames of a video.
    """

    sample: str
    shape: tuple[int, ...]
    conditions: Mapping[str, Input]
    multiple: int | None
    predicted: int
    kept: int | None = None
    timestep: str = "timestep"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    channel_axis: int = CHANNELS_FIRST

    @property
    def labels(self) -> tuple[ClassLabels, ...]:
        """Return the conditions that are class labels with a label of no class."""
        found = ((name, value.classes, value.null) for name, value in self.conditions.items())
        return tuple(ClassLabels(name, classes, null) for name, classes, null in found if classes and null is not None)

    @property
    def lengths(self) -> dict[str, int]:
        """Return the known sizes of the open lengths, by their names."""
        return {
            length: self.conditions[name].sizes[0] for name, (length, more) in self.open_lengths.items() if not more
        }

    @property
    def open_lengths(self) -> dict[str, tuple[str, int]]:
        """Return the name of each condition's open length, and how much more than the length of that name it is."""
        base: dict[str, int] = {}
        found = {}
        for name, value in self.conditions.items():
            if value.length is not None:
                size = value.sizes[0]
                found[name] = (value.length, size - base.setdefault(value.length, size))
        return found

    @property
    def channels(self) -> int:
        """Return how many channels the network takes."""
        return self.shape[self.channel_axis - 1]

    def shape_with(self, channels: int) -> tuple[int, ...]:
        """Return the shape of a sample with so many channels."""
        axis = self.channel_axis - 1
        return (*self.shape[:axis], channels, *self.shape[axis + 1 :])


@dataclass(frozen=True)
class Asked:
    """A network of which the inputs are asked: its configuration with the row's defaults, and what a caller knows.

    `size` is that of the sample behind its channels, `sizes` those that conditions are known to have. `module` is the
    network in memory, None for a folder.
    """

    name: str
    config: Mapping[str, Any]
    size: SampleSize | None
    sizes: ConditionSizes
    where: str
    module: Any = None

    def number(self, key: str) -> int:
        """Return a positive integer of the configuration. Raises ModelError for anything else."""
        value = self.config.get(key)
        if not _is_size(value):
            raise self.error(f"the configuration's {key!r} is {value!r}, not a positive integer")
        return int(value)  # type: ignore[arg-type]

    def side(self, usual: int = 32, key: str = "sample_size") -> tuple[int, int]:
        """Return height and width: those asked for, else those of the configuration, else `usual` for both."""
        if self.size is not None:
            return int(self.size[-2:][0]), int(self.size[-1])  # one number is a square
        value = self.config.get(key) or usual
        sides = [value, value] if isinstance(value, int) else value
        if not isinstance(sides, (list, tuple)) or len(sides) != 2 or not all(_is_size(side) for side in sides):
            raise self.error(f"the configuration's {key!r} is {value!r}, not a positive integer or two")
        return int(sides[0]), int(sides[1])

    @property
    def predicted(self) -> int:
        """Return the channels of the output, by default those that the network takes."""
        return self.number("out_channels") if self.config.get("out_channels") else self.number("in_channels")

    def tokens(self, name: str, usual: int) -> int:
        """Return the known number of tokens of a condition."""
        return (self.sizes.get(name) or (usual,))[0]

    def error(self, what: str, hint: str = "check that its configuration belongs to it") -> ModelError:
        """Return an error about this network."""
        return ModelError(what, where=self.where, hint=hint)


Patch = Callable[[Any], AbstractContextManager[None]]
"""A change of a module, or of a library, while the module is exported; it is undone when the context is left."""
PassedSigmas = Literal["own", "even", "even, but own with use_flow_sigmas"]
NetworkCall = Callable[[Any, dict[str, Any]], Any]


@dataclass(frozen=True)
class Architecture:
    """A class of diffusers.

    inputs    returns the inputs of a configuration; raises ModelError for one that cannot be exported
    defaults  of diffusers, for keys that a config.json leaves out
    unit      what the timestep counts under a flow-matching schedule
    reversed_velocity  whether the prediction is image - noise there
    sigmas    what its pipeline passes to a flow-matching scheduler: its own, or even ones from 1 to 1 / steps
    tokens    `(inputs) -> number` of image tokens by which its pipeline shifts the sigmas; None for one that does not
    shift_by  how, see runtime/sampling/flow_sigmas.py
    float_time  whether the timestep is a floating number under every schedule
    patches   what the exporter needs
    constants `(module, inputs) -> arguments`: tensors that depend on the size alone, which the export keeps, and
              TokenRows
    call      `(module, arguments) -> tensor`, for a network that is not called with keywords and answers a tuple
    traced    `(module, inputs) -> call`: the call that is exported where the exporter cannot trace `call`. Its
              outputs are compared with those of `call` like every other export
    """

    name: str
    inputs: Callable[[Asked], NetworkInputs]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    unit: TimestepUnit = "steps"
    reversed_velocity: bool = False
    sigmas: PassedSigmas = "own"
    tokens: Callable[[NetworkInputs], int] | None = None
    shift_by: str = BY_LENGTH
    patches: tuple[Patch, ...] = ()
    float_time: bool = False
    constants: Callable[[Any, NetworkInputs], dict[str, Any]] | None = None
    call: NetworkCall | None = None
    traced: Callable[[Any, NetworkInputs], NetworkCall] | None = None


def tokens_of_grid(known: NetworkInputs) -> int:
    """Return the number of packed tokens."""
    return math.prod(known.grid)


def masked_prompt(asked: Asked, usual: int, width: int) -> dict[str, Input]:
    """Return a prompt of an open length with the mask of its tokens; so many tokens if the caller knows no number."""
    tokens = asked.tokens(PROMPT, usual)
    return {
        PROMPT: Input((tokens, width), length=PROMPT_LENGTH),
        MASK: Input((tokens,), kind="mask", length=PROMPT_LENGTH),
    }


def kept_of_doubled(channels: int, predicted: int) -> int | None:
    """Return the channels that are kept of a prediction with learned variances behind it, None for one without."""
    return channels if predicted == 2 * channels else None


def first(value: Any) -> int:
    """Return a number of the configuration, or the first of several."""
    return int(value if isinstance(value, int) else value[0])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
