"""LoRA files before they are read: what can be known, and refused, without torch.

Only safetensors files are read. Adapters that are no products of two matrices (LoHa, LoKr), and those with magnitudes
(DoRA), are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mezzotint.runtime.json_text import require_file

from ..errors import ModelError
from .weight_files import PICKLES

_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "LoCon with a third matrix",
    "oft_": "OFT",
    "lora_embedding_": "a LoRA of an embedding",
}
_METADATA = "lora_adapter_metadata"  # where diffusers writes the settings of its adapters
_PEFT_CONFIG = "adapter_config.json"  # where peft does, next to the file


@dataclass(frozen=True)
class LoraFile:
    """A LoRA in a safetensors file, and the weight that it is fused with."""

    path: Path
    weight: float = 1.0

    def keys(self) -> list[str]:
        """Return the names of its tensors. Raises ModelError for files that are no LoRAs that can be fused."""
        where, hint = str(self.path), "download the LoRA again"
        if self.path.suffix.lower() in PICKLES:
            raise ModelError(
                "the LoRA is a pickle, which may run code when it is loaded",
                where=where,
                hint="convert it to safetensors where you trust it",
            )
        require_file(self.path, "the LoRA", ModelError, hint)
        try:
            with safe_open(self.path, "np") as file:
                keys = list(file.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"the LoRA is no safetensors file: {error}"[:300], where=where, hint=hint) from error
        for part, kind in _OTHER_KINDS.items():
            if key := next((key for key in keys if part in key), None):
                raise ModelError(
                    f"the file is {kind}, which cannot be fused: {key!r}",
                    where=where,
                    hint="fuse it with the tool that it was made with, and compile the result",
                )
        if not any("lora" in key.lower() for key in keys):
            raise ModelError("the file has no tensor of a LoRA", where=where, hint="give the LoRA's own file")
        return keys

    def settings(self) -> Mapping[str, Any]:
        """Return the settings of the adapter as peft has them (`lora_alpha`, ...), empty where no file says them."""
        with safe_open(self.path, "np") as file:
            text = (file.metadata() or {}).get(_METADATA)
        own = self.path.with_name(_PEFT_CONFIG)
        if text is None and own.is_file():
            text = own.read_text(encoding="utf-8")
        try:
            settings = {} if text is None else json.loads(text)
        except ValueError as error:
            raise ModelError(f"the LoRA's settings are no JSON: {error}", where=str(self.path)) from error
        if not isinstance(settings, dict):
            raise ModelError("the LoRA's settings are no JSON object", where=str(self.path))
        return settings


def check_loras(loras: Sequence[LoraFile]) -> None:
    """Raise ModelError for the first file that cannot be fused."""
    for lora in loras:
        lora.keys()
