"""What the files beside a model's weights say of it: its configuration, and that of the pipeline around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mezzotint.compiler.errors import ModelError
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.bundle.pipeline import MODEL_INDEX

from .io.sources import CONFIG_FILE, FolderSource, ModelSource, ModuleSource


def network_config(source: ModelSource) -> dict[str, Any] | None:
    """Return the configuration of a network with its class, None for an ONNX file that comes without one."""
    if isinstance(source, FolderSource):
        return _json(source.path / CONFIG_FILE)
    if isinstance(source, ModuleSource):
        return {**dict(getattr(source.module, "config", {})), CLASS: type(source.module).__name__}
    return None if source.config is None else dict(source.config)


def pipeline_sizes(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """Return the sizes of conditions that the pipeline around a model's folder says: SDXL's refiner has 5 time ids."""
    if not isinstance(source, FolderSource):
        return {}
    index = source.path.parent / MODEL_INDEX
    if not index.is_file():
        return {}
    return {"time_ids": (5,)} if _json(index).get("requires_aesthetics_score") is True else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"cannot read the model's configuration: {error}", where=str(file), hint="download the model again"
        ) from error
    if not isinstance(data, dict):
        raise ModelError("the model's configuration is no JSON object", where=str(file), hint="download it again")
    return data
