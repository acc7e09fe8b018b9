"""A compiled pipeline as a pipeline of diffusers, whose networks are computed by onnxruntime."""

from __future__ import annotations

import importlib
from typing import Any

from mezzotint.compiler.components.classes import DECODER, ENCODER
from mezzotint.runtime.bundle.layout import CONTROLNET
from mezzotint.runtime.bundle.pipeline import COMPONENT_MODEL, PipelineFolder

from ..prompts.calls import library
from .loading import assembled, pipeline_class, scheduler_from, text_part
from .source import pipeline_parts


def load_pipeline(opened: PipelineFolder, denoiser: Any, *, threads: int | None = None) -> Any:
    """Return the pipeline, with `denoiser` as its network. Raises InputError for classes that are not there."""
    index, where = opened.index, str(opened.path)
    kind = pipeline_class(opened.manifest.class_name, where)
    parts: dict[str, Any] = {opened.manifest.denoiser: denoiser}
    for slot, class_name in pipeline_parts(index):
        place = opened.path / slot
        if slot == "scheduler":
            parts[slot] = scheduler_from(place, class_name)
        elif slot == "vae":
            decoder = opened.path / DECODER / COMPONENT_MODEL
            encoder = opened.component(ENCODER)
            parts[slot] = _stand_ins("autoencoder").AutoencoderStandIn(decoder, encoder, class_name, threads=threads)
        elif slot == CONTROLNET and (file := opened.component(slot)) is not None:
            parts[slot] = _stand_ins("controlnet").ControlNetStandIn(file, class_name, threads=threads)
        elif (file := opened.component(slot)) is not None:
            parts[slot] = _stand_ins("text_encoder").TextEncoderStandIn(file, class_name, threads=threads)
        elif slot not in parts:
            parts[slot] = text_part(place, class_name)
    return assembled(kind, parts, index, where)


def _stand_ins(name: str) -> Any:
    for needed in ("torch", "diffusers", "transformers"):
        library(needed)
    return importlib.import_module(f"mezzotint.runtime.diffusers.{name}")
