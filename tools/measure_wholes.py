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
from collections.abc import Callable, Sequence
from functools import partial
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
from mezzotint.prompts.guidance import TRUE
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
    "SanaPipeline",
    "Lumina2Pipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
)
NO_HALVES = ("FluxPipeline",)  # its guidance is an input of the network
SIZES = {  # of the latents; the others' usual size is small
    "WanPipeline": (2, 8, 8),
    "SanaPipeline": (16, 16),
    "QwenImagePipeline": (8, 8),
    "ZImagePipeline": (8, 8),
}
STEPS, GUIDANCE, SAMPLES = 3, 3.0, 16
PROMPT = "a lighthouse at dusk"
DRAWING = 30  # that a ControlNet reads; the first ones are calibrated on


def _of_videos(kind: Any, channels: int) -> Any:
    torch.manual_seed(2)
    mean, deviation = 0.0, 1.0
    if kind is diffusers.AutoencoderKLQwenImage:
        channels, mean, deviation = channels // 4, 0.1, 1.5  # the channels are those of packed tokens
    ones: dict[str, Any] = {"latents_mean": [mean] * channels, "latents_std": [deviation] * channels}
    sizes: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return kind(z_dim=channels, temperal_downsample=[False, True, True], **sizes, **ones).eval()


def _deep_compression(channels: int) -> Any:
    """Two levels, of which the inner one has linear attention."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {"attention_head_dim": 4}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_block_types": ("ResBlock", "EfficientViTBlock"), f"{half}_block_out_channels": (8, 16)}
        sizes |= {f"{half}_layers_per_block": (1, 1), f"{half}_qkv_multiscales": ((), (5,))}
    return diffusers.AutoencoderDC(latent_channels=channels, scaling_factor=0.5, **sizes).eval()


VAES: dict[str, Callable[[int], Any]] = {
    "WanPipeline": partial(_of_videos, diffusers.AutoencoderKLWan),
    "QwenImagePipeline": partial(_of_videos, diffusers.AutoencoderKLQwenImage),
    "SanaPipeline": _deep_compression,
}


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
    if name in VAES:
        parts["vae"] = VAES[name](channels)
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
        drawn = {(form, kind): _drawn(pipe, kind, call) for form, pipe in pipes.items() for kind in ("latent", "np")}
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


def _drawn(pipe: Any, kind: str, call: dict[str, Any]) -> np.ndarray[Any, Any]:
    pipe.set_progress_bar_config(disable=True)
    taken = inspect.signature(type(pipe).__call__).parameters
    more = {"negative_prompt": ""} if TRUE in taken else {}  # without one, such a class does not guide
    options = {key: value for key, value in {**call, **more}.items() if key in taken}
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
