"""The numbers of a shard's pairs of images, which are a function of those pairs alone, and of all shards together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import PEAK, psnr_db, ssim
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import no_image

from .extractors import Extractor, ImageFeatures, PerceptualDistance, perceptual_distance
from .feature_sums import FeatureSums
from .metrics import PairNumbers, squares
from .shards import ImagePairs


@dataclass(frozen=True)
class ShardNumbers:
    """The numbers of a shard's pairs, by name, one row for each pair, and the features of its float and other images.

    `failure` is the reason for absent LPIPS.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    features: tuple[ImageFeatures, ImageFeatures] | None
    failure: str = ""


class PairMeasure:
    """What is measured of pairs of images of one shape, `[C, H, W]`."""

    def __init__(self, shape: tuple[int, ...], extractor: Extractor | None) -> None:
        self.latents = no_image(shape)
        self.extractor = extractor
        self._lpips: PerceptualDistance | None = None
        self.no_lpips = self.latents or ""
        if self.latents is None:
            self._lpips, self.no_lpips = perceptual_distance()

    def numbers(self, bundle: Bundle, pairs: ImagePairs) -> ShardNumbers:
        """Return the numbers of pairs that `bundle` made. Raises InputError for images that are not finite."""
        _check_finite(bundle, pairs)
        sample_signal, sample_noise = squares(pairs.exact, pairs.quantized)
        columns: dict[str, npt.NDArray[Any]] = {"signal": pairs.signal.T, "noise": pairs.noise.T}
        columns |= {"sample_signal": sample_signal, "sample_noise": sample_noise}
        exact, quantized = (np.clip(images, -1, 1) for images in (pairs.exact, pairs.quantized))
        if self.latents is None:
            columns["psnr"] = psnr_db(exact, quantized, PEAK)
            columns["ssim"] = ssim(exact + 1, quantized + 1, PEAK)
        failure = ""
        if self._lpips is not None and not self.no_lpips:
            try:
                columns["lpips"] = self._lpips(exact, quantized)
            except Exception as error:  # a third-party network: it may refuse small images
                self._lpips, failure = None, f"LPIPS failed: {error}"
        features = None
        if self.extractor is not None:
            one, other = features = self.extractor.measure(exact), self.extractor.measure(quantized)
            if one.logits is not None and other.logits is not None:
                columns["same"] = one.logits.argmax(axis=1) == other.logits.argmax(axis=1)
        return ShardNumbers(columns, features, failure)


class PairTotals:
    """The numbers of the shards of n pairs, which come in their order. `no_features` is the reason for no extractor."""

    def __init__(self, n: int, measure: PairMeasure, no_features: str, resamples: int) -> None:
        self._measure, self._no_features = measure, no_features
        self._columns: dict[str, list[npt.NDArray[Any]]] = {}
        self._features = None if measure.extractor is None else FeatureSums(n, resamples)
        self._failure = ""

    def add(self, shard: ShardNumbers) -> None:
        """Add the next shard."""
        for name, values in shard.columns.items():
            self._columns.setdefault(name, []).append(values)
        self._failure = self._failure or shard.failure
        if self._features is not None and shard.features is not None:
            self._features.add(*shard.features)

    def numbers(self) -> PairNumbers:
        """Return the numbers of all pairs."""
        latents, extractor = self._measure.latents or "", self._measure.extractor
        missing = {"psnr": latents, "ssim": latents, "lpips": self._failure or self._measure.no_lpips}
        missing["features"] = self._no_features
        missing["agreement"] = self._no_features if extractor is None else f"{extractor.name} has no classes"
        missing["spatial"] = self._no_features if extractor is None else f"{extractor.name} has no spatial features"
        names = [name for name in self._columns if name != "lpips" or not self._failure]
        rows = {name: np.concatenate(self._columns[name]) for name in names}
        return PairNumbers(
            rows["signal"].T,
            rows["noise"].T,
            rows["sample_signal"],
            rows["sample_noise"],
            rows.get("psnr"),
            rows.get("ssim"),
            rows.get("lpips"),
            self._features,
            rows.get("same"),
            missing,
        )


def _check_finite(bundle: Bundle, pairs: ImagePairs) -> None:
    """Raise InputError when a network produced NaN or infinite values."""
    for network, images in (("the float model", pairs.exact), ("the bundle", pairs.quantized)):
        if not np.isfinite(images).all():
            raise InputError(
                f"{network} makes images that are not finite",
                where=str(bundle.path),
                hint="`mezzotint debug` measures at every layer where the bundle departs from the float model",
            )
