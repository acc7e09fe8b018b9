"""A small real denoiser as ONNX, and bundles around it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from mezzotint.runtime.bundle.bundle import CORRECTION, MODEL, SCHEDULER, seal_bundle
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Signature
from tests.helpers.manifests import manifest_data

RECORD = {
    "pass": "none",
    "options": {},
    "nodes_before": 1,
    "nodes_after": 1,
    "note": "",
    "seconds": 1.5,
    "peak_memory_mb": 10,
}
WEIGHT = (0.1, -0.2, 0.3, 0.05, 0.6, -0.1, 0.2, 0.1, -0.3)


@pytest.fixture
def denoiser_onnx() -> Callable[..., bytes]:
    """Builds epsilon = conv(sample) * (1 + timestep / 1000) [+ mean of the context], inputs declared as asked."""

    def build(timestep: str = "int64[B]", context: str | None = None, batch: str = "B") -> bytes:
        extra = f", {context} context" if context else ""
        ending = "epsilon = Identity (scaled)"
        if context:
            ending = "mean = ReduceMean (context, axes) shift = Reshape (mean, column) epsilon = Add (scaled, shift)"
        text = f"""
        <ir_version: 10, opset_import: ["" : 21]>
        denoiser (float[{batch},1,8,8] sample, {timestep} timestep{extra}) => (float[{batch},1,8,8] epsilon)
        <float[1,1,3,3] weight = {{{", ".join(map(str, WEIGHT))}}}, int64[4] column = {{-1, 1, 1, 1}},
         int64[1] axes = {{1}}, float per_step = {{0.001}}, float one = {{1.0}}>
        {{
            blurred = Conv <pads = [1, 1, 1, 1]> (sample, weight)
            number = Cast <to = 1> (timestep)
            part = Mul (number, per_step)
            factor = Add (part, one)
            factors = Reshape (factor, column)
            scaled = Mul (blurred, factors)
            {ending}
        }}
        """
        model = onnx.parser.parse_model(text)
        onnx.checker.check_model(model)
        data: bytes = model.SerializeToString()
        return data

    return build


@pytest.fixture
def signature() -> Signature:
    return Signature(sample="sample", timestep="timestep", output="epsilon")


@pytest.fixture
def make_bundle(
    tmp_path: Path, denoiser_onnx: Callable[..., bytes], signature: Signature
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """Writes a bundle of 1000 training timesteps, deployed with ten; returns its folder and manifest."""

    def make(
        *,
        sampler: str = "ddim",
        eta: float = 0.0,
        guidance: float = 1.0,
        deployed: tuple[float, ...] | None = None,
        correction: bool = False,
        model: bytes | None = None,
        signature: Signature = signature,
        name: str = "bundle",
        **facts: Any,
    ) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path / name
        schedule = Schedule.named("ddpm-linear")
        deployment = Deployment.of(schedule, sampler, 10, eta, guidance)
        for file in (MODEL, SCHEDULER):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(model or denoiser_onnx())
        (folder / SCHEDULER).write_text(json.dumps(schedule.config), encoding="utf-8")
        if correction:
            steps = deployment.solver(schedule).steps
            rows = len(steps)
            Correction(
                deployment,
                "epsilon",
                "regression",
                stages=np.array([step.stage for step in steps]),
                scale=np.full(rows, 1 / 1.02),
                shift=np.full((rows, 1), 0.01),
                excess=np.full(rows, 1e-6),
                spread=np.full(rows, 0.001),
            ).save(folder / CORRECTION)
        manifest = seal_bundle(
            folder,
            Manifest.from_json(
                manifest_data(
                    signature=signature.to_json(),
                    deployment=deployment.to_json(),
                    deployed_timesteps=deployed,
                    history=[RECORD],
                    **facts,
                ),
                "conftest",
            ),
        )
        return folder, manifest.to_json()

    return make
