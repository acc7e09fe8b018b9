"""Train the embedded digits model: a small `UNet2DModel` on MNIST, written as a diffusers folder in half precision.

    python tools/train_digits.py --data ../shared/data/mnist -o out/digits --steps 4510

MNIST is padded from 28x28 to 32x32 and scaled to [-1, 1]; the network learns to predict the noise (Ho et al. 2020, the
simple loss) with AdamW, warm-up, cosine decay and gradients clipped to norm 1. What is written are the exponential
averages of the weights.

Everything random in a step (which images, which timesteps, which noise, dropout) is a function of (seed, step). A run
that was stopped and resumed therefore gives the same bytes as one that was not, and there is no random state to save.
Checkpoints are safetensors files: weights, averages and AdamW's two moments; nothing is pickled.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.sampling.schedule import Schedule

ASSET = Path(__file__).resolve().parent.parent / "mezzotint" / "assets" / "digits"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Options:
    """What decides the result. A checkpoint goes on only under the options it was begun with."""

    steps: int
    seed: int = 0
    batch: int = 64
    rate: float = 4e-4  # AdamW's learning rate at its peak
    warmup: int = 200  # steps of linear warm-up (a tenth of the run when that is less)
    ema: float = 0.9985

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not self.rate > 0 or self.seed < 0:
            raise InputError(f"steps, batch and rate are positive, the seed is not negative: {self}")

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then half a cosine down to zero."""
        warmup = max(1, min(self.warmup, self.steps // 10))
        if step < warmup:
            return self.rate * (step + 1) / warmup
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def ema_at(self, step: int) -> float:
        """Decay of the average; low at first, so that the random start is forgotten."""
        return min(self.ema, (1 + step) / (10 + step))


def load_images(data: Path, size: int) -> NDArray[np.uint8]:
    """The images of an npz file (or of the folder that holds `mnist_train.npz`), padded to uint8 [N, size, size]."""
    path = data / "mnist_train.npz" if data.is_dir() else data
    try:
        with np.load(path, allow_pickle=False) as archive:
            images: NDArray[np.uint8] = archive["x"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot read the images: {error}",
            where=str(path),
            hint="--data takes an npz file with `x` uint8 [N, H, W]",
        ) from error
    if images.ndim != 3 or images.dtype != np.uint8 or len(images) == 0 or max(images.shape[1:]) > size:
        raise InputError(
            f"`x` is {images.dtype} {list(images.shape)}, expected uint8 [N, H, W] of at most {size}x{size}",
            where=str(path),
        )
    rest = [size - images.shape[1], size - images.shape[2]]
    return np.pad(images, [(0, 0), *((r // 2, r - r // 2) for r in rest)])


def load_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read a configuration: {error}", where=str(path)) from error
    return config


class Batches:
    """The batch of each step: a function of (seed, step) alone. Epochs are permutations; an epoch's rest is dropped."""

    def __init__(self, images: NDArray[np.uint8], schedule: Schedule, options: Options) -> None:
        if len(images) < options.batch:
            raise InputError(f"{len(images)} images are fewer than one batch of {options.batch}", where="--batch")
        if schedule.prediction != "epsilon":
            raise InputError(f"this tool trains the prediction of noise, not {schedule.prediction!r}", where="--config")
        self.images, self.alphas, self.options = images, schedule.alphas_cumprod, options
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def at(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy images [B, 1, H, W] float32, timesteps [B] int64 and the noise that was added [B, 1, H, W] float32."""
        seed, batch = self.options.seed, self.options.batch
        epoch, position = divmod(step, len(self.images) // batch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([seed, 0, epoch]).permutation(len(self.images))
        chosen = self._order[position * batch : (position + 1) * batch]
        clean = self.images[chosen][:, None].astype(np.float32) / 127.5 - 1
        random = np.random.default_rng([seed, 1, step])
        timesteps = random.integers(0, len(self.alphas), batch)
        noise = random.standard_normal(clean.shape, np.float32)
        signal = self.alphas[timesteps][:, None, None, None]
        noisy = (np.sqrt(signal) * clean + np.sqrt(1 - signal) * noise).astype(np.float32)
        return torch.from_numpy(noisy), torch.from_numpy(timesteps), torch.from_numpy(noise)


class Trainer:
    """The network, its averages and its optimizer, at one step of the run."""

    def __init__(self, config: Mapping[str, Any], options: Options, device: str) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device, self.step = options, device, 0
        self.model = UNet2DModel.from_config(dict(config))
        self.model.to(device).train()
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.rate)
        self.names = [name for name, _ in self.model.named_parameters()]

    def advance(self, noisy: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor) -> float:
        """One step of AdamW on one batch; returns the loss (mean square error of the predicted noise)."""
        torch.manual_seed(self.options.seed * 1_000_003 + self.step)  # dropout, if the configuration has any
        self.optimizer.param_groups[0]["lr"] = self.options.rate_at(self.step)
        predicted = self.model(noisy.to(self.device), timesteps.to(self.device)).sample
        loss = torch.nn.functional.mse_loss(predicted, noise.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = self.options.ema_at(self.step)
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write the checkpoint; the old one stays until the new one is complete."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{moment}.{self.names[index]}": state[moment] for moment in ("exp_avg", "exp_avg_sq")}
        metadata = {"step": str(self.step), "options": json.dumps(asdict(self.options))}
        partial = path.with_suffix(".partial")
        save_file({name: value.contiguous().cpu() for name, value in tensors.items()}, partial, metadata)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint; refuses one that was begun with other options or is another network's."""
        hint = f"delete {path} to start anew"
        try:
            with safe_open(path, framework="pt", device=self.device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise InputError(f"cannot read the checkpoint: {error}", where=str(path), hint=hint) from error
        if json.loads(metadata.get("options", "{}")) != asdict(self.options):
            raise InputError(
                f"the checkpoint was begun with other options: {metadata.get('options')}", where=str(path), hint=hint
            )
        parts: dict[str, dict[str, torch.Tensor]] = {p: {} for p in ("model", "average", "exp_avg", "exp_avg_sq")}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = value
        expected = {name: value.shape for name, value in self.average.items()}
        if {name: value.shape for name, value in parts["average"].items()} != expected:
            raise InputError("the checkpoint belongs to another network", where=str(path), hint=hint)
        self.model.load_state_dict(parts["model"])
        self.average = parts["average"]
        self.step = int(metadata["step"])
        moments = {
            index: {"step": torch.tensor(float(self.step)), **{m: parts[m][name] for m in ("exp_avg", "exp_avg_sq")}}
            for index, name in enumerate(self.names)
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})


def write_model(
    folder: Path, config: Mapping[str, Any], schedule: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    """Write a diffusers pipeline folder with the weights in half precision; the same weights give the same bytes."""
    pipeline = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": config["_diffusers_version"],
        "scheduler": ["diffusers", schedule["_class_name"]],
        "unet": ["diffusers", config["_class_name"]],
    }
    texts = {"model_index.json": pipeline, "unet/config.json": config, "scheduler/scheduler_config.json": schedule}
    for name, value in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    half = {name: value.detach().half().contiguous().cpu() for name, value in weights.items()}
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(save(half, {"format": "pt"}))  # save_file would make it readable for this user only


def train(
    data: Path,
    output: Path,
    options: Options,
    *,
    config_from: Path = ASSET,
    device: str = "auto",
    stop_after: int | None = None,
    save_every: int = 500,
    console: Console | None = None,
) -> list[float]:
    """Train, or go on from the checkpoint in `output`, and write the model there. Returns the losses of this session.

    `stop_after` ends the session after so many steps with a checkpoint and no model: run again to go on.
    """
    config = load_config(config_from / "unet" / "config.json")
    schedule = Schedule.load(config_from / "scheduler")
    batches = Batches(load_images(data, int(config["sample_size"])), schedule, options)
    trainer = Trainer(config, options, pick_device(device))
    checkpoint = output / CHECKPOINT
    if checkpoint.exists():
        trainer.load(checkpoint)
    output.mkdir(parents=True, exist_ok=True)
    last = options.steps if stop_after is None else min(options.steps, trainer.step + stop_after)
    losses: list[float] = []
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress("training", *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=options.steps, completed=trainer.step, loss=float("nan"))
        while trainer.step < last:
            losses.append(trainer.advance(*batches.at(trainer.step)))
            if not math.isfinite(losses[-1]):
                raise MezzotintError(f"the loss became {losses[-1]} at step {trainer.step}", hint="lower --rate")
            progress.update(task, completed=trainer.step, loss=float(np.mean(losses[-50:])))
            if trainer.step % save_every == 0 or trainer.step == last:
                trainer.save(checkpoint)
    if trainer.step == options.steps:
        write_model(output, config, schedule.config, trainer.average)
    return losses


def pick_device(name: str) -> str:
    """`auto` is the GPU where there is one; any other name must be a device of this machine."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch raises either, depending on how it was built
        first = str(error).partition("\n")[0]
        raise InputError(f"torch has no device {name!r}: {first}", hint="use --device auto") from error
    return name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file with `x` uint8 [N, H, W], or its folder")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write; a checkpoint there goes on")
    parser.add_argument("--config", type=Path, default=ASSET, help="diffusers folder whose configuration is trained")
    parser.add_argument("--steps", type=int, default=4510)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=4e-4, help="AdamW's learning rate at its peak")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    parser.add_argument("--stop-after", type=int, help="end this session after so many steps; run again to go on")
    given = parser.parse_args(arguments)
    where = {"config_from": given.config, "device": given.device, "stop_after": given.stop_after}
    console = Console(stderr=True)
    try:
        options = Options(given.steps, given.seed, given.batch, given.rate)
        losses = train(given.data, given.output, options, console=console, **where)
    except MezzotintError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    tail = f", loss {np.mean(losses[-200:]):.4f} over the last {min(200, len(losses))} steps" if losses else ""
    print(f"{given.output}: {len(losses)} steps in this session{tail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
