"""A model's source becomes a Program: by the front end for ONNX files, or by that for torch, which is loaded then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling.deployment import Deployment

from .io.sources import ModelSource, ModuleSource, OnnxSource
from .options import ImportRoles
from .progress import stage


def import_source(
    source: ModelSource,
    work: Path,
    deployment: Deployment,
    roles: ImportRoles,
    threads: int | None,
    progress: Progress,
    sizes: Mapping[str, tuple[int, ...]] | None = None,
) -> Program:
    """Return the model as a program; `sizes` are known sizes of conditions. Raises ModelError, SignatureError."""
    if isinstance(source, OnnxSource):
        with stage(progress, f"import {source.name}"):
            return import_onnx(
                source.path,
                work,
                schedule=source.schedule,
                deployment=deployment,
                inputs=roles.inputs,
                output=roles.output_name,
                prediction=roles.prediction,
                timestep_unit=roles.timestep_unit,
                channels=roles.channels,
                channel_axis=roles.channel_axis,
                size=roles.size,
                config=source.config,
            )
    with stage(progress, "load torch"):
        from_torch = _from_torch()
    options: dict[str, Any] = {
        "schedule": source.schedule,
        "deployment": deployment,
        "size": roles.size,
        "sizes": sizes,
        "name": source.name,
        "threads": threads,
        "loras": source.loras,
    }
    program: Program
    with stage(progress, f"import {source.name}"):
        if isinstance(source, ModuleSource):
            program = from_torch.import_torch(source.module, work, **options)
        else:
            program = from_torch.import_folder(
                source.path, work, variant=source.variant, checkpoint=source.checkpoint, **options
            )
    return program


def _from_torch() -> Any:
    """Return the front end for torch, which takes seconds to load. Raises ModelError where torch is missing."""
    try:
        from mezzotint.compiler.frontend import from_torch
    except ModuleNotFoundError as error:
        raise ModelError(
            f"compiling a diffusers model needs {error.name}, which is not installed",
            hint="install the extra: pip install 'mezzotint[torch]', or compile an .onnx file",
        ) from error
    return from_torch
