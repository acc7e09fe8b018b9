"""Import of a diffusers model as a Program: torch.export (an FX graph), then ONNX by the dynamo exporter.

Every import is checked: the exported graph has as many parameter bytes as the module, and its outputs agree with torch
at three timesteps. A DiT with learned variances predicts them in channels after those of the noise. No sampler here
reads them (nor does diffusers' DiTPipeline), so the graph keeps the channels of the noise only.
"""

from __future__ import annotations

import gc
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from mezzotint.runtime.bundle.model_config import CLASS, public_config
from mezzotint.runtime.errors import CompileWarning, MezzotintError
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import EXTRA_CHANNELS, Signature

from ..core.execute import Executor
from ..core.program import Program
from ..core.verify import relative_difference
from ..errors import ModelError
from .architectures.registry import architecture_row
from .architectures.row import ConditionSizes, SampleSize
from .call_metadata import note_call
from .conventions import known_unit
from .folder_checks import check_folder, check_loaded
from .from_onnx import finish_import
from .lora import fused_rows
from .lora_files import LoraFile
from .module_weights import exported_weights
from .single_file import load_single_file
from .torch_example import Example, example_of
from .torch_export import OUTPUT
from .torch_export import export_network as _export
from .weight_files import chosen_variant

_SHOWN = 4  # unread parameters named in a warning
PARITY = 2e-3  # of the largest output: float32 kernels of two libraries over some hundred layers


def load_model(folder: Path, variant: str | None = None, checkpoint: Path | None = None) -> torch.nn.Module:
    """Return the diffusers model of a folder (config.json and weights), in float32 and eval mode. Raises ModelError.

    `variant` says which weights; a `checkpoint` is a file that has them instead of the folder.
    """
    import diffusers

    config_file = folder / "config.json"
    hint = "download the model again"
    config = read_json(config_file, "the model's configuration", ModelError, hint=hint, infinite=True)
    if not isinstance(config, dict):
        raise ModelError("the model's configuration is not a JSON object", where=str(config_file), hint=hint)
    name = architecture_row(str(config.get(CLASS)), str(config_file)).name
    where = folder if checkpoint is None else checkpoint
    check_folder(folder, config, weights=checkpoint is None)
    variant = None if checkpoint is not None else chosen_variant(folder, variant)
    diffusers.logging.set_verbosity_error()
    options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True, "output_loading_info": True}
    try:
        kind = getattr(diffusers, name)
        with _one_type(kind):
            if checkpoint is not None:
                model, info = load_single_file(kind, checkpoint, folder)
            else:
                model, info = kind.from_pretrained(folder, use_safetensors=True, variant=variant, **options)
    except ModelError:
        raise
    except Exception as error:  # diffusers and safetensors raise many kinds of errors for missing or truncated weights
        raise ModelError(
            f"diffusers cannot load the model: {(str(error).splitlines() or [type(error).__name__])[0][:500]}",
            where=str(where),
            hint="check that config.json and the weights belong together and are complete",
        ) from error
    check_loaded(info, where)
    if broken := next((key for key, value in model.state_dict().items() if not bool(value.isfinite().all())), None):
        raise ModelError(
            f"the weight {broken!r} holds NaN or infinite values", where=str(where), hint="download the model again"
        )
    return model.eval()


@contextmanager
def _one_type(kind: Any) -> Iterator[None]:
    """Let diffusers load a class that keeps some layers in float32 (Wan), which it refuses without accelerate.

    Here all layers are in float32: "`low_cpu_mem_usage` cannot be False when `keep_in_fp32_modules` is True".
    """
    kept = kind._keep_in_fp32_modules
    kind._keep_in_fp32_modules = None
    try:
        yield
    finally:
        kind._keep_in_fp32_modules = kept


def import_folder(path: Path, folder: Path, **options: Any) -> Program:
    """Return the Program of a diffusers model folder; options as in `import_torch`.

    torch's copy of the weights is freed before onnxruntime loads its own: only one is in memory at a time.
    """
    sizes, size, loras = (options.pop(key, None) for key in ("sizes", "size", "loras"))
    model = load_model(path, options.pop("variant", None), options.pop("checkpoint", None))
    fused = list(fused_rows(model, loras or ()))
    reading = _read(model, options["schedule"], options["deployment"], size, sizes, str(path))
    del model
    return _finish(reading, folder, fused, **options)


def import_torch(
    model: torch.nn.Module,
    folder: Path,
    *,
    schedule: Schedule,
    deployment: Deployment,
    size: SampleSize | None = None,
    sizes: ConditionSizes | None = None,
    name: str = "module",
    threads: int | None = None,
    loras: tuple[LoraFile, ...] = (),
) -> Program:
    """Return the Program of a network of a class that the registry has (architectures/registry.py).

    The inputs keep their diffusers names. The batch stays open, and so do height and width where the model allows.
    `sizes` are known sizes of conditions: tokens, pooled prompts, time ids. The module stays as it is: copies are
    widened from half precision to float32, and have `loras` fused into them. Warns of parameters that no input reaches.
    Raises ModelError for other classes, and when the export lost weights or disagrees with torch.
    """
    architecture_row(type(model).__name__, name)
    with exported_weights(model, loras) as fused:
        reading = _read(model, schedule, deployment, size, sizes, name)
    return _finish(reading, folder, fused, schedule=schedule, deployment=deployment, name=name, threads=threads)


@dataclass(frozen=True, eq=False)
class _Reading:
    """An exported module, and the outputs of torch at three timesteps."""

    model: ir.Model
    fx_text: str
    config: dict[str, Any]
    signature: Signature
    example: Example
    parity: dict[int, npt.NDArray[np.float32]]
    parameters: int


