"""Bundles inside diffusers pipelines.

    from mezzotint.diffusers import attach

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    attach(pipe, "out/sd")                      # a bundle that was compiled from the same model
    image = pipe("a lighthouse", num_inference_steps=50).images[0]

or, without loading the float network,

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, unet=stand_in("out/sd"))

This works for the pipelines of every network in docs/models.md: Stable Diffusion and SDXL with their img2img and
inpaint variants, Stable Diffusion 3, Flux, PixArt, Sana, Wan and others. The pipeline keeps its scheduler, its text
encoders and its VAE. `pipe.components` passes the stand-in on to other pipelines. A pipeline may be in float16 or
bfloat16: the bundle's inputs are widened, its predictions are rounded, and a warning says so.

The bundle keeps its deployment: its tables have rows for the timesteps of its own number of steps, and the pipeline
must call these timesteps (the same `num_inference_steps`, and a scheduler with the same spacing). If the bundle has
noise tables that were fitted for the pipeline's scheduler, `attach` corrects the scheduler.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.bundle.model_config import CLASS, bundle_config, config_hash, differing_keys
from mezzotint.runtime.bundle.pipeline import PipelineFolder, open_pipeline
from mezzotint.runtime.errors import InputError, ScheduleError

from .prompts.guidance import guidance_of_call, normalizes_guidance

if TYPE_CHECKING:
    from mezzotint.runtime.diffusers.scheduler import Guidance
    from mezzotint.runtime.diffusers.unet import StandIn
    from mezzotint.runtime.engine import Engine

__all__ = ["attach", "correct", "load", "stand_in"]

Pipe = TypeVar("Pipe")
_SHOWN = 6  # differing keys named in an error


def stand_in(bundle: Bundle | str | Path, *, threads: int | None = None, engine: Engine | None = None) -> StandIn:
    """Return a `torch.nn.Module` with the `config` and the call of the original network, computed by the bundle on
    tensors of the CPU: float32, or float16 and bfloat16, which are cast.

    `threads` is the number of the engine's threads, None for OMP_NUM_THREADS or its own choice. `engine` is what
    computes (`mezzotint.find_engine`), None for the one that the bundle is on. Raises InputError for a bundle without
    the configuration of its model, BundleError for one that cannot be opened, EngineError for an engine that cannot
    run it.
    """
    return _adapter().bundle_stand_in(_opened(bundle, engine), threads=threads)  # type: ignore[no-any-return]


def load(
    folder: str | Path | PipelineFolder,
    *,
    threads: int | None = None,
    engine: Engine | None = None,
    correction: bool | None = None,
) -> Any:
    """Return the diffusers pipeline of a folder that `mezzotint compile` wrote from a whole pipeline.

    Its denoiser, text encoders and VAE are computed by onnxruntime; scheduler and tokenizers are those of the folder.
    `threads` and `engine` are those of `stand_in` (`engine` is for the denoiser), `correction` is that of `attach`.
    Raises BundleError for a folder that cannot be opened, InputError where a library or a class of it is missing.
    """
    from .pipeline.load import load_pipeline

    opened = folder if isinstance(folder, PipelineFolder) else open_pipeline(folder)
    pipe = load_pipeline(opened, stand_in(opened.bundle, threads=threads, engine=engine), threads=threads)
    pipe.scheduler = _scheduler(pipe, opened.bundle, correction)
    return pipe


def correct(scheduler: Any, bundle: Bundle | str | Path, *, guidance_scale: Guidance = 1.0) -> Any:
    """Return a scheduler of the same class and configuration that undoes the bundle's quantization noise, see
    runtime/diffusers/scheduler.py.

    `guidance_scale` is the scale of the pipeline's calls (1 is no guidance), or a function that returns it at each
    step. Raises InputError for a bundle without noise tables, and for a scheduler, a schedule or a guidance scale that
    they were not fitted for; ScheduleError for an unknown configuration.
    """
    return _schedulers().corrected_scheduler(scheduler, _opened(bundle), guidance_scale=guidance_scale)


def attach(
    pipe: Pipe,
    bundle: Bundle | str | Path,
    *,
    threads: int | None = None,
    correction: bool | None = None,
    engine: Engine | None = None,
    slot: str | None = None,
) -> Pipe:
    """Replace a pipeline's `unet` or `transformer` by a bundle, in place, and return the pipeline.

    `slot` is the name of the component where a pipeline has several networks of one class: "transformer_2" of Wan 2.2.
    `correction` None corrects the pipeline's scheduler where the bundle has noise tables for it, True requires it
    (InputError or ScheduleError where it is impossible), False leaves the scheduler alone. The corrected scheduler asks
    this pipeline for its guidance scale: attach the bundle again to a pipeline that is made of this one's components.

    Raises InputError, and leaves the pipeline as it was, for a pipeline without such a network, not on the CPU or in
    float64, with a network of another configuration than the bundle's original (compared by
    `runtime.bundle.model_config.config_hash`), or with a scheduler for another prediction or number of timesteps.
    """
    opened = _opened(bundle, engine)
    network = stand_in(opened, threads=threads)
    network.slot = slot or _slot_of(pipe, network)
    _check_network(pipe, network)
    _check_modules(pipe)
    _check_scheduler(pipe, opened)
    scheduler = _scheduler(pipe, opened, correction)
    replaced = getattr(pipe, network.slot)
    if "sample_size" in replaced.config:
        # The default size of an image is the pipeline's own choice (runtime/bundle/model_config.py).
        network.register_to_config(sample_size=replaced.config.sample_size)
    network.take_type(replaced.dtype)
    setattr(pipe, network.slot, network)
    pipe.scheduler = scheduler  # type: ignore[attr-defined]
    return pipe


def _scheduler(pipe: Any, bundle: Bundle, correction: bool | None) -> Any:
    """Return the pipeline's scheduler, corrected where possible; a correction of another bundle is removed."""
    present = pipe.scheduler
    if getattr(present, "bundle", bundle).manifest.digest != bundle.manifest.digest:
        present = type(present).from_config(present.config)
    if correction is False or (correction is None and bundle.correction is None):
        return present
    try:
        guided = "guidance_scale" in inspect.signature(pipe.__call__).parameters
        # Looked up on the class: the property has no value before the first call.
        if guided and not hasattr(type(pipe), "guidance_scale"):
            raise InputError(
                f"a {type(pipe).__name__} has no guidance_scale, which the correction depends on",
                hint="attach with correction=False, and use correct(scheduler, bundle, guidance_scale=...)",
            )
        if bundle.deployment.guided and normalizes_guidance(type(pipe)):
            raise InputError(
                f"the guidance of a {type(pipe).__name__} is not the one that the correction was fitted to",
                hint="attach with correction=False",
            )
        return correct(present, bundle, guidance_scale=lambda: _guidance_of(pipe))
    except (InputError, ScheduleError):
        if correction:
            raise
        return present


