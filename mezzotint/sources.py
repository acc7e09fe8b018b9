"""What a MODEL argument means: the embedded model, a diffusers folder, an ONNX file, a module in memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .compiler.errors import ModelError
from .runtime.errors import ScheduleError
from .runtime.schedule import NAMED, Schedule

if TYPE_CHECKING:
    import torch

DIGITS = Path(__file__).parent / "assets" / "digits"
SCHEDULER_FILE = "scheduler_config.json"


@dataclass(frozen=True, eq=False)
class Source:
    """Where a model comes from. `path` is the .onnx file or the folder with config.json; None for a module."""

    kind: Literal["onnx", "diffusers", "module"]
    name: str
    path: Path | None
    schedule: Schedule
    module: torch.nn.Module | None = None


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
        own = _own_scheduler(path.parent)
        return Source("onnx", name, path, _schedule(scheduler, own, str(path)))
    for folder in (path / "unet", path):
        if (folder / "config.json").is_file():
            return Source("diffusers", name, folder, _schedule(scheduler, _own_scheduler(folder), str(path)))
        if (folder / "model.onnx").is_file():
            file = folder / "model.onnx"
            return Source("onnx", name, file, _schedule(scheduler, _own_scheduler(folder), str(path)))
    raise ModelError(
        "the folder holds neither a diffusers model (config.json) nor an ONNX one (model.onnx)",
        where=str(path),
        hint="a pipeline folder has unet/ and scheduler/ in it",
    )


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
