"""Parts of a weight: its output channels in some order, cut into pieces that can each have a width of its own.

A channel of a weight has a scale of its own anyway, kernels take integers of any width up to 8 bits, and the file
stores channels by what their integers need (compiler/lowering/packing.py): widths by channel cost no time, and a file
the order of its channels. Orders, ascending:

error     by the squared error that rounding to the narrowest width makes. All channels of a weight have as many
          weights, so that this is what the bits of one are worth, and those of nearly equal worth come together.
kurtosis  of the channel's weights, the mean of (w - mean)^4 over that of (w - mean)^2 squared: how far outliers stand
          out (MPQ-DM, arXiv 2412.11549), whatever the channel's size.

The error of a part is no measurement of its own: at each width it is the weight's measured error times the part's share
of the squared rounding error of all channels. That is what a layer's own output does, because all channels read the
same inputs; the network is assumed to be equally sensitive to each channel's error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import Doubles

from ..graph.nodes import numpy_of
from .units import FLOAT, BitChoice, Unit

ChannelOrder = Literal["error", "kurtosis"]
Rounded = Callable[[Unit, int], npt.NDArray[np.float32]]
JOINED_BYTES = 1000  # of nodes that join a weight, in addition to 4 for each channel; 700 to 1500 on the digits


@dataclass(frozen=True, eq=False)
class Parts:
    """The units of an integer program, in place of whole units, with a row of choices, errors and costs for each."""

    units: list[Unit]
    choices: list[Sequence[BitChoice]]
    errors: list[list[float]]
    costs: list[list[int]]

    def add(self, unit: Unit, choices: Sequence[BitChoice], errors: list[float], costs: list[int]) -> None:
        self.units.append(unit)
        self.choices.append(choices)
        self.errors.append(errors)
        self.costs.append(costs)


def cut(
    units: Sequence[Unit],
    choices: Sequence[Sequence[BitChoice]],
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    rounded: Rounded,
    *,
    parts: int,
    order: ChannelOrder,
    step: Callable[[int], None] = lambda done: None,
) -> Parts:
    """Every unit whose channels can differ, cut; `rounded` gives its weight at a width, in float.

    `step` is called with the number of units that are done.
    """
    all_parts = Parts([], [], [], [])
    for done, (unit, row, wrong, price) in enumerate(zip(units, choices, errors, costs, strict=True)):
        step(done)
        widths = sorted({choice.weight for choice in row} - {FLOAT.weight})
        if parts == 1 or not cuttable(unit) or len(widths) < 2:
            all_parts.add(unit, row, list(wrong), list(price))
            continue
        lost = {bits: channel_errors(unit, rounded(unit, bits)) for bits in widths}
        members = pieces_of(lost[widths[0]] if order == "error" else kurtosis(channels_of(unit)), parts)
        shares = {bits: shares_of(lost[bits], members) for bits in widths}
        for k, rows in enumerate(members):
            part = replace(unit, rows=rows, macs=unit.macs * len(rows) // unit.channels)
            # A cost is so much for each weight or multiplication, of which every channel has as many.
            shared = [p * len(rows) // unit.channels for p in price]
            all_parts.add(part, row, [e * float(shares[c.weight][k]) for e, c in zip(wrong, row, strict=True)], shared)
    return all_parts


def cuttable(unit: Unit) -> bool:
    """Return whether a unit has a weight whose channels are the same for all layers that read it."""
    return unit.weight is not None and len({layer.weight_axis for layer in unit.layers}) == 1


def joined_bytes(units: Sequence[Unit]) -> int:
    """Return roughly how many bytes a file grows by if the channels of all these weights differ."""
    return sum(4 * unit.channels + JOINED_BYTES for unit in units if cuttable(unit))


def pieces_of(values: Doubles, parts: int) -> list[npt.NDArray[np.int64]]:
    """The places of `values` `[n]`, least first, cut into `parts` of nearly equal size, or `n` where that is less."""
    return [np.sort(rows) for rows in np.array_split(np.argsort(values, kind="stable"), min(parts, len(values)))]


def shares_of(errors: Doubles, members: Sequence[npt.NDArray[np.int64]]) -> Doubles:
    """Return each member's share of the sum, or by their sizes if there is no error at all."""
    sums = np.array([errors[rows].sum() for rows in members])
    total = sums.sum()
    shares: Doubles = sums / total if total > 0 else np.array([len(rows) / len(errors) for rows in members])
    return shares


def channels_of(unit: Unit) -> npt.NDArray[np.float32]:
    """Return a unit's weight as `[channels, weights of one]`."""
    return _by_channel(unit, numpy_of(unit.require_weight()))


def channel_errors(unit: Unit, rounded: npt.NDArray[np.float32]) -> Doubles:
    """Return the summed squared error of each channel `[channels]`."""
    difference = _by_channel(unit, rounded) - channels_of(unit)
    errors: Doubles = np.einsum("ij,ij->i", difference, difference, dtype=np.float64)
    return errors


def kurtosis(rows: npt.NDArray[np.float32]) -> Doubles:
    """Of each row `[rows]`: 3 for a Gaussian, 0 for a row of equal values."""
    found = np.zeros(len(rows))
    for i, row in enumerate(rows):  # one at a time: in float64 a large weight would take twice its memory
        centred = np.square(row.astype(np.float64) - row.mean(dtype=np.float64))
        if (variance := centred.mean()) > 0:
            found[i] = np.square(centred).mean() / variance**2
    return found


def _by_channel(unit: Unit, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.moveaxis(array, unit.layers[0].require_weight_axis(), 0).reshape(unit.channels, -1)
