"""Files of a pipeline that are copied: tokenizers, feature extractors, the index; without the paths of a machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import write_text
from mezzotint.compiler.errors import ModelError
from mezzotint.runtime.json_text import read_text, require_file

from .source import CLASS_NAME, PipelineSource

ORIGINS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys that hold a path of the machine where a file was written."""
_ENDINGS = (".json", ".txt", ".model", ".jinja")
_VERSION = "_diffusers_version"


def copy_texts(source: Path, target: Path) -> None:
    """Copy the files of a tokenizer or a feature extractor. Raises ModelError for a folder without any."""
    target.mkdir()
    files = [file for file in sorted(source.iterdir()) if file.suffix in _ENDINGS]
    if not files:
        raise ModelError("the folder has no files", where=str(source), hint="download the pipeline again")
    for file in files:
        require_file(file, "a file of the pipeline", ModelError)
        data = _settings(file) if file.name.endswith("config.json") else None
        if isinstance(data, dict) and any(key in data for key in ORIGINS):
            kept = {key: value for key, value in data.items() if key not in ORIGINS}
            write_text(target / file.name, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
        else:
            shutil.copyfile(file, target / file.name)


def _settings(file: Path) -> Any:
    """Return the contents of a configuration. Tokenizers have lengths of 31 digits there, which `read_json` refuses."""
    try:
        return json.loads(read_text(file, "a file of the pipeline", ModelError))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"a file of the pipeline is no JSON: {error}", where=str(file)) from error


def written_index(source: PipelineSource, scheduler: str) -> dict[str, Any]:
    """Return the index of the compiled pipeline: that of the source, without the parts that are left out."""
    index = {key: value for key, value in source.index.items() if not key.startswith("_")}
    absent: Mapping[str, Any] = {slot: [None, None] for slot in source.left_out}
    known = {key: source.index[key] for key in (CLASS_NAME, _VERSION) if key in source.index}
    return {**known, **index, **absent, "scheduler": ["diffusers", scheduler]}
