"""Bundles in the pipelines of tools/tiny_pipelines.py: how far their latents are from those of the network.

python -m tools.measure_pipelines [NAME ...]   compiles the networks, float and W8A8, runs the pipelines, and keeps the
                                               results in docs/models_pipelines.json (all, or those named)
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint import compile_model
from mezzotint.diffusers import attach
from mezzotint.runtime.errors import MezzotintError
from tools.rooms import ROOT
from tools.tiny_pipeline import STEPS, TinyPipeline
from tools.tiny_pipelines import TINY_PIPELINES

PIPELINE_RESULTS = ROOT / "docs" / "models_pipelines.json"
_SAMPLES = 16  # of the calibration


def measure_pipeline(tiny: TinyPipeline) -> dict[str, Any]:
    """Return the largest difference of latents with a float bundle over their peak, and SQNR in dB with W8A8."""
    network = tiny.tiny.build()
    options: dict[str, Any] = {"steps": STEPS, "sampler": tiny.sampler, "threads": 1, "acceptance_seconds": 1}
    options |= {"scheduler": tiny.schedule(), "conditions": tiny.tiny.conditions(_SAMPLES)}
    options["calibration_samples"] = _SAMPLES
    with tempfile.TemporaryDirectory() as folder:
        work, exported = Path(folder), Path(folder) / "exported" / "model.onnx"
        float_ = compile_model(network, work / "f", recipe="float", size=tiny.tiny.size, export=exported, **options)
        network.save_config(exported.parent)  # type: ignore[operator]
        size, axis = float_.signature.sides(float_.sample_shape), float_.signature.channel_axis
        options |= {"size": size, "channel_axis": None if axis == 1 else axis}
        int8 = compile_model(exported.parent, work / "i", recipe="w8a8", **options)
        calls = float_.deployment.calls
        want = tiny.latents(tiny.build(network), calls)
        same, near = (tiny.latents(attach(tiny.build(network), bundle, threads=1), calls) for bundle in (float_, int8))
    error = float((want**2).mean() / ((near - want) ** 2).mean())
    return {"float": float(np.abs(same - want).max() / np.abs(want).max()), "int8_db": float(10 * np.log10(error))}


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for."""
    kept = json.loads(PIPELINE_RESULTS.read_text(encoding="utf-8")) if PIPELINE_RESULTS.is_file() else {}
    for name, tiny in TINY_PIPELINES.items():
        if arguments and name not in arguments:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                kept[name] = {"network": tiny.network, **measure_pipeline(tiny)}
            except MezzotintError as error:
                kept[name] = {"network": tiny.network, "error": error.what}
        print(name, kept[name], flush=True)
        text = json.dumps({key: kept[key] for key in TINY_PIPELINES if key in kept}, indent=1)
        PIPELINE_RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
