"""The MODEL argument: an embedded model, a diffusers folder, an ONNX file, or a module in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mezzotint.compiler.errors import ModelError
from mezzotint.compiler.frontend.lora_files import LoraFile
from mezzotint.runtime.bundle.bundle import MANIFEST
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.sampling.schedule import NAMED_SCHEDULES, Schedule, is_named

from .checkpoints import CHECKPOINT, config_folder, missing_model, refuse_pickle

if TYPE_CHECKING:
    import torch

    Model = str | Path | torch.nn.Module

_ASSETS = Path(__file__).parents[1] / "assets"
DIGITS, DIGITS_DIT = _ASSETS / "digits", _ASSETS / "digits-dit"
EMBEDDED = {folder.name: folder for folder in (DIGITS, DIGITS_DIT)}
"""The folders of the models that come with the package, by the names that stand for them."""
SCHEDULER_FILE = "scheduler_config.json"
CONFIG_FILE = "config.json"
MODEL_FILE = "model.onnx"
NETWORKS = ("unet", "transformer")  # the folder of the denoiser in a pipeline's folder


@dataclass(frozen=True, eq=False)
class OnnxSource:
    """An .onnx file, with the diffusers configuration next to it if there is one."""

    kind: ClassVar[str] = "onnx"
    name: str
    schedule: Schedule
    path: Path
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class FolderSource:
    """A diffusers model: the folder with its config.json, and which of its weights are read.

    A `checkpoint` is a file that has the weights instead of the folder.
    """

    kind: ClassVar[str] = "diffusers"
    name: str
    schedule: Schedule
    path: Path
    loras: tuple[LoraFile, ...] = ()
    variant: str | None = None
    checkpoint: Path | None = None


@dataclass(frozen=True, eq=False)
class ModuleSource:
    """A torch module in memory."""

    kind: ClassVar[str] = "module"
    name: str
    schedule: Schedule
    module: torch.nn.Module
    loras: tuple[LoraFile, ...] = ()


ModelSource = OnnxSource | FolderSource | ModuleSource


def resolve(
    model: Model, scheduler: str | Path | Schedule | None = None, config: str | Path | None = None
) -> ModelSource:
    """Return the model's source with its schedule. Raises ModelError or ScheduleError for missing files.

    `config` is a diffusers folder with the configuration of a checkpoint's network.
    """
    if config is not None and not (isinstance(model, (str, Path)) and str(model).lower().endswith(CHECKPOINT)):
        raise ModelError("only a checkpoint of one file takes a configuration", hint="leave --config out")
    if not isinstance(model, (str, Path)):
        return ModuleSource(type(model).__name__, _schedule(scheduler, None, "the module"), model)
    path = embedded_or_path(model)
    name = path.name
    if not path.exists():
        raise missing_model(path)
    if path.is_file():
        refuse_pickle(path)
        if path.suffix.lower() == CHECKPOINT:
            folder = config_folder(path, config)
            return FolderSource(name, _schedule(scheduler, _own_scheduler(folder), str(path)), folder, checkpoint=path)
        return _onnx(name, path, scheduler, str(path))
    if bundle := next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None):
        raise ModelError(
            "this is a bundle: it is compiled already, and does not contain the original weights",
            where=str(bundle),
            hint="compile the original model; `mezzotint inspect` prints its name",
        )
    for folder in (*(path / network for network in NETWORKS), path):
        file = folder / MODEL_FILE
        if file.is_file() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            return _onnx(name, file, scheduler, str(path))
        if (folder / CONFIG_FILE).is_file():
            return FolderSource(name, _schedule(scheduler, _own_scheduler(folder), str(path)), folder)
    raise ModelError(
        "the folder holds neither a diffusers model (config.json) nor an ONNX one (model.onnx)",
        where=str(path),
        hint="a pipeline folder has unet/ (or transformer/) and scheduler/ in it",
    )


def embedded_or_path(model: str | Path) -> Path:
    """Return the folder of an embedded model by its name, else the path."""
    return EMBEDDED.get(str(model), Path(model))


def _onnx(name: str, file: Path, scheduler: str | Path | Schedule | None, where: str) -> OnnxSource:
    schedule = _schedule(scheduler, _own_scheduler(file.parent), where)
    return OnnxSource(name, schedule, file, config=_own_config(file.parent / CONFIG_FILE))


def _own_config(file: Path) -> dict[str, Any] | None:
    """Return the diffusers configuration next to an ONNX file, None for a file of another tool with that name."""
    if not file.is_file():
        return None
    config = read_json(
        file,
        "the configuration next to the model",
        ModelError,
        hint="download it again, or move it away: the graph does not need it",
        infinite=True,
    )
    return config if isinstance(config, dict) and isinstance(config.get(CLASS), str) else None


def _own_scheduler(folder: Path) -> Path | None:
    """Return the scheduler configuration of a model: next to it, or in the pipeline's scheduler folder."""
    candidates = (
        folder / SCHEDULER_FILE,
        folder / "scheduler" / SCHEDULER_FILE,
        folder.parent / "scheduler" / SCHEDULER_FILE,
    )
    return next((c for c in candidates if c.is_file()), None)


def _schedule(requested: str | Path | Schedule | None, own: Path | None, where: str) -> Schedule:
    """Return the requested schedule, or the model's own. Raises ScheduleError where they differ in length."""
    if requested is None:
        if own is None:
            raise ScheduleError(
                "the model comes without a scheduler configuration",
                where=where,
                hint="name the schedule that it was trained with: --scheduler FILE, or one of "
                + f"{', '.join(NAMED_SCHEDULES)} (cosine:60 has 60 timesteps)",
            )
        return Schedule.load(own)
    if isinstance(requested, Schedule):
        chosen = requested
    else:
        chosen = Schedule.named(str(requested)) if is_named(str(requested)) else Schedule.load(requested)
    if own is not None:
        trained = Schedule.load(own)
        if trained.num_train_timesteps != chosen.num_train_timesteps:
            raise ScheduleError(
                f"the scheduler has {chosen.num_train_timesteps} timesteps, the model was trained with "
                f"{trained.num_train_timesteps}",
                where=str(requested),
                hint=f"leave out --scheduler to use the model's own ({own.name})",
            )
    return chosen
