"""Classes of diffusers and transformers by name, and pipelines made of parts. torch is loaded with the first call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.folder_checks import check_loaded
from mezzotint.runtime.errors import InputError, MezzotintError

from ..prompts.calls import library

WITHOUT_WEIGHTS = ("Tokenizer", "TokenizerFast", "ImageProcessor", "ImageProcessorFast", "FeatureExtractor")
"""Ends of the names of classes that are copied: loading one of them reads texts and numbers only."""


def pipeline_class(name: str, where: str, error: type[MezzotintError] = InputError) -> Any:
    """Return a pipeline class of diffusers. Raises `error` for any other name."""
    diffusers = library("diffusers")
    kind = getattr(diffusers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise error(
            f"diffusers {diffusers.__version__} has no pipeline called {name[:100]!r}",
            where=where,
            hint="install the version of diffusers that the pipeline was made with",
        )
    return kind


def scheduler_from(folder: Path, name: str, error: type[MezzotintError] = InputError) -> Any:
    """Return the scheduler of a folder. Raises `error` for a class that diffusers does not have."""
    diffusers = library("diffusers")
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise error(f"diffusers has no scheduler called {name[:100]!r}", where=str(folder))
    return kind.from_pretrained(folder, local_files_only=True)  # type: ignore[attr-defined]


def text_part(folder: Path, name: str, error: type[MezzotintError] = InputError) -> Any:
    """Return a tokenizer or a feature extractor of transformers. No code of the folder is run."""
    transformers = library("transformers")
    plain = name.isidentifier() and name.endswith(WITHOUT_WEIGHTS)
    kind = getattr(transformers, name, None) if plain else None
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise error(f"transformers has no {name[:100]!r}", where=str(folder))
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as failure:  # transformers raises many kinds of errors for files that are missing or damaged
        line = (str(failure).splitlines() or [type(failure).__name__])[0][:300]
        raise error(f"transformers cannot load the {name}: {line}", where=str(folder)) from failure


def weights_part(folder: Path, package: str, name: str) -> Any:
    """Return a text encoder or a VAE in float32 and eval mode. Raises ModelError.

    `name` is a class that compiler/components/classes.py has. Pickles are not read.
    """
    torch, kind = library("torch"), getattr(library(package), name)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            "the folder has no weights in safetensors",
            where=str(folder),
            hint="save the pipeline again: pipe.save_pretrained(FOLDER)",
        )
    key = "dtype" if package == "transformers" else "torch_dtype"
    options = {key: torch.float32, "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        module, info = kind.from_pretrained(folder, **options)
    except Exception as failure:  # the libraries raise many kinds of errors for missing or truncated weights
        line = (str(failure).splitlines() or [type(failure).__name__])[0][:300]
        raise ModelError(
            f"{package} cannot load the {name}: {line}",
            where=str(folder),
            hint="check that config.json and the weights belong together and are complete",
        ) from failure
    check_loaded(info, folder)
    return module.eval()


def assembled(kind: Any, parts: Mapping[str, Any], index: Mapping[str, Any], where: str) -> Any:
    """Return a pipeline of these parts, with the settings of its index; parts that it lacks are None."""
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name == "self":
            continue
        if name in parts:
            arguments[name] = parts[name]
        elif name == "requires_safety_checker":
            arguments[name] = False
        elif name in index and not isinstance(index[name], list):
            arguments[name] = index[name]
        elif parameter.default is inspect.Parameter.empty:
            arguments[name] = None
    try:
        pipe = kind(**arguments)
    except Exception as failure:
        line = (str(failure).splitlines() or [type(failure).__name__])[0][:300]
        raise InputError(f"diffusers cannot build the {kind.__name__}: {line}", where=where) from failure
    return pipe
