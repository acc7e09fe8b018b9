"""compile --dry-run: everything that can be checked without running the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import check_target
from mezzotint.compiler.frontend.from_onnx import load_onnx
from mezzotint.compiler.frontend.roles import infer_signature
from mezzotint.passes.recipes.files import load_recipe, with_options
from mezzotint.runtime.sampling.deployment import Deployment, usual_sampler
from mezzotint.runtime.signature import Prediction

from .io.sources import resolve


def plan_compile(
    model: str,
    output: Path,
    *,
    recipe: str,
    settings: Mapping[str, Any],
    scheduler: str | None,
    sampler: str | None,
    steps: int,
    eta: float,
    guidance: float,
    inputs: Mapping[str, str],
    output_name: str | None,
    prediction: Prediction | None,
    force: bool,
    **calibration: Any,
) -> dict[str, Any]:
    """What a compile would do, as plain data. Raises what the compile would raise before its first pass."""
    chosen = with_options(load_recipe(recipe), dict(settings))
    source = resolve(model, scheduler)
    deployment = Deployment.of(source.schedule, sampler or usual_sampler(source.schedule), steps, eta, guidance)
    check_target(output, force=force)
    plan: dict[str, Any] = {"model": f"{source.kind} {source.path}"}
    if source.kind == "onnx" and source.path is not None:
        signature = infer_signature(
            load_onnx(source.path).graph,
            inputs=inputs,
            output=output_name,
            prediction=prediction or source.schedule.prediction,
            where=str(source.path),
        )
        plan["signature"] = signature.to_json()
    calls = deployment.calls
    return {
        **plan,
        "output": str(output),
        "recipe": chosen.name,
        "passes": [{p.name: p.options()} if p.options() else p.name for p in chosen.passes],
        "deployment": f"{deployment}; {len(calls)} calls, timesteps {calls[0]:g} ... {calls[-1]:g}",
        "calibration": {k: v for k, v in calibration.items() if v is not None},
    }