def _guidance_of(pipe: Any) -> float:
    """Return the scale of the current run, 1 where the two halves are not combined."""
    if getattr(pipe, "guidance_rescale", 0.0):
        raise InputError("guidance_rescale changes what the correction was fitted to", hint="leave it at 0")
    return guidance_of_call(pipe)


def _slot_of(pipe: object, network: StandIn) -> str:
    """Return the component that the bundle replaces: where its class usually is, else the one of this class."""
    if getattr(pipe, network.slot, None) is not None:
        return network.slot
    components = getattr(pipe, "components", {})
    found = [name for name, module in components.items() if type(module).__name__ == network.original]
    return found[0] if len(found) == 1 else network.slot


def _check_network(pipe: object, network: StandIn) -> None:
    present = getattr(pipe, network.slot, None)
    if present is None:
        names = [name for name, value in getattr(pipe, "components", {}).items() if value is not None]
        raise InputError(
            f"the {type(pipe).__name__} has no {network.slot} to replace: it has {', '.join(names) or 'no components'}",
            where=str(network.bundle.path),
            hint=f"the bundle was made from a {network.original}; where the pipeline is made without one, pass "
            f"from_pretrained(..., {network.slot}=stand_in(bundle))",
        )
    adapter = _adapter()
    if isinstance(present, adapter.StandIn):
        class_name, config = present.original, bundle_config(present.bundle) or {}
    else:
        class_name, config = type(present).__name__, dict(present.config)
    if class_name != network.original:
        raise InputError(
            f"the pipeline's {network.slot} is a {class_name}, the bundle was made from a {network.original}",
            where=str(network.bundle.path),
            hint="compile the pipeline's own network",
        )
    theirs = adapter.completed({**config, CLASS: class_name})
    ours = adapter.completed(bundle_config(network.bundle) or {})
    if config_hash(theirs) == config_hash(ours):
        return
    differing = [
        f"{key} is {one!r}, in the bundle {other!r}" for key, (one, other) in differing_keys(theirs, ours).items()
    ]
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise InputError(
        f"the pipeline's {network.slot} has another configuration: {'; '.join(differing[:_SHOWN])}{more}",
        where=str(network.bundle.path),
        hint="compile the pipeline's own network, or load the pipeline that the bundle was made from",
    )


