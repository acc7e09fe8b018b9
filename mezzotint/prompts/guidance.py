"""The scale of guidance in two halves, `u + scale (c - u)`, as each pipeline class of diffusers takes it.

Most take it as `guidance_scale`. Classes for networks with an embedded guidance have `true_cfg_scale` beside it, and
Z-Image counts from the conditional half: `c + (scale - 1) (c - u)`.
"""

from __future__ import annotations

import inspect
from typing import Any

USUAL, TRUE = "guidance_scale", "true_cfg_scale"
GUIDANCE_KEYS = (USUAL, TRUE)
_FROM_CONDITIONAL = ("ZImagePipeline",)


def guidance_arguments(kind: Any, scale: float, *, embedded: bool = False) -> dict[str, float]:
    """Return the argument of a pipeline class that guides at `scale`; 1 is without guidance.

    `embedded` says that the network takes a guidance of its own as an input, which `guidance_scale` is then.
    """
    taken = inspect.signature(kind.__call__).parameters
    if TRUE in taken:
        return {TRUE: scale}
    if embedded or USUAL not in taken:
        return {}
    return {USUAL: scale - 1.0 if kind.__name__ in _FROM_CONDITIONAL else scale}


def guidance_of_call(pipe: Any) -> float:
    """Return the scale of a pipeline's current run, 1 where the two halves are not combined."""
    if not getattr(pipe, "do_classifier_free_guidance", False):
        return 1.0
    return float(pipe.guidance_scale) + (1.0 if type(pipe).__name__ in _FROM_CONDITIONAL else 0.0)


def normalizes_guidance(kind: Any) -> bool:
    """Return whether a class rescales what guidance made, by its usual arguments, or hides its scale from outside."""
    taken = inspect.signature(kind.__call__).parameters
    return TRUE in taken or ("cfg_normalization" in taken and taken["cfg_normalization"].default is True)
