"""The data of the networks beside the denoiser, made by the pipeline itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from mezzotint.compiler.components.classes import DECODER, ENCODER, LATENTS, PICTURE
from mezzotint.compiler.components.controlnet import controlnet_rows
from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.architectures.row import NetworkInputs
from mezzotint.compiler.frontend.network_inputs import network_inputs
from mezzotint.runtime.bundle.layout import CONTROLNET
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.streams import FIXED

from ..prompts.calls import library, prompt_arguments, size_arguments
from ..prompts.guidance import guidance_arguments
from ..prompts.recorder import Recorded, recording_network
from .control_images import ControlImages
from .loading import (
    assembled,
    pipeline_class,
    scheduler_from,
    text_part,
    weights_part,
)
from .source import PipelineSource, pipeline_parts

Rows = dict[str, "np.ndarray[Any, Any]"]
_ROWS = 4  # of one batch of prompts
_FEWEST_ROWS = 2  # torch.export takes a batch of one row for a constant
_CALLS = 8  # of a ControlNet in one run
_STEPS = 2  # of the pipeline that shows its conditions


@dataclass(frozen=True, eq=False)
class PipelineParts:
    """A pipeline without its denoiser: its class, its parts by slot, and the images of its ControlNet if it has one."""

    source: PipelineSource
    kind: Any
    parts: Mapping[str, Any]
    control: ControlImages | None = None

    def image_arguments(self, rows: int, *, held_out: bool = False) -> dict[str, Any]:
        """Return the argument of a call for `rows` prompts that is the images of the ControlNet; {} without one."""
        if self.control is None:
            return {}
        images = self.control.held_out if held_out else self.control.own
        return {"image": library("torch").from_numpy(images[np.arange(rows) % len(images)])}

    def with_denoiser(self, denoiser: Any) -> Any:
        """Return a pipeline of diffusers with this network. Its scheduler is a new one."""
        scheduler = self.parts["scheduler"]
        parts = {
            **self.parts,
            self.source.denoiser: denoiser,
            "scheduler": type(scheduler).from_config(scheduler.config),
        }
        pipe = assembled(self.kind, parts, self.source.index, str(self.source.path))
        pipe.set_progress_bar_config(disable=True)
        return pipe


def check_pipeline_class(source: PipelineSource) -> Any:
    """Return the class of a pipeline. Raises ModelError for one that draws from no prompt."""
    kind = pipeline_class(source.class_name, str(source.path), ModelError)
    if "prompt" not in inspect.signature(kind.__call__).parameters:
        raise ModelError(
            f"a {source.class_name} takes no prompt, and only pipelines with prompts can be compiled",
            where=str(source.path),
            hint="compile the denoiser alone: --components none",
        )
    return kind


def load_parts(source: PipelineSource, kind: Any, control: ControlImages | None = None) -> PipelineParts:
    """Return the parts of a pipeline beside its denoiser, in float32; `control` are images for a ControlNet.

    Raises ModelError.
    """
    parts: dict[str, Any] = {}
    for slot, class_name in pipeline_parts(source.index):
        folder = source.path / slot
        if slot == "scheduler":
            parts[slot] = scheduler_from(folder, class_name, ModelError)
        elif slot in source.components:
            parts[slot] = weights_part(folder, source.components[slot].library, class_name)
        elif slot in source.copied:
            parts[slot] = text_part(folder, class_name, ModelError)
    return PipelineParts(source, kind, parts, control)


@dataclass(frozen=True, eq=False)
class Recording:
    """The inputs of each text encoder for some prompts, and the arguments of the pipeline's call beside the prompts.

    The rows of an encoder are in groups of one length. `states` are the indices of the hidden states that are read.
    """

    texts: Mapping[str, list[Rows]]
    states: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any]

    def batches(self, slot: str) -> list[Rows]:
        """Return the rows of an encoder in batches."""
        return [batch for rows in self.texts[slot] for batch in batches_of(rows)]

    def count(self, slot: str) -> int:
        """Return the number of an encoder's rows."""
        return sum(len(rows["input_ids"]) for rows in self.texts[slot])


