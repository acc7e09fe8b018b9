"""docs/models.md: what became of every registered network, made tiny, from results kept in docs/models.json.

python -m tools.models_page --measure [NAME ...]   compiles them (all, or those whose names contain NAME), keeps the
                                                   results, and writes the page
python -m tools.models_page                        writes the page from the results
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint import compile_model
from mezzotint.compiler.frontend.architectures.registry import ROWS
from mezzotint.runtime.errors import MezzotintError
from tools.measure_pipelines import PIPELINE_RESULTS
from tools.measure_wholes import WHOLE_RESULTS
from tools.other_lengths import STEP, example_and_prediction, graph_parity, other_lengths
from tools.rooms import ROOT
from tools.tiny_models import TINY
from tools.tiny_network import TinyModel

RESULTS, PAGE = ROOT / "docs" / "models.json", ROOT / "docs" / "models.md"
CALIBRATION = 16  # samples; with 2 the ranges of random networks are too narrow by up to 10 dB
LIMITS = {
    "ChromaTransformer2DModel": "the size is fixed; the mask covers prompt and image",
    "CogVideoXTransformer3DModel": "the size is fixed; text to video only",
    "DiTTransformer2DModel": "the size is fixed",
    "Flux2Transformer2DModel": "the size is fixed; no reference images",
    "FluxTransformer2DModel": "the size is fixed; no ControlNet, no IP-Adapter",
    "HunyuanDiT2DModel": "the size is fixed; no ControlNet",
    "HunyuanVideoTransformer3DModel": "the size is fixed; text to video only",
    "LTXVideoTransformer3DModel": "the size is fixed; 25 frames a second",
    "Lumina2Transformer2DModel": "the size is fixed; prompts of one call are padded to one length",
    "QwenImageTransformer2DModel": "the size is fixed; no editing, no layers",
    "StableAudioDiTModel": "the length is fixed",
    "UNet1DModel": "the length is fixed",
    "UNet2DConditionModel": "a ControlNet with its pipeline, or by --conditions, as adapters and masks",
    "UNet3DConditionModel": "the size is fixed",
    "UNetMotionModel": "the size is fixed; no SDXL, no IP-Adapter",
    "UNetSpatioTemporalConditionModel": "the size is fixed; the image is the condition `image_latents`",
    "WanTransformer3DModel": "the size is fixed",
    "ZImageTransformer2DModel": "the size is fixed",
}

FIXED_LENGTHS = {
    "HunyuanDiT2DModel": "fixed: a weight has a row for each token",
    "UNet2DConditionModel, DeepFloyd IF": "fixed: the mask is padded by the tokens of the image",
    "UNetSpatioTemporalConditionModel": "fixed: the prompt is the one token of an image",
}
"""Why the exporter cannot leave the length of a network's prompt open."""
NO_PROMPT = (
    *("UNet2DModel", "UNet1DModel", "DiTTransformer2DModel", "UNet2DConditionModel, AudioLDM"),
    *("UNet2DConditionModel, Kandinsky 2.2 with a hint", "UNet2DConditionModel, Kandinsky 2.2"),
)
IN_TESTS = {
    "UNet2DModel": "DDPMPipeline, DDIMPipeline: in the tests",
    "DiTTransformer2DModel": "DiTPipeline: in the tests",
}
"""Pipelines that tests/mezzotint/test_diffusers.py runs; there are Stable Diffusion and SDXL as well."""


def measure(tiny: TinyModel) -> dict[str, Any]:
    """Return what became of a network: parity of the export, layers by kernels, SQNR of the prediction in dB."""
    module, scheduler = tiny.build(), "flow" if tiny.flow else "ddpm-linear"
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "float.onnx"
        options: dict[str, Any] = {
            "steps": 4,
            "calibration_samples": CALIBRATION,
            "threads": 1,
            "acceptance_seconds": 1,
        }
        bundle = compile_model(
            module,
            Path(folder) / "bundle",
            recipe="w8a8",
            scheduler=scheduler,
            conditions=tiny.conditions(CALIBRATION),
            size=tiny.size,
            export=exported,
            **options,
        )
        example, want = example_and_prediction(module, tiny, bundle.signature)
        parity = graph_parity(want, example, bundle.signature, exported, bundle.sample_shape)
        lengths = other_lengths(module, tiny, bundle, exported)
        kernels, acceptance = bundle.manifest.kernels, bundle.manifest.acceptance
        db = [g.sqnr_db for g in acceptance.groups if g.sqnr_db is not None] if acceptance is not None else []
    found = {"parity": parity, "integer": kernels.integer, "float": kernels.floating, "sqnr_db": min(db, default=None)}
    return found | lengths


