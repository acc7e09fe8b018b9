"""Paired measurements of a float and a quantized network: same noise, same latents, same threads, same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import PEAK, StepSQNR, json_db, psnr_db
from mezzotint.runtime.latency import Latency, paired_latencies, timed_block
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import checked_rows, predictors, rows_in_turn, with_labels
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Predict, Timestep
from mezzotint.runtime.streams import FIXED, SeedOffset

from .reference import check_float_model

View = Callable[[StepInfo, Images], Images]


@dataclass(frozen=True)
class Comparison:
    """Images `[n, C, H, W]` of both networks from the same noise, and their decibels (runtime/compare.py)."""

    float_images: Images
    quantized_images: Images
    sqnr: StepSQNR
    psnr: npt.NDArray[np.float64]

    def to_json(self) -> dict[str, Any]:
        worst_step, worst = self.sqnr.worst()
        return {
            "eps_sqnr_db": json_db(self.sqnr.pooled()),
            "eps_sqnr_db_worst_step": json_db(worst),
            "worst_step": worst_step,
            "psnr_db_median": json_db(float(np.median(self.psnr))),
            # The value of one image: two identical ones (infinite dB) leave nothing to interpolate between.
            "psnr_db_p10": json_db(float(np.percentile(self.psnr, 10, method="lower"))),
        }


def compare(
    bundle: Bundle,
    float_model: Path | Denoiser,
    n: int,
    *,
    seed: int | None = None,
    batch: int = 16,
    threads: int | None = None,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
    unconditional: Mapping[str, npt.NDArray[Any]] | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Sample `n` images twice from the same noise with the bundle's deployment.

    The SQNR of the prediction is measured along the float trajectory; both networks get each step's latents. Without
    a seed the noise is one that no pass has seen.
    """
    seed = unseen_seed(bundle) if seed is None else seed
    images, sqnr = paired_run(
        _opened(float_model, bundle, threads),
        bundle.denoisers(threads=threads),
        bundle,
        n,
        seed=seed,
        batch=batch,
        conditions=conditions,
        unconditional=unconditional,
        progress=progress,
    )
    mine = bundle.sample(
        n,
        seed=seed,
        batch=batch,
        threads=threads,
        conditions=conditions,
        unconditional=unconditional,
        progress=lambda done, calls: progress("integer", done, calls),
    )
    psnr = psnr_db(np.clip(images, -1, 1), np.clip(mine, -1, 1), peak=PEAK)
    return Comparison(images, mine, sqnr, psnr)


def _opened(float_model: Path | Denoiser, bundle: Bundle, threads: int | None) -> Denoiser:
    """Return the float network, opened unless it is open already."""
    if not isinstance(float_model, Path):
        return float_model
    check_float_model(float_model)
    return Denoiser(float_model, bundle.signature, threads=threads)


def paired_run(
    exact: Callable[..., Images],
    quantized: Callable[..., Images] | Sequence[Callable[..., Images]],
    bundle: Bundle,
    n: int,
    *,
    seed: int,
    batch: int = 16,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
    unconditional: Mapping[str, npt.NDArray[Any]] | None = None,
    progress: Progress = silent,
) -> tuple[Images, StepSQNR]:
    """Return (images `[n, C, H, W]` of the float network, the SQNR of the other one on the same latents at each step).

    Both are called as `net(x, t, **conditions)`; the second may be a list with one for each network call. Sampler,
    schedule and sizes are those of the bundle. With guidance the guided predictions are compared. The noise correction
    is not applied.
    """
    options: dict[str, Any] = {"conditions": conditions, "unconditional": unconditional, "progress": progress}
    images, sqnr = parallel_run(exact, {"": quantized}, bundle, n, seed=seed, batch=batch, **options)
    return images, sqnr[""]


