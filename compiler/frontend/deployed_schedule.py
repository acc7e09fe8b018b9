"""What the pipeline of a model passes to its scheduler: the shift of its sequence's length, and sigmas.

A class with a row of the registry says it there. Of an ONNX file without a configuration, the length of packed tokens
`[B, N, C]` is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.sampling.flow_sigmas import BY_LENGTH, EVEN_SIGMAS, IMAGE_TOKENS, SHIFT_BY, is_dynamic
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import CHANNELS_FIRST, Signature

from .architectures.registry import ROWS
from .architectures.row import Architecture, NetworkInputs
from .network_inputs import network_inputs


def needs_length(schedule: Schedule) -> bool:
    """Return whether the deployed size moves the schedule's sigmas."""
    return schedule.flow and is_dynamic(schedule.reader)


def with_sigmas(schedule: Schedule, config: Mapping[str, Any] | None) -> Schedule:
    """Return the schedule with the sigmas that the pipeline of this class passes."""
    row = _row(config)
    if not schedule.flow or row is None or row.sigmas == "own":
        return schedule
    own = row.sigmas == "even, but own with use_flow_sigmas" and bool(schedule.config.get("use_flow_sigmas"))
    return schedule.with_keys({EVEN_SIGMAS: True}) if not own else schedule


def with_length(schedule: Schedule, config: Mapping[str, Any] | None, known: NetworkInputs | int | None) -> Schedule:
    """Return the schedule with the number of image tokens, as the pipeline of this class counts them.

    `known` are the network's inputs at the deployed size, or the tokens themselves; None changes nothing.
    """
    row = _row(config)
    counts = None if row is None else row.tokens
    if known is None or (not isinstance(known, int) and counts is None):
        return schedule
    tokens = known if isinstance(known, int) else counts(known) if counts is not None else 0
    return schedule.with_keys({IMAGE_TOKENS: tokens, SHIFT_BY: BY_LENGTH if row is None else row.shift_by})


def inputs_of_graph(
    signature: Signature, shape: tuple[int, ...], config: Mapping[str, Any] | None, where: str
) -> NetworkInputs | int | None:
    """Return what `with_length` needs to know of an ONNX file, None where nothing says it."""
    if len(shape) == 2 and signature.channel_axis != CHANNELS_FIRST:
        return shape[0]
    row = _row(config)
    if config is None or row is None:
        return None
    sides = signature.sides(shape)
    return replace(network_inputs(row.name, config, sides, {}, where), shape=shape)


def _row(config: Mapping[str, Any] | None) -> Architecture | None:
    return ROWS.get(str((config or {}).get(CLASS)))
