"""A compiled ControlNet in a diffusers pipeline: the call and the answer of ControlNetModel."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.modeling_utils import ModelMixin

from ..bundle.controlnet import CONTROL, DOWN, MIDDLE, SHARED_ROWS, ControlNetwork
from ..errors import InputError
from .compiled_module import CompiledModule
from .network_arguments import as_array


class ControlNetStandIn(CompiledModule, ControlNetModel):  # type: ignore[misc]
    """The module that a pipeline calls instead of its ControlNet; float32, on the CPU, without parameters.

    It is a ControlNetModel, because pipelines ask for that class.
    """

    def __init__(self, file: Path, class_name: str, *, threads: int | None = None) -> None:
        ModelMixin.__init__(self)  # that of ControlNetModel would make its layers
        self.original = class_name
        self.file, self.network = file, ControlNetwork(file, threads=threads)
        values = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        self.register_to_config(**{name: value for name, value in values.items() if not name.startswith("_")})

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        controlnet_cond: torch.Tensor,
        conditioning_scale: float = 1.0,
        *,
        added_cond_kwargs: Mapping[str, torch.Tensor] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        **options: Any,
    ) -> Any:
        """Return the residuals of one call. Raises InputError for arguments that the graph cannot follow."""
        if unknown := [name for name, value in options.items() if value is not None]:
            raise InputError(f"a compiled ControlNet cannot use {unknown[0]}", where=str(self.file))
        rows = {SHARED_ROWS[0]: encoder_hidden_states, CONTROL: controlnet_cond, **(added_cond_kwargs or {})}
        arrays = {name: as_array(name, tensor).astype(np.float32, copy=False) for name, tensor in rows.items()}
        times = timestep.detach().numpy() if isinstance(timestep, torch.Tensor) else np.asarray(timestep)
        found = {
            name: torch.from_numpy(a) for name, a in self.network(as_array("sample", sample), times, arrays).items()
        }
        middle = found.pop(MIDDLE)
        down = [found[f"{DOWN}_{i}"] for i in range(len(found))]
        # The scales of ControlNetModel: without prompts the outer residuals count a tenth of the inner ones.
        steps = len(down) + 1
        scales = torch.logspace(-1, 0, steps) if guess_mode else torch.ones(steps)
        *scaled, middle = (
            part * scale for part, scale in zip((*down, middle), scales * conditioning_scale, strict=True)
        )
        if not return_dict:
            return scaled, middle
        return ControlNetOutput(down_block_res_samples=tuple(scaled), mid_block_res_sample=middle)

    def save_pretrained(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InputError("a compiled ControlNet cannot be saved as a model of diffusers", hint="copy the folder")
