"""Train the embedded digits models on MNIST, written as diffusers folders in half precision.

    python tools/train_digits.py --data ../shared/data/mnist -o out/digits --steps 4510
    python tools/train_digits.py --data ../shared/data/mnist -o out/digits-dit --config mezzotint/assets/digits-dit

MNIST is padded from 28x28 to 32x32 and scaled to [-1, 1]. The configuration says what is trained: a `UNet2DModel` that
predicts the noise, or a `DiTTransformer2DModel` with class labels that predicts the velocity of flow matching
(`digits_batches.py`). AdamW, warm-up, cosine decay, gradients clipped to norm 1 (`digits_trainer.py`). What is written
are the exponential averages of the weights.

Everything random in a step (which images, which timesteps, which noise, dropout) is a function of (seed, step). A run
that was stopped and resumed therefore gives the same bytes as one that was not, and there is no random state to save.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save

from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.sampling.schedule import Schedule
from tools.digits_batches import Batches, load_images, load_labels
from tools.digits_trainer import Options, Trainer, pick_device

ASSET = Path(__file__).resolve().parent.parent / "mezzotint" / "assets" / "digits"
CHECKPOINT = "checkpoint.safetensors"
PARTS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}


def load_config(folder: Path) -> dict[str, Any]:
    """The configuration of the network in a diffusers folder. Raises InputError."""
    path = next((path for part in PARTS.values() if (path := folder / part / "config.json").is_file()), folder)
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read a configuration: {error}", where=str(path)) from error
    if config.get("_class_name") not in PARTS:
        known = " and ".join(PARTS)
        raise InputError(f"this tool trains {known}, not {config.get('_class_name')!r}", where=str(path))
    return config


def write_model(
    folder: Path, config: Mapping[str, Any], schedule: Mapping[str, Any], weights: Mapping[str, torch.Tensor]
) -> None:
    """Write a diffusers folder with the weights in half precision; the same weights give the same bytes.

    That of a U-Net is a pipeline. No pipeline of diffusers draws images with a transformer and without a VAE.
    """
    part = PARTS[config["_class_name"]]
    texts: dict[str, Mapping[str, Any]] = {f"{part}/config.json": config, "scheduler/scheduler_config.json": schedule}
    if part == "unet":
        texts["model_index.json"] = {
            "_class_name": "DDPMPipeline",
            "_diffusers_version": config["_diffusers_version"],
            "scheduler": ["diffusers", schedule["_class_name"]],
            "unet": ["diffusers", config["_class_name"]],
        }
    for name, value in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    half = {name: value.detach().half().contiguous().cpu() for name, value in weights.items()}
    file = folder / part / "diffusion_pytorch_model.safetensors"
    file.write_bytes(save(half, {"format": "pt"}))  # save_file would make it readable for this user only


def train(
    data: Path,
    output: Path,
    options: Options,
    *,
    config_from: Path = ASSET,
    device: str = "auto",
    stop_after: int | None = None,
    save_every: int = 200,
    console: Console | None = None,
) -> list[float]:
    """Train, or go on from the checkpoint in `output`, and write the model there. Returns the losses of this session.

    `stop_after` ends the session after so many steps with a checkpoint and no model: run again to go on.
    """
    config = load_config(config_from)
    schedule = Schedule.load(config_from / "scheduler")
    images = load_images(data, int(config["sample_size"]))
    labels = load_labels(data, len(images)) if "num_embeds_ada_norm" in config else None
    batches = Batches(images, schedule, seed=options.seed, batch=options.batch, labels=labels)
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
