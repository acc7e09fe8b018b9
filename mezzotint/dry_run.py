"""`mezzotint compile --dry-run`: every check that needs no run of the model, and the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mezzotint.compiler.core.pipeline import CPU

from .io.sources import FolderSource, ModelSource, ModuleSource
from .options import CompileOptions
from .prepared import prepare


def plan_compile(model: str, output: Path, options: CompileOptions, device: str = CPU) -> dict[str, Any]:
    """Return the steps of a compilation as plain data. Raises what the compilation raises before its first pass."""
    prepared = prepare(model, output, options, device)
    source, recipe, deployment = prepared.source, prepared.recipe, prepared.deployment
    calls = deployment.calls
    calibration = {
        "calibration_samples": options.calibration.samples,
        "calibration_batch": options.calibration.batch,
        "seed": options.calibration.seed,
        "size": options.roles.size,
        "prompts": None if options.calibration.prompts is None else str(options.calibration.prompts),
        "negative": options.calibration.negative,
    }
    return {
        "model": _named(source),
        "signature": prepared.signature.to_json(),
        "sample_shape": list(prepared.shape),
        "output": str(output),
        "recipe": recipe.name,
        "target": recipe.target,
        "passes": [{p.name: p.options()} if p.options() else p.name for p in recipe.passes],
        "deployment": f"{deployment}; {len(calls)} calls, timesteps {calls[0]:g} ... {calls[-1]:g}",
        "calibration": {key: value for key, value in calibration.items() if value is not None},
    }


def _named(source: ModelSource) -> str:
    if isinstance(source, ModuleSource):
        return source.kind
    checkpoint = source.checkpoint if isinstance(source, FolderSource) else None
    return f"{source.kind} {checkpoint or source.path}"