def pipeline_texts(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Return what the pipelines of each network showed, from the results of tools/measure_pipelines.py."""
    texts: dict[str, list[str]] = {}
    for name, found in results.items():
        text = found["error"] if "error" in found else f"{found['float']:.0e}, {found['int8_db']:.0f} dB"
        texts.setdefault(found["network"], []).append(f"{name} {text}")
    return {network: "; ".join(shown) for network, shown in texts.items()}


def whole_table(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return what whole pipelines showed, from the results of tools/measure_wholes.py."""
    lines = [
        "## Whole pipelines",
        "",
        "`python -m tools.measure_wholes` compiles tiny pipelines from their folders, with text encoders and VAE, and",
        "draws from a prompt: the largest difference of latents and of pictures from those of diffusers over the",
        "largest value, all in float; the SQNR of latents with everything in int8 (`w8a8-best`), of the component that",
        "is worst, layers of the denoiser by their kernels, and what `sample --prompt` drew.",
        "",
        "| pipeline | latents | pictures | int8 latents, dB | worst component, dB | integer | float | sample |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        if "error" in found:
            lines.append(f"| {name} | fails: {found['error']} | | | | | | |")
            continue
        near = (
            f"{found['latents']:.0e} | {found['pictures']:.0e} | {found['int8_db']:.1f} | {found['components_db']:.1f}"
        )
        lines.append(f"| {name} | {near} | {found['integer']} | {found['float']} | {found['sample']} |")
    return lines


def _lengths(name: str, found: Mapping[str, Any]) -> str:
    """Return what other lengths of a prompt showed, or why there are none."""
    if "lengths" not in found:
        return FIXED_LENGTHS.get(name, "no prompt" if name in NO_PROMPT else "open, not measured")
    own, other = found["length_db"]
    return f"{found['length_parity']:.0e}, {other:.1f} dB ({own:.1f})"


def models_page(
    results: Mapping[str, Mapping[str, Any]],
    pipelines: Mapping[str, Mapping[str, Any]],
    wholes: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return the page."""
    shown = {**IN_TESTS, **pipeline_texts(pipelines)}
    lines = [
        "# Networks that compile",
        "",
        f"{len(ROWS)} classes of diffusers compile from a folder or from memory. Each is tried tiny, with random",
        "weights, by `python -m tools.models_page --measure`, which writes this page; tests compile ten of",
        "them, and run the inputs of all. *Parity* is the largest difference between torch and the exported graph over",
        f"the largest output, at timestep {STEP}. *Integer* and *float* count the layers of the W8A8 file by their",
        "kernels in onnxruntime. *SQNR* is that of the prediction beside the float graph, at the worst timestep.",
        "Random weights of this size say that a file is right, and nothing about the fidelity of a trained network.",
        "A class that is not in this table is refused by name; export it to ONNX yourself and compile that file.",
        "An embedded guidance that is not given is that of the pipeline.",
        "",
        "*Other lengths*: prompts of most classes have an open length. A bundle is calibrated with the tokens of its",
        "conditions or prompts, else with as many as the class's pipeline usually has, and takes any other number.",
        "Shown are the largest parity at two other lengths, and the SQNR of the W8A8 file at one of them (9 tokens",
        "more) beside that at the calibrated length, both on noise at the worst timestep. Where a length is fixed, a",
        "call with another one is refused, and the shapes are named.",
        "",
        "*Pipeline* is a pipeline of diffusers with a bundle in the network's place, after four steps: the largest",
        "difference of its latents with a float bundle over the largest latent, and the SQNR of its latents with W8A8",
        "(`python -m tools.measure_pipelines`). Prompts are random embeddings, and guidance is the usual one of each",
        "pipeline, up to 9: it multiplies what a network of random weights loses.",
        "",
        "| network | parity | integer | float | SQNR, dB | other lengths | pipeline | limits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, tiny in TINY.items():
        found = results.get(name)
        figures = ["not measured", "", "", ""]
        if found is not None and "error" in found:
            figures = [f"fails: {found['error']}", "", "", ""]
        elif found is not None:
            db = "" if found["sqnr_db"] is None else f"{found['sqnr_db']:.1f}"
            figures = [f"{found['parity']:.0e}", str(found["integer"]), str(found["float"]), db]
        figures += [_lengths(name, found or {}), shown.get(name, ""), LIMITS.get(tiny.cls, "")]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join([*lines, "", *whole_table(wholes)]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is asked for, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs="*", metavar="NAME")
    names = parser.parse_args(arguments).measure
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for name, tiny in TINY.items():
        if names is None or (names and not any(part.lower() in name.lower() for part in names)):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                results[name] = measure(tiny)
            except MezzotintError as error:
                results[name] = {"error": error.what}
        print(name, results[name], flush=True)
        kept = {key: results[key] for key in TINY if key in results}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    pipelines, wholes = (
        json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for file in (PIPELINE_RESULTS, WHOLE_RESULTS)
    )
    PAGE.write_text(models_page(results, pipelines, wholes), encoding="utf-8")


if __name__ == "__main__":
    main()
