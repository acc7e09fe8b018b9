"""Checks of the numbers among a pass's options, for `__post_init__`."""

from __future__ import annotations

import numpy as np

from ..errors import RecipeError
from .pipeline import Pass


def require_positive(step: Pass, *options: str) -> None:
    """Raise RecipeError for an option of a pass that is not a positive number."""
    for option in options:
        value = getattr(step, option)
        if not 0 < value < np.inf:
            raise RecipeError(f"{step.name}.{option} is {value}", where=step.name, hint="choose a positive number")


def require_not_negative(step: Pass, *options: str) -> None:
    """Raise RecipeError for an option of a pass that is not 0 or a positive number."""
    for option in options:
        value = getattr(step, option)
        if not 0 <= value < np.inf:
            raise RecipeError(f"{step.name}.{option} is {value}", where=step.name, hint="choose 0 or a positive number")


def require_widths(step: Pass, *options: str, least: int = 2) -> None:
    """Raise RecipeError for an option of a pass that does not name different widths from `least` to 8 bits."""
    for option in options:
        widths = getattr(step, option)
        if not widths or len(set(widths)) < len(widths) or not all(least <= bits <= 8 for bits in widths):
            hint = f"choose different widths from {least} to 8"
            raise RecipeError(f"{step.name}.{option} is {widths}", where=step.name, hint=hint)
