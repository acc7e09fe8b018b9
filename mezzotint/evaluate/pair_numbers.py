"""The numbers of a shard's pairs of images, which are a function of those pairs alone, and of all shards together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import PEAK, psnr_db, ssim
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.signature import no_image

from .extractors import Extractor, PerceptualDistance, perceptual_distance
from .metrics import PairNumbers, squares
from .shards import ImagePairs


@dataclass(frozen=True)
class ShardNumbers:
    """The numbers of a shard's pairs, by name, one row for each pair; `failure` is the reason for absent LPIPS."""

    columns: Mapping[str, npt.NDArray[Any]]
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
        if self.extractor is not None:
            columns |= {"exact": self.extractor.features(exact), "quantized": self.extractor.features(quantized)}
            if self.extractor.classify is not None:
                columns["same"] = self.extractor.classify(exact) == self.extractor.classify(quantized)
        return ShardNumbers(columns, failure)


def join_numbers(shards: Sequence[ShardNumbers], measure: PairMeasure, no_features: str) -> PairNumbers:
    """Return the numbers of all shards, in their order. `no_features` is the reason for an absent extractor."""
    latents, extractor = measure.latents or "", measure.extractor
    failure = next((shard.failure for shard in shards if shard.failure), "")
    missing = {"psnr": latents, "ssim": latents, "lpips": failure or measure.no_lpips, "features": no_features}
    missing["agreement"] = no_features if extractor is None else f"{extractor.name} has no classes"
    names = [name for name in shards[0].columns if name != "lpips" or not failure]
    rows = {name: np.concatenate([shard.columns[name] for shard in shards]) for name in names}
    return PairNumbers(
        rows["signal"].T,
        rows["noise"].T,
        rows["sample_signal"],
        rows["sample_noise"],
        rows.get("psnr"),
        rows.get("ssim"),
        rows.get("lpips"),
        (rows["exact"], rows["quantized"]) if extractor is not None else None,
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