def _read(
    model: torch.nn.Module,
    schedule: Schedule,
    deployment: Deployment,
    size: SampleSize | None,
    sizes: ConditionSizes | None,
    name: str,
) -> _Reading:
    row = architecture_row(type(model).__name__, name)
    if wrong := next((f"{n} is {p.dtype}" for n, p in model.named_parameters() if p.dtype != torch.float32), None):
        raise ModelError(f"the module is not in float32: {wrong}", where=name, hint="call .float() on it first")
    training = model.training
    model.eval()
    try:
        config = public_config(json.loads(model.to_json_string()))  # type: ignore[operator]
        unit = known_unit({**config, CLASS: type(model).__name__}, schedule) or "steps"
        # A sampler with interpolated timesteps needs a float input for them, and so do fractions. Most numbers of steps
        # of flow matching have such timesteps, and an export is for all of them.
        whole = deployment.whole and unit == "steps" and not row.float_time and not schedule.flow
        example = example_of(model, size, torch.int64 if whole else torch.float32, sizes, name)
        signature = Signature(
            example.sample,
            example.timestep,
            OUTPUT,
            tuple(example.known.conditions),
            schedule.prediction,
            unit,
            schedule.num_train_timesteps,
            example.known.channel_axis,
            example.known.labels,
        )
        parity = _torch_outputs(model, example, signature)
        with example.patched(model):
            onnx_model, fx_text, unread = _export(example.traceable(model), example)
        note_call(onnx_model, example.fixed_arguments(model))
        _warn_of_unread(unread, name)
        return _Reading(onnx_model, fx_text, config, signature, example, parity, _distinct_bytes(model, unread))
    except MezzotintError:
        raise
    except Exception as error:  # torch raises many kinds of errors for sizes that do not fit each other
        line = (str(error).splitlines() or [""])[0][:300]
        raise ModelError(
            f"torch cannot run or export the model: {type(error).__name__}: {line}",
            where=name,
            hint="check that its configuration belongs to it",
        ) from error
    finally:
        model.train(training)


def _finish(
    reading: _Reading,
    folder: Path,
    fused: Sequence[Mapping[str, Any]],
    *,
    schedule: Schedule,
    deployment: Deployment,
    name: str = "module",
    threads: int | None = None,
) -> Program:
    shape = reading.example.known.shape
    program = finish_import(
        reading.model,
        folder,
        signature=reading.signature,
        schedule=schedule,
        deployment=deployment,
        size=reading.signature.sides(shape),
        channel_axis=reading.signature.channel_axis,
        source={
            "kind": "diffusers",
            "name": name,
            "class": reading.config[CLASS],
            "config": reading.config,
            **({"loras": list(fused)} if fused else {}),
        },
        where=name,
        fx_text=reading.fx_text,
    )
    exported = int(program.source["parameter_bytes"])
    if exported < reading.parameters:
        raise ModelError(f"the export holds {exported} bytes of weights, the module {reading.parameters}", where=name)
    gc.collect()  # the exporter's references to torch's weights are in cycles
    _check_parity(program, folder, reading.parity, reading.example, threads)
    return program


def _distinct_bytes(model: torch.nn.Module, unread: Sequence[str] = ()) -> int:
    """Return the bytes of the parameters that are read, equal ones counted once: the exporter stores them once."""
    sizes: dict[tuple[int, bytes], int] = {}
    for name, parameter in model.named_parameters():
        if name in unread:
            continue
        data = parameter.detach().contiguous().numpy().reshape(-1).view(np.uint8)
        sizes[data.size, hashlib.sha256(data.data).digest()] = data.size
    return sum(sizes.values())


def _warn_of_unread(names: Sequence[str], where: str) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        warnings.warn(
            f"{where}: the exported call does not use the parameters {', '.join(names[:_SHOWN])}{more}; "
            "they are not in the compiled model",
            CompileWarning,
            stacklevel=2,
        )


def _torch_outputs(
    model: torch.nn.Module, example: Example, signature: Signature
) -> dict[int, npt.NDArray[np.float32]]:
    last = signature.num_train_timesteps - 1
    denoiser = example.denoiser(model)
    outputs = {}
    with torch.no_grad():
        for t in sorted({0, last // 2, last}):
            dtype = example.tensors[example.timestep].dtype
            timestep = torch.full((2,), signature.network_time(t), dtype=dtype)
            tensors = {**example.tensors, example.timestep: timestep}
            outputs[t] = denoiser(*tensors.values()).numpy()
    return outputs


def _check_parity(
    program: Program,
    folder: Path,
    parity: Mapping[int, npt.NDArray[np.float32]],
    example: Example,
    threads: int | None,
) -> None:
    signature = program.signature
    sample, image, axis = (
        example.tensors[example.sample].numpy(),
        signature.channels(program.shape),
        signature.channel_axis,
    )
    conditions = {n: example.tensors[n].numpy() for n in signature.conditions if n != EXTRA_CHANNELS}
    whole = sample
    if EXTRA_CHANNELS in signature.conditions:
        sample, conditions[EXTRA_CHANNELS] = np.split(whole, [image], axis)
    with Executor(program.model, folder, threads=threads) as executor:
        for t, want in parity.items():
            outputs = executor.call(signature, sample, t, conditions)
            worst = relative_difference(np.split(want, [image], axis)[0], outputs[OUTPUT])
            if not worst <= PARITY:
                raise ModelError(
                    f"the exported graph disagrees with torch at timestep {t}: relative difference {worst:.1e}, "
                    f"allowed {PARITY:.0e}",
                    hint="report this model's class and configuration",
                )
