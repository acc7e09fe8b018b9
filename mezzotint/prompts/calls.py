"""The arguments by which a pipeline of diffusers is called for prompts, and its libraries without their messages."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mezzotint.compiler.frontend.architectures.row import NetworkInputs
from mezzotint.runtime.errors import InputError

_INSTALL = "install the extra: pip install 'mezzotint[pipelines]'"
_PACKED_AXES = 2  # of a grid of tokens of 2x2 latents


def library(name: str) -> Any:
    """Return diffusers, transformers or torch. Raises InputError where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"pipelines need {error.name}, which is not installed", hint=_INSTALL) from error


def prompt_arguments(kind: Any, prompts: Sequence[str], negative: str) -> dict[str, Any]:
    """Return the arguments of a pipeline class for these prompts; one that takes no negative prompt gets none."""
    takes = "negative_prompt" in inspect.signature(kind.__call__).parameters
    return {"prompt": list(prompts), **({"negative_prompt": [negative] * len(prompts)} if takes else {})}


def size_arguments(pipe: Any, known: NetworkInputs) -> dict[str, Any]:
    """Return height, width and frames of the images that have latents of the network's size."""
    sides = [side for i, side in enumerate(known.shape) if i != known.channel_axis - 1]
    if len(known.grid) == _PACKED_AXES:
        sides = [2 * side for side in known.grid]
    # PixArt's pipelines would draw a size of their own, and scale the image.
    options: dict[str, Any] = {"use_resolution_binning": False}
    scale = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    if isinstance(scale, int) and len(sides) >= len(("height", "width")):
        options |= {"height": sides[-2] * scale, "width": sides[-1] * scale}
        frames = getattr(pipe, "vae_scale_factor_temporal", None)
        if len(sides) > len(("height", "width")) and isinstance(frames, int):
            options["num_frames"] = (sides[0] - 1) * frames + 1
    taken = inspect.signature(type(pipe).__call__).parameters
    return {name: value for name, value in options.items() if name in taken}


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence what diffusers and transformers say about parts that are left out, and their bars. Raises InputError."""
    diffusers, transformers = library("diffusers"), library("transformers")
    logs = [diffusers.logging, transformers.utils.logging]
    levels = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in logs]
    for log in logs:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, (level, bars) in zip(logs, levels, strict=True):
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()
