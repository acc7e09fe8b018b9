"""What a lowering cannot express: tables that only other lowerings have, and weights without a grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mezzotint.runtime.targets import ONNXRUNTIME, Target

from ..core.program import Lowering, Plan
from ..errors import RecipeError

MOST_GAIN = 30.2
"""dB. channel_scales makes no step smaller than a 32nd of the tensor's, so a larger least gain is never reached."""


def check_passes(lowering: Lowering, options: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise RecipeError for passes, by name with their options, whose tables the lowering does not have."""
    timed = [name for name in ("step_scales", "fold_time") if name in options]
    check_tables(
        lowering,
        scales="step_scales" in timed,
        biases="fold_time" in timed,
        channels="channel_scales" in options and options["channel_scales"].get("gain", 0.0) <= MOST_GAIN,
        zero_points=options.get("step_scales", {}).get("zero_point") == "table",
        where=where,
    )


def lowering_for(target: Target, lowering: Lowering, before: Mapping[str, Mapping[str, Any]], where: str) -> Lowering:
    """Return the lowering that a target gets of a recipe's. Raise RecipeError for a recipe that has none for it.

    `before` are the passes in front of insert_qdq, by name with their options. onnxruntime takes every lowering but
    `constant`, all other targets take only that one, and a recipe without tables (`qdq`) has it too.
    """
    if target == ONNXRUNTIME:
        if lowering == "constant":
            raise RecipeError(
                "the lowering `constant` leaves the outputs of convolutions in float, and onnxruntime's CPU provider "
                "would run these in float",
                where=where,
            )
        return lowering
    if lowering == "integer":
        raise RecipeError(
            f"the lowering `integer` writes operations of onnxruntime, which {target} does not have", where=where
        )
    check_passes("constant", before, where)
    return "constant"


def check_widths(plan: Plan, where: str) -> None:
    """Raise RecipeError for a weight of 1 bit without levels: its uniform grid has the point 0 alone."""
    for site, quantizer in plan.quantizers.items():
        if quantizer.uniform and quantizer.format.bits < 2:
            raise RecipeError(
                f"the weight {site.value!r} has 1 bit, and no levels",
                where=where,
                hint="put choose_levels behind choose_scales, or choose more bits: --set choose_scales.weight_bits=2",
            )


def check_tables(
    lowering: Lowering, *, scales: bool, biases: bool, channels: bool, zero_points: bool, where: str
) -> None:
    """Raise RecipeError for tables over the timestep, of scales, biases or zero points, and for scales by channel."""
    if lowering == "qdq" and (scales or biases):
        raise RecipeError(
            f"{'biases' if biases else 'scales'} that depend on the timestep need the integer or the constant lowering",
            where=where,
            hint="set insert_qdq.lowering to integer, or leave out fold_time and step_scales",
        )
    if lowering != "integer" and channels:
        raise RecipeError(
            f"scales for each channel of an activation need the integer lowering; {lowering} has none",
            where=where,
            hint="leave out channel_scales, as the recipe w8a8-constant does",
        )
    if lowering == "constant" and zero_points:
        raise RecipeError(
            "zero points that depend on the timestep need the integer lowering: constant has constant ones",
            where=where,
            hint="give all rows one zero point: --set step_scales.zero_point=constant",
        )
