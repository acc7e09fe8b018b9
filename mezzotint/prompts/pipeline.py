"""The folder of a pipeline whose encoders make conditions: read and refused before torch is loaded.

Class names in model_index.json are those of diffusers and transformers. A folder that brings code of its own, as
another library or as `auto_map`, is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.compiler.errors import ConditionError
from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.bundle.layout import CONTROLNET, DENOISERS
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.bundle.pipeline import MODEL_INDEX
from mezzotint.runtime.json_text import read_json, read_text

PROMPT_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "SanaPipeline",
    "AuraFlowPipeline",
    "ChromaPipeline",
    "WanPipeline",
    "LTXPipeline",
    "CogVideoXPipeline",
    "Lumina2Pipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
)
"""Pipelines whose prompts alone decide the conditions of their network."""
CONTROL_PIPELINES = {
    "StableDiffusionControlNetPipeline": "StableDiffusionPipeline",
    "StableDiffusionXLControlNetPipeline": "StableDiffusionXLPipeline",
}
"""Pipelines with a ControlNet, and those without it that encode prompts in the same way."""
_TEXT = ("tokenizer", "text_encoder")
_LIBRARIES = ("diffusers", "transformers")
_GIVE = "give arrays instead: --conditions FILE.npz"
_DOWNLOAD = "download the pipeline again"


@dataclass(frozen=True)
class PromptPipeline:
    """A pipeline's folder, its class, the slot and the configuration of its network, and the slots of its encoders."""

    folder: Path
    class_name: str
    slot: str
    config: Mapping[str, Any]
    encoders: tuple[str, ...]
    others: tuple[str, ...]

    def digest(self) -> str:
        """Return the SHA-256 of the encoders' and tokenizers' files."""
        sha = hashlib.sha256()
        for slot in self.encoders:
            for file in sorted(path for path in (self.folder / slot).rglob("*") if path.is_file()):
                sha.update(f"{file.relative_to(self.folder).as_posix()} {file_sha256(file)}\n".encode())
        return sha.hexdigest()


def prompt_pipeline(folder: Path) -> PromptPipeline:
    """Return the pipeline of a folder, or of the folder around it. Raises ConditionError for one without encoders."""
    path = next((one for one in (folder, folder.parent) if (one / MODEL_INDEX).is_file()), None)
    if path is None:
        raise ConditionError(
            f"prompts need the folder of a pipeline, with {MODEL_INDEX}, tokenizers and text encoders",
            where=str(folder),
            hint=_GIVE,
        )
    where = str(path / MODEL_INDEX)
    index = json_object(path / MODEL_INDEX, "the index of the pipeline")
    name = index.get(CLASS)
    name = CONTROL_PIPELINES.get(str(name), name)
    if name not in PROMPT_PIPELINES:
        raise ConditionError(
            f"no conditions can be made of prompts by a {str(name)[:100]}; these pipelines do it: "
            f"{', '.join(PROMPT_PIPELINES)}",
            where=where,
            hint=_GIVE,
        )
    parts = {slot: entry for slot, value in index.items() if (entry := index_entry(value)) is not None}
    slot = next((slot for slot in DENOISERS if slot in parts), None)
    if slot is None:
        raise ConditionError(f"the pipeline has no {' or '.join(DENOISERS)}", where=where, hint=_DOWNLOAD)
    encoders = tuple(part for part in parts if part.startswith(_TEXT))
    for kind in _TEXT:
        if not any(part.startswith(kind) for part in encoders):
            raise ConditionError(f"the pipeline has no {kind}", where=where, hint=_GIVE)
    for part in (*encoders, *(part for part in ("scheduler", "vae") if part in parts)):
        _check_part(path / part, part, parts[part])
    config = json_object(path / slot / "config.json", "the configuration of the network")
    others = tuple(part for part in parts if part not in (*encoders, slot, "scheduler", "vae", CONTROLNET))
    return PromptPipeline(path, str(name), slot, config, encoders, others)


def index_entry(value: Any) -> tuple[str, str] | None:
    """Return (library, class) of a part in the index, None for one that is absent and for settings."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(word, str) for word in value):
        return None
    return value[0], value[1]


def _check_part(folder: Path, slot: str, entry: tuple[str, str]) -> None:
    """Raise ConditionError for a part that is missing, or that brings code of its own."""
    library, name = entry
    if library not in _LIBRARIES:
        raise ConditionError(
            f"the pipeline's {slot} is {library[:100]}.{name[:100]}, and only classes of diffusers and transformers "
            "are loaded",
            where=str(folder),
            hint=_GIVE,
        )
    if not folder.is_dir():
        raise ConditionError(f"the pipeline has no folder {slot}", where=str(folder), hint=_DOWNLOAD)
    for file in sorted(folder.glob("*config.json")):
        # A text, because tokenizers have lengths of 31 digits, which no reader of JSON here takes.
        if '"auto_map"' in read_text(file, f"a configuration of the {slot}", ConditionError, hint=_DOWNLOAD):
            raise ConditionError(
                f"the pipeline's {slot} asks for code of its own (auto_map)", where=str(file), hint=_GIVE
            )


def json_object(file: Path, what: str) -> dict[str, Any]:
    """Return the object of a JSON file. Raises ConditionError."""
    data = read_json(file, what, ConditionError, hint=_DOWNLOAD, infinite=True)
    if not isinstance(data, dict):
        raise ConditionError(f"{what} is no JSON object", where=str(file), hint=_DOWNLOAD)
    return data
