"""What a MODEL argument means: the embedded model, a diffusers folder, an ONNX file, a module in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mezzotint.compiler.errors import ModelError
from mezzotint.runtime.bundle.bundle import MANIFEST
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.errors import ScheduleError
from mezzotint.runtime.sampling.schedule import NAMED, Schedule

if TYPE_CHECKING:
    import torch

DIGITS = Path(__file__).parents[1] / "assets" / "digits"
SCHEDULER_FILE = "scheduler_config.json"
CONFIG_FILE = "config.json"
MODEL_FILE = "model.onnx"
NETWORKS = ("unet", "transformer")  # what a pipeline's folder calls its denoiser


@dataclass(frozen=True, eq=False)
class Source:
    """Where a model comes from. `path` is the .onnx file or the folder with config.json; None for a module.

    `config` is the diffusers configuration that lies beside an .onnx file, where one does.
    """

    kind: Literal["onnx", "diffusers", "module"]
    name: str
    path: Path | None
    schedule: Schedule
    module: torch.nn.Module | None = None
    config: Mapping[str, Any] | None = None


def resolve(model: str | Path | torch.nn.Module, scheduler: str | Path | Schedule | None = None) -> Source:
    """Find the model and its scheduler. Raises ModelError or ScheduleError that says what is missing and where."""
    if not isinstance(model, (str, Path)):
        return Source("module", type(model).__name__, None, _schedule(scheduler, None, "the module"), model)
    path = DIGITS if str(model) == "digits" else Path(model)
    name = "digits" if path == DIGITS else path.name
    if not path.exists():
        raise ModelError(
            "there is no such model", where=str(path), hint="give `digits`, a diffusers folder, or an .onnx file"
        )
    if path.is_file():
        return _onnx(name, path, scheduler, str(path))
    if bundle := next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None):
        raise ModelError(
            "this is a bundle: it is compiled already, and the weights it was made from are not in it",
            where=str(bundle),
            hint="compile the model it was made from; `mezzotint inspect` says which one that was",
        )
    for folder in (*(path / network for network in NETWORKS), path):
        file = folder / MODEL_FILE
        if file.is_file() and not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
            return _onnx(name, file, scheduler, str(path))
        if (folder / CONFIG_FILE).is_file():
            return Source("diffusers", name, folder, _schedule(scheduler, _own_scheduler(folder), str(path)))
    raise ModelError(
        "the folder holds neither a diffusers model (config.json) nor an ONNX one (model.onnx)",
        where=str(path),
        hint="a pipeline folder has unet/ (or transformer/) and scheduler/ in it",
    )


def _onnx(name: str, file: Path, scheduler: str | Path | Schedule | None, where: str) -> Source:
    schedule = _schedule(scheduler, _own_scheduler(file.parent), where)
    return Source("onnx", name, file, schedule, config=_own_config(file.parent / CONFIG_FILE))


def _own_config(file: Path) -> dict[str, Any] | None:
    """The configuration beside an ONNX file; others than diffusers write files of that name too."""
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the configuration beside the model is not readable JSON: {error}",
            where=str(file),
            hint="download it again, or move it away: the graph does not need it",
        ) from error
    return config if isinstance(config, dict) and isinstance(config.get(CLASS), str) else None


def _own_scheduler(folder: Path) -> Path | None:
    """The scheduler configuration that belongs to a model: beside it, or in the pipeline's scheduler folder."""
    candidates = (
        folder / SCHEDULER_FILE,
        folder / "scheduler" / SCHEDULER_FILE,
        folder.parent / "scheduler" / SCHEDULER_FILE,
    )
    return next((c for c in candidates if c.is_file()), None)


def _schedule(wish: str | Path | Schedule | None, own: Path | None, where: str) -> Schedule:
    if wish is None:
        if own is None:
            raise ScheduleError(
                "the model comes without a scheduler configuration",
                where=where,
                hint=f"say which schedule it was trained with: --scheduler FILE, or one of {', '.join(NAMED)}",
            )
        return Schedule.load(own)
    if isinstance(wish, Schedule):
        chosen = wish
    else:
        chosen = Schedule.named(str(wish)) if str(wish) in NAMED else Schedule.load(wish)
    if own is not None:
        trained = Schedule.load(own)
        if trained.num_train_timesteps != chosen.num_train_timesteps:
            raise ScheduleError(
                f"the scheduler has {chosen.num_train_timesteps} timesteps, the model was trained with "
                f"{trained.num_train_timesteps}",
                where=str(wish),
                hint=f"leave out --scheduler to use the model's own ({own.name})",
            )
    return chosen
