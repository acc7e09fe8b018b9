"""How much of the finished file is run, from a budget in seconds.

The time is estimated from the multiplications of the float graph and not from a clock: the same compilation measures
the same calls on every machine, and its bundle has the same bytes. A call of the integer file counts as half of one of
the float model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from ..core.program import Program
from ..graph.constant_folding import infer_shapes
from ..graph.ops import Layer, layers

FLOAT_RATE = 15e9  # multiplications of the float model in a second, on two cores
MOST_IMAGES = 4
SAMPLES_FOR_AN_IMAGE = 16  # calibration samples: so acceptance takes a small part of a compilation of any size
MOST_GROUPS = 10
QUANTIZED = 0.5  # the time of an integer call over that of a float call


@dataclass(frozen=True)
class Effort:
    """The images of the one batch, the calls that are compared, and whether the finished file draws images too.

    The compared calls are the ends and the middle of each group, or the middle alone.
    """

    images: int
    groups: tuple[tuple[int, int], ...]
    compared: frozenset[int]
    draws: bool
    note: str = ""


def choose_effort(program: Program, samples: int, budget: float) -> Effort:
    """Return what fits into `budget` seconds. The float trajectory of one image is never left out.

    `samples` is the number of calibration samples; a program without quantizers gets one image.
    """
    calls = len(program.deployment.calls)
    groups = call_groups(program)
    call = float_call_seconds(program)
    wanted = max(1, min(MOST_IMAGES, samples // SAMPLES_FOR_AN_IMAGE)) if program.float_model is not None else 1
    whole = call * calls * (1 + 2 * QUANTIZED)
    some = frozenset((first + last) // 2 for first, last in groups)
    every = some | frozenset(end for group in groups for end in group)
    if whole <= budget:
        images = min(wanted, int(budget / whole)) if whole else wanted
        less = f"{images} of {wanted} images" if images < wanted else ""
        return Effort(images, groups, every, True, _note(less, budget))
    if call * (calls * (1 + QUANTIZED) + len(some) * QUANTIZED) <= budget:
        return Effort(1, groups, some, True, _note("one image, one call of each group compared", budget))
    less = "one call of each group compared, and no image drawn by the compiled file"
    return Effort(1, groups, some, False, _note(less, budget))


def _note(less: str, budget: float) -> str:
    return f"{less}, for a budget of {budget:g} s (estimated from the size of the model)" if less else ""


def call_groups(program: Program) -> tuple[tuple[int, int], ...]:
    """Return (first, last) of groups of calls: those of one row of the tables, or ten even ones without tables."""
    calls = program.deployment.calls
    row_of = program.row_of
    if row_of and len(set(row_of.values())) <= MOST_GROUPS:
        starts = [i for i, t in enumerate(calls) if i == 0 or row_of[t] != row_of[calls[i - 1]]]
    else:
        count = min(MOST_GROUPS, len(calls))
        starts = [i * len(calls) // count for i in range(count)]
    return tuple((first, last - 1) for first, last in zip(starts, [*starts[1:], len(calls)], strict=True))


def float_call_seconds(program: Program) -> float:
    """Return an estimate for one call of the float model with one image, both halves of it under guidance."""
    model = (program.float_model or program.model).clone()
    for value in model.graph.inputs:
        if value.name == program.signature.sample:
            value.shape = ir.Shape([1, *program.shape])
    infer_shapes(model)
    halves = 2 if program.deployment.guided else 1
    return halves * sum(_multiplications(layer) for layer in layers(model.graph)) / FLOAT_RATE


def _multiplications(layer: Layer) -> int:
    """Return the multiplications of a layer, 0 where its sizes are not known."""
    out, given = _sizes(layer.node.outputs[0]), _sizes(layer.node.inputs[0])
    if layer.kind == "conv":
        kernel = _sizes(layer.weight)
        return prod(out) * prod(kernel[1:]) if out and kernel else 0
    return prod(out) * given[-1] if out and given else 0


def _sizes(value: ir.Value | None) -> Sequence[int]:
    """Return the sizes of a value, with 1 for each that is open; nothing for an unknown rank."""
    if value is None or value.shape is None:
        return ()
    return [size if isinstance(size, int) else 1 for size in value.shape]
