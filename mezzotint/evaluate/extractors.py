"""Networks that compute features of images, by name or by path, for distances between sets of images.

    digits                   the embedded classifier of 1x32x32 digits: 64 features, ten classes
    FILE.onnx                one input, float32 images as sampled; an output `features`, and `logits` or `spatial` maps
    inception                torch-fidelity's InceptionV3, 2048 features and 1008 logits: the usual network of FID
    package.module:attribute a torch.nn.Module, or a class or function that returns one without arguments
    none                     no features

A module follows the convention of torchmetrics' custom extractors and of torch-fidelity: it is called with uint8 images
[N, 3, H, W] from 0 to 255 and returns features [N, D], or a tuple of one such tensor, as torch-fidelity's
FeatureExtractorBase does for one requested feature, or a mapping of tensors by the names that outputs of an ONNX file
have. Images from -1 to 1 are rounded to 0..255, and grey ones repeated to three channels. The module must resize them
itself. Naming a module runs its code.

LPIPS (Zhang et al. 2018, arXiv 1801.03924) is taken from `lpips`, or from torchmetrics with torchvision, on AlexNet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from inspect import isbuiltin
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import Images, no_image

from ..frechet import CLASSIFIER, FEATURES, LOGITS, SPATIAL, FeatureNet, Features
from ..io.images import to_pixels

if TYPE_CHECKING:
    import torch

DIGITS, INCEPTION, NONE = "digits", "inception", "none"
DIGITS_SHAPE = (1, 32, 32)
TORCH_BATCH = 32  # images in one call of a torch module
PerceptualDistance = Callable[[Images, Images], npt.NDArray[np.float64]]


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What a network computes of n images: features `[n, D]`, logits `[n, K]`, and flat spatial features `[n, S]`.

    Spatial features keep the places: they are the first channels of an inner map, as many as have no more numbers than
    there are features (sFID, Nash et al. 2021, arXiv 2103.03841, has 7 x 17 x 17 of Inception's beside 2048).
    """

    features: Features
    logits: Features | None = None
    spatial: Features | None = None


@dataclass(frozen=True)
class Extractor:
    """`measure` turns images float32 `[n, C, H, W]` in [-1, 1] into features. Those of one `digest` can be compared."""

    name: str
    digest: str
    measure: Callable[[Images], ImageFeatures]


def open_extractor(name: str, shape: tuple[int, ...], threads: int | None = None) -> Extractor:
    """Return the extractor of this name, after a call with a blank image of `shape` (C, H, W). Raises InputError."""
    if name == DIGITS or name.endswith(".onnx"):
        extractor = _onnx(name, threads)
    elif name == INCEPTION:
        extractor = _torch(name, _inception(), (FEATURES, LOGITS))
    elif ":" in name:
        extractor = _torch(name, _module(name))
    else:
        raise InputError(
            f"no feature extractor is called {name!r}",
            where="--features",
            hint="give digits, inception, none, FILE.onnx, or package.module:attribute",
        )
    if (reason := no_image(shape)) is not None:
        raise InputError(
            f"{reason}, which {name} needs",
            where="--features",
            hint="leave --features out: latents would have to be decoded first",
        )
    extractor.measure(np.zeros((2, *shape), np.float32))
    return extractor


def default_extractor(shape: tuple[int, ...]) -> tuple[str, str]:
    """Return (the name of the default extractor, the reason when it is `none`)."""
    if shape == DIGITS_SHAPE:
        return DIGITS, ""
    size = "x".join(map(str, shape))
    return NONE, f"no --features were given, and the embedded network is for 1x32x32 images, not {size}"


def _onnx(name: str, threads: int | None) -> Extractor:
    net = FeatureNet(CLASSIFIER if name == DIGITS else Path(name), threads=threads)
    return Extractor(name, net.digest, lambda images: _features_of(net.measure(images), name))


def _features_of(outputs: Mapping[str, npt.NDArray[Any]], name: str) -> ImageFeatures:
    """Return what a network's outputs are, by their names."""
    features, maps = outputs[FEATURES], outputs.get(SPATIAL)
    if maps is None:
        return ImageFeatures(features, outputs.get(LOGITS))
    channels = features.shape[1] // (maps.shape[2] * maps.shape[3])
    if not channels:
        sizes = "x".join(map(str, maps.shape[2:]))
        raise InputError(
            f"the extractor's spatial maps of {sizes} have more numbers than its {features.shape[1]} features",
            where=name,
            hint="give smaller maps",
        )
    return ImageFeatures(features, outputs.get(LOGITS), maps[:, :channels].reshape(len(maps), -1))


