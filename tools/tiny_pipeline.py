"""A pipeline of diffusers around a tiny network, without text encoders: prompts are given as embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mezzotint import Schedule
from tools.tiny_models import TINY
from tools.tiny_network import TinyModel

STEPS = 4
FLOW = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline around a network of TINY, whose configuration takes `changes`.

    `prompts` are the shapes of prompt embeddings by argument, without their batch; an array of integers is a mask.
    `options` are other arguments of the call, `settings` those of the scheduler, and `answer` holds the latents.
    `adapt` changes the arguments, for (call, deployed timesteps); `finish` gives the pipeline what it reads of parts
    that are not there.
    """

    cls: str
    network: str
    prompts: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str = FLOW
    sampler: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    answer: str = "images"
    adapt: Callable[[dict[str, Any], Any], dict[str, Any]] | None = None
    finish: Callable[[Any], None] | None = None

    @property
    def tiny(self) -> TinyModel:
        """Return the network."""
        known = TINY[self.network]
        size = known.size or ((8, 8) if "sample_size" in self.changes else None)
        return replace(known, config={**known.config, **self.changes}, size=size)

    def build(self, network: Any = None) -> Any:
        """Return the pipeline, around a new network if none is given."""
        import diffusers

        kind = getattr(diffusers, self.cls)
        parameters = inspect.signature(kind.__init__).parameters.values()
        parts = {p.name: None for p in parameters if p.default is p.empty and p.name != "self"}
        slot = "unet" if "unet" in parts else "transformer"
        scheduler = getattr(diffusers, self.scheduler)(**self.settings)
        flags = {"requires_safety_checker": False} if "requires_safety_checker" in (p.name for p in parameters) else {}
        pipe = kind(**{**parts, slot: network or self.tiny.build(), "scheduler": scheduler, **flags})
        pipe.set_progress_bar_config(disable=True)
        if self.finish is not None:
            self.finish(pipe)
        return pipe

    def schedule(self) -> Schedule:
        """Return the schedule of its scheduler."""
        import diffusers

        config = getattr(diffusers, self.scheduler)(**self.settings).config
        return Schedule.from_config({**config, "_class_name": self.scheduler})

    def call(self, calls: Any = None) -> dict[str, Any]:
        """Return the arguments of a call with seeded prompts; `calls` are the deployed timesteps."""
        import torch

        generator = torch.Generator().manual_seed(3)
        given: dict[str, Any] = {}
        for name, shape in self.prompts.items():
            if "mask" in name:
                given[name] = torch.ones(1, *shape, dtype=torch.int64)
                given[name][:, -1] = 0
            else:
                given[name] = torch.randn(1, *shape, generator=generator)
        call = {"num_inference_steps": STEPS, "output_type": "latent", **given, **self.options}
        return call if self.adapt is None else self.adapt(call, calls)

    def latents(self, pipe: Any, calls: Any = None) -> np.ndarray[Any, Any]:
        """Return what the pipeline draws with a seed, float32."""
        import torch

        found = getattr(pipe(generator=torch.Generator().manual_seed(1), **self.call(calls)), self.answer)
        tensor = found if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))
        latents: np.ndarray[Any, Any] = tensor.float().numpy()
        return latents
