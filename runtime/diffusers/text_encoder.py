"""A compiled text encoder in a diffusers pipeline: the call and the answer of the class of transformers that it was."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

from ..component import ComponentNetwork
from ..errors import InputError
from .compiled_module import CompiledModule

_STATES = "hidden_states"
_CONFIGS = {
    "CLIPTextModel": ("CLIPTextConfig", BaseModelOutputWithPooling),
    "CLIPTextModelWithProjection": ("CLIPTextConfig", CLIPTextModelOutput),
    "T5EncoderModel": ("T5Config", BaseModelOutput),
    "UMT5EncoderModel": ("UMT5Config", BaseModelOutput),
    "Gemma2Model": ("Gemma2Config", BaseModelOutput),
    "Gemma2ForCausalLM": ("Gemma2Config", BaseModelOutput),
    "Qwen3Model": ("Qwen3Config", BaseModelOutput),
    "Qwen3ForCausalLM": ("Qwen3Config", BaseModelOutput),
    "Qwen2_5_VLForConditionalGeneration": ("Qwen2_5_VLConfig", BaseModelOutput),
}
_IGNORED = ("return_dict", "output_hidden_states", "output_attentions", "use_cache")


class CompiledStates(tuple[Any, ...]):
    """The hidden states of an encoder: those that were compiled, at their indices. Others raise InputError."""

    where: str

    def __new__(cls, states: Mapping[int, Any], count: int, where: str) -> CompiledStates:
        made = super().__new__(cls, (states.get(i) for i in range(count)))
        made.where = where
        return made

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        if any(state is None for state in (found if isinstance(index, slice) else (found,))):
            kept = ", ".join(str(i) for i, state in enumerate(tuple.__iter__(self)) if state is not None)
            raise InputError(
                f"the hidden state {index} was not compiled: the pipeline read {kept}",
                where=self.where,
                hint="call the pipeline as its class does, or compile it again",
            )
        return found

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))


class TextEncoderStandIn(CompiledModule):
    """The module that a pipeline calls instead of its text encoder; float32, on the CPU, without parameters."""

    def __init__(self, file: Path, class_name: str, *, threads: int | None = None) -> None:
        super().__init__(class_name)
        if class_name not in _CONFIGS:
            raise InputError(f"no stand-in for a {class_name}", where=str(file), hint="compile the pipeline again")
        config, self.answer = _CONFIGS[class_name]
        self.network = ComponentNetwork(file, threads=threads)
        values = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
        self.config = getattr(transformers, config)(**values)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return the answer of the original class; hidden states are in it where they are asked for."""
        if unknown := [name for name, value in options.items() if name not in _IGNORED and value is not None]:
            raise InputError(f"a compiled text encoder cannot use {unknown[0]}", where=str(self.network.file))
        if input_ids is None:
            raise InputError("a compiled text encoder needs input_ids", where=str(self.network.file))
        feeds = {"input_ids": input_ids.numpy()}
        if "attention_mask" in self.network.inputs:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            feeds["attention_mask"] = mask.numpy()
        elif attention_mask is not None and not bool((attention_mask == 1).all()):
            raise InputError(
                "the compiled text encoder has no input for masks, and this one hides tokens",
                where=str(self.network.file),
                hint="compile the pipeline again: its own calls decide which inputs there are",
            )
        outputs: dict[str, Any] = {
            name: torch.from_numpy(np.asarray(array)) for name, array in self.network(feeds).items()
        }
        states = {
            int(name.rpartition(".")[2]): outputs.pop(name) for name in list(outputs) if name.startswith(f"{_STATES}.")
        }
        if options.get("output_hidden_states"):
            if not states:
                raise InputError("the compiled text encoder gives no hidden states", where=str(self.network.file))
            outputs[_STATES] = CompiledStates(states, self._state_count(), str(self.network.file))
        answer = self.answer(**outputs)
        return answer if options.get("return_dict") is not False else answer.to_tuple()

    def _state_count(self) -> int:
        """Return how many hidden states the original has: that of its embeddings, and one for each layer."""
        return int(self.config.get_text_config().num_hidden_layers) + 1

    def save_pretrained(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InputError("a compiled text encoder cannot be saved as a model of transformers", hint="copy the folder")
