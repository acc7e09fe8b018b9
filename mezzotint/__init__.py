"""Mezzotint: a quantizing graph compiler for diffusion models.

    from mezzotint import compile_model, open_bundle, sample

    bundle = compile_model("digits", "out/digits")
    images = sample(bundle, 16, seed=0)          # float32 [16, 1, 32, 32] in [-1, 1]

Everything here is loaded on first use: importing the package loads neither torch nor onnxruntime.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_DOORS = {
    "compile_model": ".api",
    "export_model": ".api",
    "mix_bundles": ".mix",
    "sample": ".api",
    "sample_to_folder": ".shards",
    "read_shards": ".shards",
    "open_bundle": ".runtime.bundle",
    "Bundle": ".runtime.bundle",
    "Schedule": ".runtime.schedule",
    "MezzotintError": ".runtime.errors",
    "Recipe": ".compiler.pipeline",
    "RECIPES": ".passes.recipes",
}
__all__ = [
    "RECIPES",
    "Bundle",
    "MezzotintError",
    "Recipe",
    "Schedule",
    "__version__",
    "compile_model",
    "export_model",
    "mix_bundles",
    "open_bundle",
    "read_shards",
    "sample",
    "sample_to_folder",
]

if not (Path(__file__).parent / "runtime").is_dir():  # a checkout where links cannot be made
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from .api import compile_model, export_model, sample
    from .compiler.pipeline import Recipe
    from .mix import mix_bundles
    from .passes.recipes import RECIPES
    from .runtime.bundle import Bundle, open_bundle
    from .runtime.errors import MezzotintError
    from .runtime.schedule import Schedule
    from .shards import read_shards, sample_to_folder


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_DOORS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