def _inception() -> torch.nn.Module:
    if find_spec("torch_fidelity") is None:
        raise InputError(
            "inception is torch-fidelity's, which is not installed",
            where="--features inception",
            hint="pip install torch-fidelity (it downloads the weights at the first use), or name other features",
        )
    try:
        network = import_module("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
        return network("inception-v3-compat", ["2048", "logits_unbiased"])  # type: ignore[no-any-return]
    except Exception as error:  # its weights are downloaded, which can fail in many ways
        raise InputError(
            f"inception cannot be made: {type(error).__name__}: {error}",
            where="--features inception",
            hint="torch-fidelity downloads its weights at the first use: check the network and the free space",
        ) from error


def _module(name: str) -> torch.nn.Module:
    """Import the object that `package.module:attribute` names, and call it when it is no module."""
    import torch

    place, _, attribute = name.partition(":")
    try:
        module: Any = import_module(place)
        for part in attribute.split("."):
            module = getattr(module, part)
        if not isinstance(module, torch.nn.Module) and callable(module) and not isbuiltin(module):
            module = module()
    except (Exception, SystemExit) as error:  # third-party code
        raise InputError(
            f"{name} cannot be made: {type(error).__name__}: {error}",
            where="--features",
            hint="install it, or put its folder into PYTHONPATH; a class or function is called without arguments",
        ) from error
    if not isinstance(module, torch.nn.Module):
        raise InputError(
            f"{name} is {type(module).__name__}, not a torch.nn.Module",
            where="--features",
            hint="name a module, or a class or function that returns one without arguments",
        )
    return module


def _torch(name: str, module: torch.nn.Module, outputs: tuple[str, ...] = (FEATURES,)) -> Extractor:
    """Return the extractor of a module; `outputs` are the names of the tensors of a tuple."""
    module = module.eval()
    digest = hashlib.sha256(f"{type(module).__module__}.{type(module).__qualname__}".encode())
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return Extractor(name, digest.hexdigest(), lambda images: _features_of(_run(name, module, images, outputs), name))


def _run(name: str, module: torch.nn.Module, images: Images, names: tuple[str, ...]) -> dict[str, Features]:
    import torch

    pixels = to_pixels(images).transpose(0, 3, 1, 2)
    found: dict[str, list[Features]] = {}
    for first in range(0, len(pixels), TORCH_BATCH):
        part = pixels[first : first + TORCH_BATCH]
        part = np.ascontiguousarray(np.repeat(part, 3, axis=1) if part.shape[1] == 1 else part)
        try:
            with torch.no_grad():
                output = module(torch.from_numpy(part))
        except Exception as error:  # third-party code
            raise _refused(name, f"refused uint8 images {list(part.shape)}: {error}") from error
        for key, tensor in _named(name, output, names).items():
            found.setdefault(key, []).append(_rows_of(name, key, tensor, len(part)))
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _named(name: str, output: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
    """Return a module's answer by the names of outputs."""
    if isinstance(output, Mapping) and FEATURES in output and output.keys() <= {FEATURES, LOGITS, SPATIAL}:
        return output
    tensors = tuple(output) if isinstance(output, (tuple, list)) else (output,)
    if len(tensors) != len(names):
        raise _refused(name, f"returns {type(output).__name__}, expected one tensor [N, D]")
    return dict(zip(names, tensors, strict=True))


def _rows_of(name: str, key: str, tensor: Any, count: int) -> Features:
    """Return an output of so many images as float32, `[n, D]` or maps `[n, C, H, W]`. Raises InputError."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise _refused(name, f"returns {type(tensor).__name__}, expected one tensor [N, D]")
    rows = tensor.detach().cpu().float().numpy()
    flat = rows.ndim >= 2 and all(size == 1 for size in rows.shape[2:])
    if not (rows.ndim == 4 if key == SPATIAL else flat) or len(rows) != count:
        expected = "maps [N, C, H, W]" if key == SPATIAL else "[N, D]"
        raise _refused(name, f"returns {list(rows.shape)} for {count} images, expected {expected}")
    if not np.isfinite(rows).all():
        raise _refused(name, f"returns {key} that are not finite")
    return rows if key == SPATIAL else rows.reshape(count, -1)


def _refused(name: str, what: str) -> InputError:
    hint = "the convention is uint8 [N, 3, H, W] in, float [N, D] out, as torchmetrics has it"
    return InputError(f"the extractor {what}", where=name, hint=hint)


def perceptual_distance() -> tuple[PerceptualDistance | None, str]:
    """Return (LPIPS of each pair of images `[n, C, H, W]` in [-1, 1], or None; the reason for None)."""
    package = next((name for name in ("lpips", "torchmetrics") if find_spec(name) is not None), None)
    if package is None or find_spec("torch") is None:
        return None, "neither lpips nor torchmetrics is installed"
    try:
        if package == "lpips":
            net = import_module("lpips").LPIPS(net="alex", verbose=False).eval()
        else:
            place = import_module("torchmetrics.image.lpip")
            net = place.LearnedPerceptualImagePatchSimilarity(net_type="alex").eval()
    except Exception as error:  # both download weights
        return None, f"{package} is installed and cannot be used: {error}"

    def distance(one: Images, other: Images) -> npt.NDArray[np.float64]:
        import torch

        def colour(image: Images) -> torch.Tensor:
            part = np.clip(image, -1, 1)
            return torch.from_numpy(np.ascontiguousarray(np.repeat(part, 3, axis=1) if part.shape[1] == 1 else part))

        with torch.no_grad():  # one by one: torchmetrics returns the mean over a batch
            pairs = [(one[i : i + 1], other[i : i + 1]) for i in range(len(one))]
            return np.array([float(net(colour(a), colour(b))) for a, b in pairs], np.float64)

    return distance, ""
