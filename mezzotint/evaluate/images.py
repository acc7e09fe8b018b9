"""Step 2 of an evaluation: all pairs of images, sampled or read from the folder, and the numbers of every pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import PEAK, psnr_db, ssim
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.signature import no_image

from ..shards.run import Run
from .extractors import Extractor, perceptual_distance
from .metrics import PairNumbers, squares
from .shards import ImagePairs, PairSampler, PairShard


def measure_images(
    sampler: PairSampler, run: Run, extractor: Extractor | None, no_features: str, *, keep: bool, progress: Progress
) -> PairNumbers:
    """Return the numbers of every pair of a run. With `keep` its shards are read from its folder and written there.

    `no_features` is the reason for an absent extractor. Raises InputError for images that are not finite, OutputError.
    """
    latents = no_image(run.settings["sample_shape"])
    are_images = latents is None
    lpips, no_lpips = perceptual_distance() if are_images else (None, latents or "")
    missing = {"psnr": latents or "", "ssim": latents or "", "lpips": no_lpips, "features": no_features}
    missing["agreement"] = no_features if extractor is None else f"{extractor.name} has no classes"
    columns: dict[str, list[npt.NDArray[Any]]] = {}

    def add(name: str, numbers: npt.NDArray[Any]) -> None:
        columns.setdefault(name, []).append(numbers)

    for pairs in _shards(sampler, run, keep, progress):
        _check_finite(sampler.bundle, pairs)
        sample_signal, sample_noise = squares(pairs.exact, pairs.quantized)
        add("signal", pairs.signal.T)
        add("noise", pairs.noise.T)
        add("sample_signal", sample_signal)
        add("sample_noise", sample_noise)
        exact, quantized = (np.clip(images, -1, 1) for images in (pairs.exact, pairs.quantized))
        if are_images:
            add("psnr", psnr_db(exact, quantized, PEAK))
            add("ssim", ssim(exact + 1, quantized + 1, PEAK))
        if lpips is not None and not no_lpips:
            try:
                add("lpips", lpips(exact, quantized))
            except Exception as error:  # a third-party network: it may refuse small images
                lpips, missing["lpips"] = None, f"LPIPS failed: {error}"
        if extractor is not None:
            add("exact", extractor.features(exact))
            add("quantized", extractor.features(quantized))
            if extractor.classify is not None:
                add("same", extractor.classify(exact) == extractor.classify(quantized))
    if lpips is None:
        columns.pop("lpips", None)
    rows = {name: np.concatenate(arrays) for name, arrays in columns.items()}
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


def _shards(sampler: PairSampler, run: Run, keep: bool, progress: Progress) -> Iterator[ImagePairs]:
    """Yield all pairs in order, by shard. With `keep` existing shards are read and others written."""
    n = run.settings["pictures"]
    for number in range(run.count):
        shard = PairShard(run, number)
        pairs = shard.load() if keep else None
        if pairs is None:

            def report(calls: int, of: int, shard: PairShard = shard) -> None:
                # The last image of a shard is reported when the shard is written.
                progress("pairs of images", shard.first + (shard.stop - shard.first) * calls // (of + 1), n)

            pairs = sampler.sample(shard.first, shard.stop, report)
            if keep:
                run.announce()
                shard.write(pairs)
        progress("pairs of images", shard.stop, n)
        yield pairs


def _check_finite(bundle: Bundle, pairs: ImagePairs) -> None:
    """Raise InputError when a network produced NaN or infinite values."""
    for network, images in (("the float model", pairs.exact), ("the bundle", pairs.quantized)):
        if not np.isfinite(images).all():
            raise InputError(
                f"{network} makes images that are not finite",
                where=str(bundle.path),
                hint="`mezzotint debug` measures at every layer where the bundle departs from the float model",
            )
