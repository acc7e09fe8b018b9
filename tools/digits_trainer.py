"""The training of a digits network: AdamW with warm-up, cosine decay and clipped gradients, averages of the weights,
and checkpoints, which are safetensors files: weights, averages and AdamW's two moments; nothing is pickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mezzotint.runtime.errors import InputError


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


def new_network(config: Mapping[str, Any]) -> nn.Module:
    """Return an untrained network of a diffusers configuration, in training mode."""
    model: nn.Module = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    model.train()
    if isinstance(model, diffusers.DiTTransformer2DModel):
        _start_transformer(model)
    return model


def _start_transformer(model: nn.Module) -> None:
    """Begin as Peebles and Xie 2023 do: each block is the identity, the output zero.

    Each block embeds the label for itself and would, while training, drop it for itself too. Batches drops it for all.
    """
    for name, module in model.named_modules():
        if name.endswith("norm1.linear") or name in ("proj_out_1", "proj_out_2"):
            assert isinstance(module, nn.Linear)
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif name.endswith("class_embedder"):
            module.eval()


class Trainer:
    """The network, its averages and its optimizer, at one step of the run."""

    def __init__(self, config: Mapping[str, Any], options: Options, device: str) -> None:
        torch.manual_seed(options.seed)
        self.options, self.device, self.step = options, device, 0
        self.model = new_network(config).to(device)
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.rate)
        self.names = [name for name, _ in self.model.named_parameters()]

    def advance(self, *batch: torch.Tensor) -> float:
        """One step of AdamW on a batch of Batches; returns the loss (mean square error of what is predicted)."""
        torch.manual_seed(self.options.seed * 1_000_003 + self.step)  # dropout, if the configuration has any
        self.optimizer.param_groups[0]["lr"] = self.options.rate_at(self.step)
        *given, wanted = (part.to(self.device) for part in batch)
        loss = nn.functional.mse_loss(self.model(*given).sample, wanted)
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
