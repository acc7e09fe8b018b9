"""The checks of a pass that needs torch, which is an optional dependency."""

from __future__ import annotations

from importlib.util import find_spec

from ..core.pipeline import CPU
from ..errors import RecipeError


def require_torch(step: str, does: str) -> None:
    """Raise RecipeError where torch is not installed; `does` is what the pass `step` does with it."""
    if find_spec("torch") is None:
        raise RecipeError(
            f"{step} {does} with torch, which is not installed",
            where=step,
            hint="install the extra: pip install 'mezzotint[torch]', or choose a recipe that does not need it",
        )


def device_is_there(device: str) -> bool:
    """Return True. Raise InputError for a device that torch does not have."""
    if device != CPU:
        from .torch_device import find_device

        find_device(device)
    return True
