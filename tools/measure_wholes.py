"""Whole tiny pipelines, from a diffusers folder to a picture: beside diffusers itself, in float and in int8.

python -m tools.measure_wholes [NAME ...]   compiles them, loads them, draws from a prompt, and keeps the results in
                                            docs/models_wholes.json (all, or those named)

Weights are random and tokenizers real ones of a small vocabulary; guidance is on where the class has it in two halves.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from mezzotint.diffusers import load
from mezzotint.options import CalibrationOptions, CompileOptions, DeploymentOptions, ImportRoles, RecipeOptions
from mezzotint.pipeline.control_images import line_drawing
from mezzotint.prompt_images import PromptOptions, draw_prompt
from mezzotint.prompts.pipeline import CONTROL_PIPELINES
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.errors import MezzotintError
from mezzotint.whole import ComponentOptions, compile_pipeline
from tests.helpers.pipelines import autoencoder, controlled
from tests.helpers.prompt_pipelines import prompt_pipeline_of
from tools.rooms import ROOT

WHOLE_RESULTS = ROOT / "docs" / "models_wholes.json"
WHOLES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusionControlNetPipeline",
    "StableDiffusionXLControlNetPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtSigmaPipeline",
    "WanPipeline",
)
NO_HALVES = ("FluxPipeline",)  # its guidance is an input of the network
SIZES = {"WanPipeline": (2, 8, 8)}  # of the latents; the others' usual size is small
STEPS, GUIDANCE, SAMPLES = 3, 3.0, 16
PROMPT = "a lighthouse at dusk"
DRAWING = 30  # that a ControlNet reads; the first ones are calibrated on


def tiny_folder(name: str, folder: Path) -> tuple[Path, Any]:
    """Write a pipeline with all of its parts, and return its folder and itself."""
    words = folder / "words"
    words.mkdir()
    pipe = prompt_pipeline_of(CONTROL_PIPELINES.get(name, name), words)
    if name in CONTROL_PIPELINES:
        pipe = controlled(pipe)
        pipe.save_pretrained(folder / "source")
        return folder / "source", pipe
    parts = dict(pipe.components)
    channels = pipe.transformer.config.in_channels if "transformer" in parts else 0
    if name == "WanPipeline":
        torch.manual_seed(2)
        ones: dict[str, Any] = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
        sizes: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
        halved = [False, True, True]
        parts["vae"] = diffusers.AutoencoderKLWan(z_dim=channels, temperal_downsample=halved, **sizes, **ones).eval()
    elif "transformer" in parts:
        parts["vae"] = autoencoder((8,))
        parts["vae"].register_to_config(scaling_factor=1.5, shift_factor=0.05)
    whole = type(pipe)(**parts)
    whole.save_pretrained(folder / "source")
    return folder / "source", whole


def measure_whole(name: str) -> dict[str, Any]:
    """Return the largest difference of latents and pictures over their peak, in float; SQNR in dB of int8 latents."""
    guidance = 1.0 if name in NO_HALVES else GUIDANCE
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (source, own), made = tiny_folder(name, folder), {}
        for form, recipe in (("float", "float"), ("int8", "w8a8-best")):
            options = CompileOptions(
                RecipeOptions(recipe),
                DeploymentOptions(steps=STEPS, guidance=guidance),
                CalibrationOptions(samples=SAMPLES, batch=4),
                ImportRoles(size=SIZES.get(name)),
            )
            parts = ComponentOptions(form)  # type: ignore[arg-type]
            made[form] = compile_pipeline(source, folder / form, options, parts, threads=1)
        call = {**made["float"].manifest.call}
        drawing, control = folder / "lines.png", None
        if name in CONTROL_PIPELINES:
            pixels = line_drawing(DRAWING, call["height"], call["width"])
            Image.fromarray(np.uint8(255 * pixels.transpose(1, 2, 0))).save(drawing)
            call["image"], control = torch.from_numpy(pixels[None]), drawing
        pipes = {"own": own, **{form: load(one.path, threads=1) for form, one in made.items()}}
        drawn = {
            (form, kind): _drawn(pipe, kind, call, guidance)
            for form, pipe in pipes.items()
            for kind in ("latent", "np")
        }
        worst = min(entry.worst_db for entry in made["int8"].manifest.components.values())
        picture = draw_prompt(
            made["int8"].path, folder / "image.png", PromptOptions(PROMPT, control_image=control), threads=1
        )
    found = {
        kind: float(np.abs(drawn["float", kind] - drawn["own", kind]).max() / np.abs(drawn["own", kind]).max())
        for kind in ("latent", "np")
    }
    kernels = made["int8"].bundle.manifest.kernels
    return {
        "latents": found["latent"],
        "pictures": found["np"],
        "int8_db": sqnr_db(drawn["own", "latent"], drawn["int8", "latent"]),
        "components_db": worst,
        "integer": kernels.integer,
        "float": kernels.floating,
        "sample": f"{picture['pictures']} of {picture['size']}",
    }


def _drawn(pipe: Any, kind: str, call: dict[str, Any], guidance: float) -> np.ndarray[Any, Any]:
    pipe.set_progress_bar_config(disable=True)
    taken = inspect.signature(type(pipe).__call__).parameters
    options = {**call, **({"guidance_scale": guidance} if guidance != 1 else {})}
    options = {key: value for key, value in options.items() if key in taken}
    generator = torch.Generator().manual_seed(3)
    answer = pipe(PROMPT, num_inference_steps=STEPS, output_type=kind, generator=generator, **options)
    return np.asarray(answer.images if hasattr(answer, "images") else answer.frames, np.float32)


def main(arguments: Sequence[str]) -> None:
    """Measure what is asked for."""
    kept = json.loads(WHOLE_RESULTS.read_text(encoding="utf-8")) if WHOLE_RESULTS.is_file() else {}
    for name in WHOLES:
        if arguments and name not in arguments:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                kept[name] = measure_whole(name)
            except MezzotintError as error:
                kept[name] = {"error": error.what}
        print(name, kept[name], flush=True)
        text = json.dumps({key: kept[key] for key in WHOLES if key in kept}, indent=1)
        WHOLE_RESULTS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
