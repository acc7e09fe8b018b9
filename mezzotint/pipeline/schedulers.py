"""The sampler of a pipeline's scheduler, and the scheduler of a sampler: the two must call the same timesteps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.card_code import SCHEDULERS
from mezzotint.compiler.errors import ModelError
from mezzotint.runtime.json_text import read_json

from ..prompts.calls import library

FILE = "scheduler_config.json"
_MULTISTEP = "DPMSolverMultistepScheduler"
_ALGORITHMS = {"dpmpp-2m": "dpmsolver++", "dpmpp-2m-sde": "sde-dpmsolver++"}


def sampler_for(config: Mapping[str, Any]) -> str | None:
    """Return the sampler that does what a scheduler of diffusers does, None where there is none."""
    name = config.get("_class_name")
    for sampler, (class_name, _) in SCHEDULERS.items():
        algorithm = _ALGORITHMS.get(sampler)
        if class_name == name and algorithm in (None, config.get("algorithm_type", "dpmsolver++")):
            return sampler
    return None


def scheduler_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a pipeline's scheduler. Raises ModelError."""
    file = folder / "scheduler" / FILE
    hint = "download the pipeline again"
    data = read_json(file, "the configuration of the scheduler", ModelError, hint=hint, infinite=True)
    if not isinstance(data, dict):
        raise ModelError("the configuration of the scheduler is no JSON object", where=str(file))
    return data


def write_scheduler(config: Mapping[str, Any], sampler: str, folder: Path) -> str:
    """Write the scheduler of a sampler into a folder, made from a configuration; return the name of its class."""
    name = SCHEDULERS[sampler][0]
    kind = getattr(library("diffusers"), name)
    more = {"algorithm_type": _ALGORITHMS[sampler]} if sampler in _ALGORITHMS else {}
    kind.from_config(dict(config), **more).save_pretrained(folder)
    return name
