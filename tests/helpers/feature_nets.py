"""Feature extractors as users bring them: torch modules by name, and an ONNX file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import torch

FEATURES, CLASSES = 4, 3


class Means(torch.nn.Module):
    """torchmetrics' convention: uint8 [N, 3, H, W] in, the mean of each channel out."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        assert pictures.dtype == torch.uint8 and pictures.shape[1] == 3
        return pictures.double().mean(dim=(2, 3))


class OfFidelity(Means):
    """torch-fidelity's: a tuple with a tensor for each requested feature."""

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return (super().forward(pictures)[:, :, None, None],)


class Weighted(Means):
    """With a weight, which belongs to its digest."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(weight))


def made() -> torch.nn.Module:
    return Weighted(2.0)


def another() -> torch.nn.Module:
    return Weighted(3.0)


INSTANCE = Means()
NO_MODULE = 7


def number() -> int:
    return 7


class TwoOutputs(Means):
    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return super().forward(pictures), super().forward(pictures)


class Spatial(Means):
    """A mapping: all pixels as features, 150 of them, and the picture as a map."""

    features = 150

    def forward(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {"features": pictures.flatten(1)[:, : self.features], "spatial": pictures}


class TooLarge(Spatial):
    features = 63


class OneTooMany(Means):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pictures) + 1, 3)


class Flat(Means):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures).flatten()


class Maps(Means):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return pictures.float()


class Nothing(Means):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return super().forward(pictures) * float("nan")


class WantsFloats(Means):
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("expected Float but found Byte")


def feature_net(path: Path, size: int = 8, logits: bool = True) -> Path:
    """An ONNX network with FEATURES features, and CLASSES logits, of grey pictures."""
    rng = np.random.default_rng(3)
    pixels = size * size
    second_output = f", float[batch,{CLASSES}] logits" if logits else ""
    last = "logits = MatMul (features, v)" if logits else ""
    model = onnx.parser.parse_model(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[batch,1,{size},{size}] x) => (float[batch,{FEATURES}] features{second_output})
    {{
        flat = Flatten <axis = 1> (x)
        features = MatMul (flat, w)
        {last}
    }}""")
    weights = {"w": rng.standard_normal((pixels, FEATURES)) / np.sqrt(pixels)}
    if logits:
        weights["v"] = rng.standard_normal((FEATURES, CLASSES))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in weights.items())
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path
