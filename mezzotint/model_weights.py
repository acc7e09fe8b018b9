"""The weights of a source: LoRAs on the command line and from Python, and the variant of a folder's files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.lora_files import LoraFile, check_loras
from mezzotint.compiler.frontend.weight_files import chosen_variant

from .io.sources import FolderSource, ModelSource, OnnxSource
from .options import WeightOptions


def parse_loras(items: Sequence[str]) -> list[tuple[str, float]]:
    """Return files and weights of items `FILE` or `FILE:WEIGHT`. A file of that whole name is no pair."""
    return [_parsed(item) for item in items]


def with_weights(source: ModelSource, weights: WeightOptions) -> ModelSource:
    """Return the source with its LoRAs, which are checked, and its variant. Raises ModelError."""
    loras = tuple(_lora(lora) for lora in weights.loras)
    if isinstance(source, OnnxSource):
        if loras or weights.variant is not None:
            raise ModelError(
                "an ONNX file takes no LoRA and has no variants",
                where=str(source.path),
                hint="compile the diffusers model; or fuse the LoRA there, and export that",
            )
        return source
    check_loras(loras)
    if isinstance(source, FolderSource):
        if source.checkpoint is not None and weights.variant is not None:
            raise ModelError("a checkpoint has no variants", where=str(source.checkpoint), hint="leave the variant out")
        read = None if source.checkpoint is not None else chosen_variant(source.path, weights.variant)
        return replace(source, loras=loras, variant=read)
    if weights.variant is not None:
        raise ModelError("a module in memory has no variants", where=source.name, hint="leave the variant out")
    return replace(source, loras=loras)


def _lora(item: str | Path | tuple[str | Path, float]) -> LoraFile:
    path, weight = (item, 1.0) if isinstance(item, (str, Path)) else item
    if not math.isfinite(weight):
        raise ModelError(f"the weight of a LoRA is {weight}", where=str(path), hint="usual weights are 0.5 to 1")
    return LoraFile(Path(path), float(weight))


def _parsed(item: str) -> tuple[str, float]:
    file, colon, weight = item.rpartition(":")
    if colon and file and not Path(item).exists():
        try:
            return file, float(weight)
        except ValueError:
            pass  # the colon is part of the name
    return item, 1.0