def recorded(
    parts: PipelineParts,
    prompts: Sequence[str],
    negative: str,
    deployment: Deployment,
    size: tuple[int, ...] | None,
) -> Recording:
    """Run a pipeline on prompts, as far as its denoiser. `size` is that of the latents, None for the usual one."""
    from mezzotint.compiler.components.recording import watching

    source, torch = parts.source, library("torch")
    folder = source.path / source.denoiser
    config = read_json(folder / "config.json", "the configuration of the denoiser", ModelError, infinite=True)
    name = str(config.get("_class_name"))
    known = network_inputs(name, config, size, {}, str(folder))
    seen: dict[str, list[dict[str, Any]]] = {}
    options: dict[str, Any] = {}
    states: dict[str, set[int]] = {}
    for first in range(0, len(prompts), _ROWS):
        rows = list(prompts[first : first + _ROWS])
        pipe = parts.with_denoiser(recording_network(name, config, len(rows), 1))
        options = _call_options(parts.kind, known, deployment, pipe)
        arguments = {**prompt_arguments(parts.kind, rows, negative), **options, "num_inference_steps": _STEPS}
        arguments |= parts.image_arguments(len(rows))
        with watching(pipe, source.text_encoders) as watched, torch.no_grad(), suppress(Recorded):
            pipe(**arguments, output_type="latent", generator=torch.Generator().manual_seed(FIXED))
        for slot, found in watched.calls.items():
            seen.setdefault(slot, []).extend(found)
        for slot, read in watched.states.items():
            states.setdefault(slot, set()).update(read)
    texts = {slot: joined_rows(calls) for slot, calls in seen.items() if slot in source.text_encoders}
    return Recording(texts, {slot: tuple(sorted(read)) for slot, read in states.items()}, options)


def drawn(
    parts: PipelineParts, denoiser: Any, arguments: Mapping[str, Any], steps: int, generator: Any
) -> dict[str, Rows]:
    """Return the inputs of the two halves of the VAE, latents that the denoiser made and the pictures of them, and
    those of a ControlNet at some of its calls."""
    from mezzotint.compiler.components.recording import watching

    pipe = parts.with_denoiser(denoiser)
    with watching(pipe, (CONTROLNET,) if parts.source.has_controlnet else ()) as watched, library("torch").no_grad():
        pipe(**arguments, num_inference_steps=steps, output_type="np", generator=generator)
    called = watched.calls.get(CONTROLNET, [])
    chosen = np.unique(np.linspace(0, len(called) - 1, min(_CALLS, len(called))).round().astype(int))
    latents, pictures = ([call[key] for call in watched.calls["vae"]] for key in ("z", "decoded"))
    return {
        DECODER: {LATENTS: np.concatenate(latents)},
        ENCODER: {PICTURE: np.clip(np.concatenate(pictures), -1, 1)},
        **({CONTROLNET: controlnet_rows([called[i] for i in chosen])} if called else {}),
    }


def _call_options(kind: Any, known: NetworkInputs, deployment: Deployment, pipe: Any) -> dict[str, Any]:
    """Return the arguments that network and deployment decide, as far as the class has them."""
    embedded = "guidance" in known.conditions  # then the pipeline gives it its usual value
    return {**size_arguments(pipe, known), **guidance_arguments(kind, deployment.guidance, embedded=embedded)}


def batches_of(rows: Rows, size: int = _ROWS) -> list[Rows]:
    """Return rows in batches of at least two; a single row is repeated."""
    count = len(next(iter(rows.values())))
    if count < _FEWEST_ROWS:
        return [{name: np.repeat(array, _FEWEST_ROWS, axis=0) for name, array in rows.items()}]
    starts = list(range(0, count - _FEWEST_ROWS + 1, size))
    ends = [*starts[1:], count]
    return [{name: array[a:b] for name, array in rows.items()} for a, b in zip(starts, ends, strict=True)]


def joined_rows(calls: Sequence[Mapping[str, Any]]) -> list[Rows]:
    """Return the rows of all calls by their length, each once: the empty prompt comes with every one."""
    names, groups = ("input_ids", "attention_mask"), []
    lengths = dict.fromkeys(call["input_ids"].shape[1] for call in calls)
    for length in lengths:
        some = [call for call in calls if call["input_ids"].shape[1] == length]
        joined = {name: np.concatenate([call[name] for call in some]) for name in names if name in some[0]}
        _, index = np.unique(joined["input_ids"], axis=0, return_index=True)
        groups.append({name: array[np.sort(index)] for name, array in joined.items()})
    return groups
