"""`mezzotint compile --dry-run`: every check that needs no run of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import check_target
from mezzotint.compiler.frontend.from_onnx import load_onnx
from mezzotint.compiler.frontend.roles import infer_signature

from .io.sources import ModuleSource, OnnxSource, resolve
from .options import CompileOptions


def plan_compile(model: str, output: Path, options: CompileOptions) -> dict[str, Any]:
    """Return the steps of a compilation as plain data. Raises what the compilation raises before its first pass."""
    recipe = options.recipe.chosen()
    source = resolve(model, options.deployment.scheduler)
    deployment = options.deployment.on(source.schedule)
    check_target(output, force=options.output.force)
    plan: dict[str, Any] = {
        "model": source.kind if isinstance(source, ModuleSource) else f"{source.kind} {source.path}"
    }
    roles = options.roles
    if isinstance(source, OnnxSource):
        signature = infer_signature(
            load_onnx(source.path).graph,
            inputs=roles.inputs,
            output=roles.output_name,
            prediction=roles.prediction or source.schedule.prediction,
            where=str(source.path),
        )
        plan["signature"] = signature.to_json()
    calls = deployment.calls
    calibration = {
        "calibration_samples": options.calibration.samples,
        "calibration_batch": options.calibration.batch,
        "seed": options.calibration.seed,
        "size": roles.size,
    }
    return {
        **plan,
        "output": str(output),
        "recipe": recipe.name,
        "passes": [{p.name: p.options()} if p.options() else p.name for p in recipe.passes],
        "deployment": f"{deployment}; {len(calls)} calls, timesteps {calls[0]:g} ... {calls[-1]:g}",
        "calibration": {key: value for key, value in calibration.items() if value is not None},
    }