def _check_modules(pipe: Any) -> None:
    """Raise InputError unless every module of the pipeline computes on the CPU, in float32 or a half."""
    import torch

    usual = (torch.float32, torch.float16, torch.bfloat16)

    for name, module in pipe.components.items():
        parameter = next(module.parameters(), None) if isinstance(module, torch.nn.Module) else None
        if parameter is None:
            continue
        if parameter.dtype not in usual:
            raise InputError(
                f"the pipeline's {name} is in {parameter.dtype}; a bundle takes float32, float16 and bfloat16",
                hint="load the pipeline with torch_dtype=torch.float32, or call pipe.to(torch.float32) first",
            )
        if parameter.device.type != "cpu":
            raise InputError(
                f"the pipeline's {name} lies on {parameter.device}, bundles run on the CPU",
                hint="call pipe.to('cpu') first",
            )


def _check_scheduler(pipe: Any, bundle: Bundle) -> None:
    config = pipe.scheduler.config
    # Pipelines of a network whose velocity runs from noise to image turn it around for the scheduler.
    predicts = bundle.signature.prediction.removeprefix("reversed_")
    here = {"prediction_type": predicts, "num_train_timesteps": bundle.schedule.num_train_timesteps}
    flow = type(pipe.scheduler).__name__.startswith("FlowMatch")
    predicted = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
    there = {"prediction_type": predicted, **_only(config, "num_train_timesteps")}
    for key, value in there.items():
        if value != here[key]:
            raise InputError(
                f"the pipeline's {type(pipe.scheduler).__name__} has {key} {value!r}, the bundle {here[key]!r}",
                where=str(bundle.path),
                hint="use the scheduler that belongs to the model, or one made from_config of that",
            )


def _only(config: Any, key: str) -> dict[str, Any]:
    return {key: config[key]} if key in config else {}


def _opened(bundle: Bundle | str | Path, engine: Engine | None = None) -> Bundle:
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return opened if engine is None else opened.on(engine)


def _adapter() -> Any:
    return _loaded("unet")


def _schedulers() -> Any:
    return _loaded("scheduler")


def _loaded(name: str) -> Any:
    try:
        return importlib.import_module(f"mezzotint.runtime.diffusers.{name}")
    except ModuleNotFoundError as error:
        raise InputError(
            f"pipelines need {error.name}, which is not installed",
            hint="install the extra: pip install 'mezzotint[torch]'",
        ) from error
