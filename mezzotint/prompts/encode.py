"""The conditions that a pipeline gives its network for prompts: the pipeline runs as far as the network's first call.

How prompts are tokenized, which hidden states are taken, what is pooled, padded and joined, is code of each pipeline in
diffusers; it runs here as it is, with a module in the network's place that keeps its arguments. The autoencoder is made
of its configuration alone: pipelines read its scale.

The two halves of guidance are distinguished by a run without guidance, whose rows are those of the prompts.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.errors import ConditionError
from mezzotint.compiler.frontend.architectures.row import PROMPT, NetworkInputs, SampleSize
from mezzotint.compiler.frontend.network_inputs import network_inputs
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.streams import FIXED

from .calls import library, prompt_arguments, quiet_libraries, size_arguments
from .guidance import guidance_arguments
from .pipeline import PromptPipeline, json_object
from .recorder import Recorded, recording_network
from .texts import PromptTexts

NamedRows = dict[str, npt.NDArray[Any]]
_BATCH = 4  # prompts in one run of the encoders
_GUIDED = 2.0  # any scale at which a pipeline computes both halves


def encode_prompts(
    pipeline: PromptPipeline,
    texts: PromptTexts,
    *,
    guided: bool,
    size: SampleSize | None = None,
    progress: Progress | None = None,
) -> tuple[NamedRows, NamedRows]:
    """Return (conditions `[prompts, ...]`, unconditional rows `[1, ...]`, none without guidance) of a network.

    `size` is that of the network's samples, None for the usual one. Raises ConditionError where the pipeline's files
    cannot be loaded, or where it has no unconditional half.
    """
    for needed in ("torch", "diffusers", "transformers"):
        library(needed)
    from mezzotint.runtime.diffusers.network_classes import NETWORK_CLASSES

    name = str(pipeline.config.get(CLASS))
    known = network_inputs(name, pipeline.config, size, {}, str(pipeline.folder / pipeline.slot))
    run = _Run(pipeline, name, known)
    with quiet_libraries():
        pipe = run.load()
        found: list[NamedRows] = []
        for start in range(0, len(texts.prompts), _BATCH):
            batch = texts.prompts[start : start + _BATCH]
            found.append(run.rows(pipe, batch, texts.negative, guided=False)[0])
            if progress is not None:
                progress("encode prompts", start + len(batch), len(texts.prompts))
        pads = NETWORK_CLASSES[name].prompt
        conditions = _joined(found, known, pads)
        without: NamedRows = {}
        if guided:
            first = texts.prompts[:1]
            both = [_joined([half], known, pads) for half in run.rows(pipe, first, texts.negative, guided=True)]
            alone = run.rows(pipe, first, texts.negative, guided=False)[0] if pads else found[0]
            without = _other_half(both, _joined([alone], known, pads), str(pipeline.folder))
        del pipe
    gc.collect()  # the encoders are in cycles, and the denoiser needs their memory
    return conditions, without


class _Run:
    """A pipeline of diffusers, and its calls up to the network."""

    def __init__(self, pipeline: PromptPipeline, name: str, known: NetworkInputs) -> None:
        import diffusers

        self._pipeline, self._name, self._known = pipeline, name, known
        self._kind = getattr(diffusers, pipeline.class_name, None)
        if self._kind is None:
            raise ConditionError(
                f"the installed diffusers {diffusers.__version__} has no {pipeline.class_name}",
                where=str(pipeline.folder),
                hint="install the version that the pipeline was saved by, or a later one",
            )

    def load(self) -> Any:
        """Return the pipeline with its encoders in float32, and no other weights."""
        import torch

        recorder = recording_network(self._name, self._pipeline.config, 1, 1)
        parts = {**dict.fromkeys(self._pipeline.others), self._pipeline.slot: recorder, "vae": self._autoencoder()}
        options = {"torch_dtype": torch.float32, "local_files_only": True, "use_safetensors": True}
        try:
            pipe = self._kind.from_pretrained(self._pipeline.folder, **parts, **options)  # type: ignore[union-attr]
        except Exception as error:  # both libraries raise many kinds of errors for files that are missing or damaged
            line = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise ConditionError(
                f"the pipeline's encoders cannot be loaded: {line}",
                where=str(self._pipeline.folder),
                hint="check that tokenizers and text encoders (safetensors) are complete, or give --conditions",
            ) from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _autoencoder(self) -> Any:
        """Return the autoencoder without its weights, None for a pipeline without one."""
        import diffusers
        import torch

        file = self._pipeline.folder / "vae" / "config.json"
        if not file.is_file():
            return None
        config = json_object(file, "the configuration of the autoencoder")
        kind = getattr(diffusers, str(config.get(CLASS)), None)
        if kind is None:
            return None
        with torch.device("meta"):
            empty = kind.from_config(config)
        return empty.to_empty(device="cpu")

    def rows(self, pipe: Any, prompts: Sequence[str], negative: str, *, guided: bool) -> list[NamedRows]:
        """Return the rows of each half that the network is called with."""
        import torch

        halves = 2 if guided else 1
        recorder = recording_network(self._name, self._pipeline.config, len(prompts), halves)
        setattr(pipe, self._pipeline.slot, recorder)
        texts = prompt_arguments(self._kind, prompts, negative) if guided else {"prompt": list(prompts)}
        call = {**size_arguments(pipe, self._known), **self._guidance(guided), **texts}
        try:
            with torch.no_grad():
                pipe(
                    **call, num_inference_steps=2, generator=torch.Generator().manual_seed(FIXED), output_type="latent"
                )
        except Recorded:
            pass
        except Exception as error:  # whatever a pipeline raises for files that do not belong together
            line = (str(error).splitlines() or [type(error).__name__])[0][:300]
            raise ConditionError(
                f"the {self._pipeline.class_name} cannot encode a prompt: {line}",
                where=str(self._pipeline.folder),
                hint="check that tokenizers and text encoders belong together; or give --conditions FILE.npz",
            ) from error
        parts = [part for call in recorder.calls for part in self._conditions(call, len(prompts))]
        return parts[:halves]

    def _guidance(self, guided: bool) -> dict[str, Any]:
        """Return the scale of both halves, or 1; the embedded guidance of Flux keeps the pipeline's usual value."""
        return guidance_arguments(self._kind, _GUIDED if guided else 1.0)

    def _conditions(self, arguments: dict[str, Any], count: int) -> Iterator[NamedRows]:
        """Yield the rows of each half of a call: the network's conditions by name, in the types of its inputs."""
        import torch

        from mezzotint.runtime.diffusers.network_arguments import as_array, flattened
        from mezzotint.runtime.diffusers.network_classes import NETWORK_CLASSES

        arranged = NETWORK_CLASSES[self._name].arranged
        arguments = arguments if arranged is None else arranged(arguments, self._known.channels)
        tensors = {
            name: value
            for name, _, value in flattened(arguments)
            if name in self._known.conditions and isinstance(value, torch.Tensor)
        }
        batch = len(next(iter(arguments.values())))
        arrays = {name: as_array(name, tensor) for name, tensor in tensors.items()}
        for name, value in self._known.conditions.items():
            if name not in arrays and value.kind in ("mask", "flag") and PROMPT in arrays:
                arrays[name] = np.ones(arrays[PROMPT].shape[:2])  # left out where it hides nothing (Qwen-Image)
        whole = {name: np.broadcast_to(array, (batch, *array.shape[1:])) for name, array in arrays.items()}
        for start in range(0, batch, count):
            yield {name: self._typed(name, array[start : start + count]) for name, array in whole.items()}

    def _typed(self, name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        dtype = self._known.conditions[name].value(name).dtype
        return np.array(array if dtype is None else array.astype(dtype.numpy()))


def _other_half(halves: Sequence[NamedRows], conditional: Mapping[str, npt.NDArray[Any]], where: str) -> NamedRows:
    """Return the half that is not that of the first prompt."""

    def apart(half: NamedRows) -> float:
        return sum(_distance(rows, conditional[name][:1]) for name, rows in half.items() if name in conditional)

    if len(halves) != 2:
        raise ConditionError(
            "the pipeline computes no unconditional half for guidance",
            where=where,
            hint="leave out --guidance: this network takes its guidance as an input",
        )
    return max(halves, key=apart)


def _distance(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    return float(np.abs(one.astype(np.float64) - other).max()) if one.shape == other.shape else np.inf


def _joined(batches: Sequence[NamedRows], known: NetworkInputs, pads: str) -> NamedRows:
    """Return the rows of all batches. Prompts by the name `pads`, as long as the longest of their batch, get the length
    that the network usually takes."""
    joined = {}
    for name in batches[0]:
        arrays = [rows[name] for rows in batches]
        if pads and name in (pads, f"{pads}_mask"):
            arrays = [_padded(a, known.conditions[name].sizes[0]) for a in arrays]
        joined[name] = np.concatenate(arrays) if len(arrays) > 1 else arrays[0]
    return joined


def _padded(array: npt.NDArray[Any], tokens: int) -> npt.NDArray[Any]:
    widths = [(0, 0), (0, max(tokens - array.shape[1], 0)), *[(0, 0)] * (array.ndim - 2)]
    return np.pad(array, widths)
