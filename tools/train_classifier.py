"""Train the embedded digits classifier, whose features the Frechet distance of digits is measured in.

    python tools/train_classifier.py --data ../shared/data/mnist -o mezzotint/assets/digits_classifier/model.onnx

Three strided convolutions, 64 features, 10 logits (about 90 000 parameters), trained by AdamW on the cross-entropy with
one cycle of the learning rate. MNIST is padded to 32x32 and scaled to [-1, 1], as the digits model draws it. The layer
of features has no activation function, and a batch normalization without gain: over the training pictures each feature
has mean 0 and variance 1, so that no one of them decides a distance. SiLU is smooth, so that small changes of a picture
are small changes of its features. All normalizations are folded into the layers before them when the graph is written.

The accuracy that is reported is that of the written ONNX file on the test pictures. What is random in a step is a
function of (seed, step): with one torch, on one kind of processor and with one number of threads, a seed gives the same
bytes. Training takes a minute or two and has no checkpoints; the file appears, or is replaced, when it is complete.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn
from torch.nn.utils import fusion

from mezzotint.compiler.frontend.torch_example import quiet_exporter
from mezzotint.frechet import FEATURES, LOGITS, SPATIAL, FeatureNet
from mezzotint.io.files import replacing
from mezzotint.runtime.errors import InputError, MezzotintError
from tools.digits_batches import load_images
from tools.digits_trainer import pick_device

SIZE, CLASSES, WIDTH = 32, 10, 64
OPSET = 21
PARITY = 1e-3  # largest difference of a feature (of variance 1) between torch and onnxruntime
FILES = ("mnist_train.npz", "mnist_test.npz")


@dataclass(frozen=True)
class Options:
    """What decides the result."""

    epochs: int = 4
    seed: int = 0
    batch: int = 128
    rate: float = 4e-3  # AdamW's learning rate at its peak

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 2 or not self.rate > 0 or self.seed < 0:
            raise InputError(f"epochs and rate are positive, a batch is 2 or more, the seed is not negative: {self}")


@dataclass(frozen=True, eq=False)
class Digits:
    """Pictures `[n, 1, 32, 32]` float32 in [-1, 1] by index, and their labels `[n]` int64."""

    bytes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]

    @classmethod
    def load(cls, path: Path) -> Digits:
        """From an npz file with `x` uint8 [N, H, W] and `y` [N], 0 to 9. Raises InputError."""
        images = load_images(path, SIZE)
        try:
            with np.load(path, allow_pickle=False) as archive:
                labels: npt.NDArray[np.generic] = archive["y"]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"cannot read the labels: {error}", where=str(path)) from error
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            raise InputError(
                f"`y` is {labels.dtype} {list(labels.shape)}, expected integers [{len(images)}]", where=str(path)
            )
        found = labels.astype(np.int64)
        if found.min() < 0 or found.max() >= CLASSES:
            raise InputError(f"labels go from {found.min()} to {found.max()}, expected 0 to 9", where=str(path))
        return cls(images, found)

    def __len__(self) -> int:
        return len(self.bytes)

    def images(self, chosen: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.float32]:
        return self.bytes[chosen][:, None].astype(np.float32) / np.float32(127.5) - np.float32(1)


class Classifier(nn.Module):
    """Pictures `[batch, 1, 32, 32]` to (features `[batch, 64]`, logits `[batch, 10]`, maps `[batch, 32, 8, 8]`)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 16, 32, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 5 if a == 1 else 3, stride=2, padding=2 if a == 1 else 1) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.features = nn.Linear(sizes[-1] * (SIZE // 8) ** 2, WIDTH)
        self.standard = nn.BatchNorm1d(WIDTH, affine=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, maps = images, []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.functional.silu(norm(convolution(x)))
            maps.append(x)
        x = nn.functional.dropout(x.flatten(1), 0.25, self.training)
        features = self.standard(self.features(x))
        return features, self.head(nn.functional.silu(features)), maps[1]

    def folded(self) -> Classifier:
        """The same function for inference, without normalizations."""
        other = Classifier().eval()
        other.load_state_dict({name: value.cpu() for name, value in self.state_dict().items()})
        for i, (convolution, norm) in enumerate(zip(other.convolutions, other.norms, strict=True)):
            assert isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
            other.convolutions[i] = fusion.fuse_conv_bn_eval(convolution, norm)
            other.norms[i] = nn.Identity()
        other.features = _fold_standard(other.features, other.standard)
        other.standard = nn.Identity()  # type: ignore[assignment]
        return other


def _fold_standard(layer: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    assert norm.running_mean is not None and norm.running_var is not None
    gain = (norm.running_var + norm.eps).rsqrt()
    folded = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        folded.weight.copy_(layer.weight * gain[:, None])
        folded.bias.copy_((layer.bias - norm.running_mean) * gain)
    return folded


def fit(digits: Digits, options: Options, device: str, console: Console | None = None) -> Classifier:
    """A trained network, in eval mode. Raises InputError and MezzotintError."""
    steps = len(digits) // options.batch  # of an epoch, whose rest is dropped
    if steps == 0:
        raise InputError(f"{len(digits)} images are fewer than one batch of {options.batch}", where="--batch")
    torch.manual_seed(options.seed)
    model = Classifier().to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.05)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.rate, total_steps=options.epochs * steps)
    order = np.zeros(0, np.int64)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress("training", *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("training", total=options.epochs * steps, loss=float("nan"))
        for step in range(options.epochs * steps):
            epoch, position = divmod(step, steps)
            if position == 0:
                order = np.random.default_rng([options.seed, epoch]).permutation(len(digits))
            chosen = order[position * options.batch : (position + 1) * options.batch]
            torch.manual_seed(options.seed * 1_000_003 + step)  # dropout
            _, logits, _ = model(torch.from_numpy(digits.images(chosen)).to(device))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(digits.labels[chosen]).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            cycle.step()
            if not math.isfinite(value := float(loss.detach())):
                raise MezzotintError(f"the loss became {value} at step {step}", hint="lower --rate")
            progress.update(task, advance=1, loss=value)
    standardize(model, digits, device)
    return model.eval()


def standardize(model: Classifier, digits: Digits, device: str) -> None:
    """Give the features mean 0 and variance 1 over the pictures: training's running averages lag behind the weights,
    and saw dropout."""
    model.eval()
    model.standard.train()
    model.standard.reset_running_stats()
    model.standard.momentum = None  # the plain average of all batches
    with torch.no_grad():
        for chosen in np.array_split(np.arange(len(digits)), -(-len(digits) // 500)):
            model(torch.from_numpy(digits.images(chosen)).to(device))


def export(model: Classifier) -> bytes:
    """The ONNX file of a network: the same weights give the same bytes, and nothing in them names this machine."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    example = torch.zeros(2, 1, SIZE, SIZE)
    with quiet_exporter():
        program = torch.onnx.export(
            model.folded(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=["images"],
            output_names=[FEATURES, LOGITS, SPATIAL],
            dynamic_shapes=({0: batch},),
        )
    assert program is not None
    cleared = ClearMetadataAndDocStringPass()(program.model).model
    for value in (*cleared.graph.inputs, *cleared.graph.outputs):
        value.metadata_props.clear()
    data: bytes = ir.to_proto(cleared).SerializeToString(deterministic=True)
    return data


def check(path: Path, model: Classifier, digits: Digits) -> float:
    """The accuracy of a written file on pictures. Raises MezzotintError where it computes other features than torch."""
    net = FeatureNet(path)
    images = digits.images(slice(200))
    with torch.no_grad():
        wanted = model.folded()(torch.from_numpy(images))[0].numpy()
    worst = float(np.abs(net.features(images) - wanted).max())
    if not worst <= PARITY:
        raise MezzotintError(f"the written features are {worst:.1e} away from torch's, allowed {PARITY:.0e}")
    right = 0
    for first in range(0, len(digits), 1000):
        part = slice(first, first + 1000)
        right += int((net.classify(digits.images(part)) == digits.labels[part]).sum())
    return right / len(digits)


def train(
    data: Path, output: Path, options: Options, *, device: str = "auto", console: Console | None = None
) -> tuple[float, Classifier]:
    """Train on the folder's training pictures and write the ONNX file; (its accuracy on the test pictures, the model).

    A file that exists is replaced when all is well. Raises InputError, OutputError and MezzotintError.
    """
    if output.suffix != ".onnx" or output.is_dir():
        raise InputError("the output is no .onnx file", where=str(output))
    digits, test = (Digits.load(data / name) for name in FILES)
    model = fit(digits, options, pick_device(device), console)
    with replacing(output) as part:
        part.write_bytes(export(model))
        accuracy = check(part, model, test)
    return accuracy, model


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {' and '.join(FILES)}: `x`, `y`")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .onnx file to write")
    parser.add_argument("--epochs", type=int, default=Options.epochs)
    parser.add_argument("--batch", type=int, default=Options.batch)
    parser.add_argument("--rate", type=float, default=Options.rate, help="AdamW's learning rate at its peak")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    try:
        options = Options(given.epochs, given.seed, given.batch, given.rate)
        accuracy, model = train(given.data, given.output, options, device=given.device, console=console)
    except MezzotintError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    parameters = sum(value.numel() for value in model.folded().parameters())
    size = given.output.stat().st_size
    print(f"{given.output}: accuracy {accuracy:.4f} on the test pictures, {parameters} parameters, {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