def parallel_run(
    exact: Callable[..., Images],
    others: Mapping[str, Callable[..., Images] | Sequence[Callable[..., Images]]],
    bundle: Bundle,
    n: int,
    *,
    seed: int,
    batch: int = 16,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
    unconditional: Mapping[str, npt.NDArray[Any]] | None = None,
    start: int = 0,
    progress: Progress = silent,
    view: View = lambda info, output: output,
    measure: Callable[[], StepSQNR] = StepSQNR,
) -> tuple[Images, dict[str, StepSQNR]]:
    """Do `paired_run` for several networks on one float trajectory, for images start .. start + n - 1.

    `view(info, output)` turns a prediction for `info.x` into the array that is compared; `measure` makes the collector
    of a network's errors.
    """
    computing = bundle.condition_network
    known, without = with_labels(bundle.signature, bundle.deployment, conditions, unconditional, start, computing)
    all_rows = checked_rows(known), checked_rows(without, "unconditional")
    sqnr = {name: measure() for name in others}
    float_images = []
    count = len(bundle.deployment.calls)
    networks = {name: [nets] * count if callable(nets) else nets for name, nets in others.items()}
    total = -(-n // batch) * count
    calls = 0
    for first in range(0, n, batch):
        rows = min(batch, n - first)
        here, other = (rows_in_turn(rows_of_all, first, rows) for rows_of_all in all_rows)
        batch_rows = here, other, computing
        predict = predictors([exact], bundle.deployment, *batch_rows)[0]
        compared = {name: predictors(nets, bundle.deployment, *batch_rows) for name, nets in networks.items()}

        def paired(info: StepInfo, compared: Mapping[str, Sequence[Predict]] = compared) -> None:
            nonlocal calls
            calls += 1
            for name, nets in compared.items():
                sqnr[name].add(info.index, view(info, info.output), view(info, nets[info.index](info.x, info.timestep)))
            progress("float, paired calls", calls, total)

        x = samplers.initial_noise(seed, (rows, *bundle.sample_shape), first=start + first)
        noise = samplers.seeded_noise(seed, first=start + first)
        float_images.append(
            samplers.sample(predict, x, bundle.schedule, bundle.deployment, noise=noise, callback=paired)
        )
    return np.concatenate(float_images), sqnr


def latencies(
    bundle: Bundle,
    batch: int,
    *,
    float_model: Path | Denoiser | None = None,
    threads: int | None = None,
    repeats: int = 7,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
) -> list[Latency]:
    """Return [quantized], or with a float model [quantized, float], of one call at the deployment's middle timestep.

    Calls are measured in blocks, float - quantized - float: the worker threads of a session spin for a while after a
    call, and would slow down the other session if single calls took turns. The first call of a block is not counted,
    and only the first row of each condition is used.
    """
    x = samplers.initial_noise(FIXED, (batch, *bundle.sample_shape))
    t = middle_timestep(bundle)
    rows = {name: np.repeat(array[:1], batch, axis=0) for name, array in (conditions or {}).items()}
    if bundle.condition_network is not None and not set(rows) >= set(bundle.condition_network.outputs):
        rows = dict(bundle.condition_network.at(x, t, rows))

    def on_rows(net: Denoiser) -> Predict:
        return lambda x, t: net(x, t, **rows)

    quantized = on_rows(bundle.denoiser(threads))
    if float_model is None:
        return [Latency(timed_block(quantized, x, t, repeats))]
    exact = on_rows(_opened(float_model, bundle, threads))
    return list(paired_latencies(exact, quantized, x, t, repeats))


def latency_ratio(
    bundle: Bundle,
    float_model: Path,
    batch: int,
    *,
    threads: int | None = None,
    repeats: int = 7,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
) -> tuple[float, float, float]:
    """Return (float seconds, quantized seconds, float / quantized) of one network call: the medians of `latencies`."""
    quantized, exact = latencies(
        bundle, batch, float_model=float_model, threads=threads, repeats=repeats, conditions=conditions
    )
    return exact.median, quantized.median, exact.median / quantized.median


def unseen_seed(bundle: Bundle) -> int:
    """Return a seed that neither the calibration nor any pass draws from."""
    return SeedOffset.EVALUATION.after(int(bundle.manifest.calibration.seed))


def middle_timestep(bundle: Bundle) -> Timestep:
    """Return the timestep in the middle of the deployment's calls; the cost of one call is measured there."""
    return bundle.deployment.calls[len(bundle.deployment.calls) // 2]


def folder_bytes(model: Path) -> int:
    """Return the bytes of an ONNX file and of its external data."""
    return sum(f.stat().st_size for f in model.parent.glob(f"{model.name}*") if f.is_file())
