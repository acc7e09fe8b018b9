"""The folder of a diffusers pipeline, read and refused before anything is loaded from it.

Class names in model_index.json are looked up in diffusers and transformers only; no module of the folder is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.compiler.components.classes import ComponentClass, component_class
from mezzotint.compiler.components.controlnet import check_controlnet
from mezzotint.compiler.errors import ModelError
from mezzotint.runtime.bundle.layout import CONTROLNET, DENOISERS
from mezzotint.runtime.bundle.pipeline import MODEL_INDEX
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.json_text import read_json

from ..prompts.pipeline import CONTROL_PIPELINES, index_entry
from .loading import WITHOUT_WEIGHTS

CLASS_NAME = "_class_name"
SAFETY = "safety_checker"
_HINT = "download the pipeline again"
_COPIED = ("tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor", "image_processor")
_COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "vae")
_LEFT_OUT = {SAFETY: "safety checkers are not compiled: check the images of the pipeline in another way"}
_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline that can be compiled.

    denoiser    the slot of the denoiser
    components  the rows of the text encoders and of the VAE, by slot
    copied      the slots of tokenizers and feature extractors
    left_out    slots that the compiled pipeline lacks, each with the reason
    """

    path: Path
    index: Mapping[str, Any]
    class_name: str
    denoiser: str
    components: Mapping[str, ComponentClass]
    copied: tuple[str, ...]
    left_out: Mapping[str, str]

    @property
    def has_controlnet(self) -> bool:
        return CONTROLNET in self.components

    @property
    def text_encoders(self) -> tuple[str, ...]:
        return tuple(slot for slot, row in self.components.items() if row.kind == "text encoder")


def is_whole_pipeline(model: object) -> bool:
    """Return whether a model is the folder of a pipeline with text encoders or a VAE beside its denoiser."""
    if not isinstance(model, (str, Path)) or not (Path(model) / MODEL_INDEX).is_file():
        return False
    index = _index(Path(model), ModelError)
    return any(index_entry(index.get(slot)) is not None for slot in _COMPONENTS)


def pipeline_source(folder: str | Path) -> PipelineSource:
    """Return the folder's parts. Raises ModelError, which names the part, for one that cannot be compiled."""
    path = Path(folder)
    index = _index(path, ModelError)
    where = str(path / MODEL_INDEX)
    name = index.get(CLASS_NAME)
    if not isinstance(name, str):
        raise ModelError("the index of the pipeline names no class of diffusers", where=where, hint=_HINT)
    denoisers = [slot for slot in DENOISERS if index_entry(index.get(slot)) is not None]
    if len(denoisers) != 1:
        words = " and ".join(denoisers) or "neither unet nor transformer"
        raise ModelError(f"a pipeline with {words} cannot be compiled", where=where, hint="compile one network alone")
    components: dict[str, ComponentClass] = {}
    copied: list[str] = []
    left_out: dict[str, str] = {}
    for slot, value in index.items():
        entry = index_entry(value)
        if entry is None or slot in (*DENOISERS, "scheduler"):
            continue
        library, class_name = entry
        if slot in _LEFT_OUT:
            left_out[slot] = _LEFT_OUT[slot]
            continue
        if library not in _LIBRARIES:
            raise _refused(slot, f"{library}.{class_name}", where)
        if slot in _COPIED and class_name.endswith(WITHOUT_WEIGHTS):
            copied.append(slot)
        elif slot in _COMPONENTS or (slot == CONTROLNET and name in CONTROL_PIPELINES):
            components[slot] = component_class(class_name, slot, where)
            if components[slot].library != library or (components[slot].kind == "controlnet") != (slot == CONTROLNET):
                raise _refused(slot, f"{library}.{class_name}", where)
        else:
            raise _refused(slot, class_name, where)
        if not (path / slot).is_dir():
            raise ModelError(f"the pipeline has no folder {slot}/", where=str(path), hint=_HINT)
        if slot == CONTROLNET:
            check_controlnet(part_config(path / slot), str(path / slot))
    if "vae" not in components:
        raise ModelError("the pipeline has no VAE", where=where, hint="compile the denoiser alone: --components none")
    return PipelineSource(path, index, name, denoisers[0], components, tuple(copied), left_out)


def pipeline_parts(index: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (slot, class name) of every part of an index that is there, in its order."""
    found = [(slot, index_entry(value)) for slot, value in index.items()]
    return [(slot, entry[1]) for slot, entry in found if entry is not None]


def part_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a part of a pipeline. Raises ModelError."""
    data = read_json(folder / "config.json", f"the configuration of the {folder.name}", ModelError, infinite=True)
    if not isinstance(data, dict):
        raise ModelError("the configuration is no JSON object", where=str(folder / "config.json"), hint=_HINT)
    return data


def _refused(slot: str, class_name: str, where: str) -> ModelError:
    return ModelError(
        f"the pipeline's {slot} is a {class_name}, which cannot be compiled yet",
        where=where,
        hint="compile the denoiser alone: --components none",
    )


def _index(path: Path, error: type[MezzotintError]) -> dict[str, Any]:
    data = read_json(path / MODEL_INDEX, "the index of the pipeline", error, hint=_HINT)
    if not isinstance(data, dict):
        raise error("the index of the pipeline is no JSON object", where=str(path / MODEL_INDEX), hint=_HINT)
    return data
