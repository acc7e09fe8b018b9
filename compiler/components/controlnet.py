"""ControlNets as components: what their call reads, what it gives, and which configurations compile.

A graph gives the residuals at a scale of one, by the names that the U-Net's graph has for them. The scale of a call
multiplies them outside (runtime/bundle/controlnet.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.controlnet import CONTROL, SAMPLE, SHARED_ROWS, TIMESTEP

from ..errors import ModelError

ADDED = ("text_embeds", "time_ids")
"""Inputs of SDXL's ControlNets, which a call has in `added_cond_kwargs`."""
_HINT = "compile the denoiser alone: --components none"


def check_controlnet(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError, with the reason, for the configuration of a ControlNet that cannot be compiled."""
    reasons = {
        "global_pool_conditions": "its residuals are means over the image, which a U-Net's graph has no inputs for",
        "class_embed_type": "it takes class labels",
        "num_class_embeds": "it takes class labels",
        "encoder_hid_dim_type": "it projects the prompt",
    }
    for key, reason in reasons.items():
        if config.get(key):
            raise ModelError(f"the ControlNet has {key} {config[key]!r}: {reason}", where=where, hint=_HINT)
    if config.get("addition_embed_type") not in (None, "text_time"):
        kind = config["addition_embed_type"]
        raise ModelError(
            f"the ControlNet has addition_embed_type {kind!r}, which is not known", where=where, hint=_HINT
        )
    if (channels := config.get("conditioning_channels", 3)) != 3:
        raise ModelError(f"the ControlNet reads images of {channels} channels, not 3", where=where, hint=_HINT)


def called_controlnet(module: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Return the residuals of a ControlNet of diffusers, for tensors by the names of the graph's inputs."""
    added = {name: arguments.pop(name) for name in ADDED if name in arguments}
    down, middle = module(**arguments, added_cond_kwargs=added or None, return_dict=False)
    return (*down, middle)


def controlnet_rows(calls: list[dict[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs of recorded calls as rows: a number becomes a timestep for each sample, one row of a condition
    as many as there are samples."""
    found: dict[str, list[npt.NDArray[Any]]] = {}
    for call in calls:
        rows = len(call[SAMPLE])
        for name in (SAMPLE, TIMESTEP, *SHARED_ROWS, CONTROL):
            if name in call:
                array = np.atleast_1d(call[name]).astype(np.float32)
                found.setdefault(name, []).append(np.broadcast_to(array, (rows, *array.shape[1:])))
    return {name: np.concatenate(parts) for name, parts in found.items()}
