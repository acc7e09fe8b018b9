"""Networks of every registered class, made small, with random weights: what the tests of the rows compile.

`tools/models_page.py` writes docs/models.md from the same ones. A layer that diffusers initializes with zeros, so that
training begins at the identity, gets random numbers: zeros would hide what stands in front of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TinyModel:
    """A class with a configuration; `asked` are sizes of conditions that a caller has, by name.

    `flow` says that its schedule is flow matching. `prepare` changes the module after it is built.
    """

    cls: str
    config: Mapping[str, Any]
    asked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    flow: bool = False
    prepare: Callable[[Any], None] | None = None
    size: tuple[int, ...] | None = None

    def build(self) -> torch.nn.Module:
        """Return the module, seeded."""
        import diffusers
        import torch

        torch.manual_seed(0)
        model: torch.nn.Module = getattr(diffusers, self.cls)(**self.config).eval()
        if self.prepare is not None:
            self.prepare(model)
        with torch.no_grad():
            for parameter in model.parameters():
                if not bool(parameter.isfinite().all()) or not bool(parameter.any()):
                    parameter.normal_(std=0.1)
        return model

    def conditions(self, rows: int) -> dict[str, np.ndarray[Any, Any]]:
        """Return seeded rows for every condition of the module: normal numbers, labels 0 and 1, masks of ones."""
        from mezzotint.compiler.frontend.network_inputs import network_inputs

        rng = np.random.default_rng(7)
        module = self.build()
        config: Any = module.config
        known = network_inputs(self.cls, config, self.size, self.asked, "tiny", module)
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        for name, value in known.conditions.items():
            dtype = value.value(name).dtype
            kind = np.dtype(np.float32) if dtype is None else dtype.numpy()
            shape = (rows, *value.sizes)
            if value.classes is not None:
                arrays[name] = rng.integers(0, value.classes, shape)
            else:
                arrays[name] = (rng.standard_normal(shape) if value.kind == "number" else np.ones(shape)).astype(kind)
        if known.kept is None and known.predicted < known.channels:
            extra = (rows, *known.shape_with(known.channels - known.predicted))
            arrays["extra_channels"] = rng.standard_normal(extra).astype(np.float32)
        return arrays
