"""Mezzotint: a quantizing graph compiler for diffusion models.

    from mezzotint import compile_model, open_bundle, sample

    bundle = compile_model("digits", "out/digits")
    images = sample(bundle, 16, seed=0)          # float32 [16, 1, 32, 32] in [-1, 1]

Every name is loaded on first use: importing the package loads neither torch nor onnxruntime. Functions that take long
accept a function `progress`, see mezzotint/progress.py; log messages go to the logger "mezzotint".
"""

# ruff: noqa: E402 (the path is put right before anything else is imported)
import sys  # before all others, `__future__` too: they might be files of the current folder


def _run_by_name() -> str:
    """Return the top package of the module that `python -m` runs, "" for any other start."""
    words = [*sys.orig_argv, ""]
    for i, word in enumerate(words[1:], start=1):
        if word[:1] == "-" and word[1:2] not in "-WX" and "m" in word:
            return (word.partition("m")[2] or words[i + 1]).partition(".")[0]
    return ""


_guarded = sys.flags.isolated or getattr(sys.flags, "safe_path", False)
if getattr(sys, "argv", [""])[0] == "-m" and _run_by_name() == "mezzotint" and not _guarded:
    # `python -m mezzotint` puts the current folder first on the path. That is needed to find this package only: a
    # numpy.py or json.py there does not belong to this program. Another program, `python -m own.program`, that imports
    # this package keeps its path.
    del sys.path[0]

import importlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HOMES = {
    "compile_model": "mezzotint.api",
    "compile_pipeline": "mezzotint.whole",
    "export_model": "mezzotint.api",
    "mix_bundles": "mezzotint.mix.mix",
    "sample": "mezzotint.api",
    "sample_to_folder": "mezzotint.shards.shards",
    "read_shards": "mezzotint.shards.shards",
    "find_engine": "mezzotint.runtime.providers.names",
    "open_bundle": "mezzotint.runtime.bundle.bundle",
    "Bundle": "mezzotint.runtime.bundle.bundle",
    "Schedule": "mezzotint.runtime.sampling.schedule",
    "MezzotintError": "mezzotint.runtime.errors",
    "Recipe": "mezzotint.compiler.core.pipeline",
    "RECIPES": "mezzotint.passes.recipes.catalog",
    "progress": "mezzotint.progress",
}
__all__ = [
    "RECIPES",
    "Bundle",
    "MezzotintError",
    "Recipe",
    "Schedule",
    "__version__",
    "compile_model",
    "compile_pipeline",
    "export_model",
    "find_engine",
    "mix_bundles",
    "open_bundle",
    "progress",
    "read_shards",
    "sample",
    "sample_to_folder",
]

if not (Path(__file__).parent / "runtime").is_dir():  # a checkout where links cannot be made
    __path__.append(str(Path(__file__).parent.parent))

from mezzotint.runtime import __version__  # found by the line above where there are no links

# From its import on, onnxruntime 1.31 keeps a database in the user's home and sends figures over the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

logging.getLogger(__name__).addHandler(logging.NullHandler())

if TYPE_CHECKING:
    from mezzotint.compiler.core.pipeline import Recipe
    from mezzotint.passes.recipes.catalog import RECIPES
    from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
    from mezzotint.runtime.errors import MezzotintError
    from mezzotint.runtime.providers.names import find_engine
    from mezzotint.runtime.sampling.schedule import Schedule

    from . import progress
    from .api import compile_model, export_model, sample
    from .mix.mix import mix_bundles
    from .shards.shards import read_shards, sample_to_folder
    from .whole import compile_pipeline


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
