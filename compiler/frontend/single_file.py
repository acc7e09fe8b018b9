"""Checkpoints of one file, in the layout of a model's first publication, read by diffusers' `from_single_file`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..errors import ModelError


def load_single_file(kind: Any, file: Path, folder: Path) -> tuple[torch.nn.Module, dict[str, list[str]]]:
    """Return a network of a class of diffusers, and the names that its state or the file lack.

    `folder` has the config.json. Raises ModelError for a class that diffusers has no layouts of.
    """
    if not hasattr(kind, "from_single_file"):
        raise ModelError(
            f"diffusers reads no single file of a {kind.__name__}",
            where=str(file),
            hint="load it by your own code, and compile the module from memory",
        )
    options: dict[str, Any] = {"config": str(folder), "torch_dtype": torch.float32, "local_files_only": True}
    with _recorded(kind) as info:
        model = kind.from_single_file(load_file(file), low_cpu_mem_usage=False, **options)
    return model, info


@contextmanager
def _recorded(kind: Any) -> Iterator[dict[str, list[str]]]:
    """Record which keys a state lacks: diffusers leaves random numbers in their places, and says nothing."""
    load = kind.load_state_dict
    info: dict[str, list[str]] = {}

    def recorded(model: Any, state: Any, **options: Any) -> Any:
        answer = load(model, state, **options)
        info["missing_keys"], info["unexpected_keys"] = list(answer.missing_keys), list(answer.unexpected_keys)
        return answer

    kind.load_state_dict = recorded
    try:
        yield info
    finally:
        del kind.load_state_dict
