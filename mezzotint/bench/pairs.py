"""Float beside quantized, paired: the same noise, the same latents, the same threads, the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import StepSQNR, json_db, psnr_db
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import predictors
from mezzotint.runtime.sampling.samplers import StepInfo
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Timestep

Images = npt.NDArray[np.float32]
Predict = Callable[[Images, Timestep], Images]
Report = Callable[[str, int, int], None]
View = Callable[[StepInfo, Images], Images]
PEAK = 2.0  # pictures lie in [-1, 1]


@dataclass(frozen=True)
class Comparison:
    """`float_images` and `quantized_images` are `[n, C, H, W]`; decibels as in runtime/compare.py."""

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
            # A picture that exists: between two that are identical (infinite) there is nothing to interpolate.
            "psnr_db_p10": json_db(float(np.percentile(self.psnr, 10, method="lower"))),
        }


def compare(
    bundle: Bundle,
    float_model: Path,
    n: int,
    *,
    seed: int | None = None,
    batch: int = 16,
    threads: int | None = None,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
    unconditional: Mapping[str, npt.NDArray[Any]] | None = None,
    progress: Report = lambda stage, done, total: None,
) -> Comparison:
    """Sample `n` pictures twice from the same noise with the bundle's deployment.

    The SQNR of the prediction is measured along the float trajectory, each step's latents given to both.
    The noise is one that no pass has seen, unless a seed is given.
    """
    seed = unseen_seed(bundle) if seed is None else seed
    images, sqnr = paired_run(
        Denoiser(float_model, bundle.signature, threads=threads),
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
    progress: Report = lambda stage, done, total: None,
) -> tuple[Images, StepSQNR]:
    """(pictures `[n, C, H, W]` of the float denoiser, how near the other one is on the same latents at each step).

    Both are called as `net(x, t, **conditions)`, the second may be a list with one for each network call; the bundle
    says the sampler, the schedule and the sizes. With guidance the guided predictions are compared. No correction has
    a part in it.
    """
    options: dict[str, Any] = {"conditions": conditions, "unconditional": unconditional, "progress": progress}
    images, found = parallel_run(exact, {"": quantized}, bundle, n, seed=seed, batch=batch, **options)
    return images, found[""]


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
    progress: Report = lambda stage, done, total: None,
    view: View = lambda info, output: output,
    measure: Callable[[], StepSQNR] = StepSQNR,
) -> tuple[Images, dict[str, StepSQNR]]:
    """`paired_run` with any number of others beside one float trajectory, of pictures start .. start + n - 1.

    `view` turns what the network says for `info.x` into what is compared, `measure` makes what it is compared with.
    """
    sqnr = {name: measure() for name in others}
    float_images = []
    count = len(bundle.deployment.calls)
    networks = {name: [nets] * count if callable(nets) else nets for name, nets in others.items()}
    total = -(-n // batch) * count
    calls = 0
    for first in range(0, n, batch):
        rows = min(batch, n - first)
        here, other = (
            {
                name: array[first : first + rows] if len(array) > 1 else np.repeat(array, rows, axis=0)
                for name, array in (given or {}).items()
            }
            for given in (conditions, unconditional)
        )
        predict = predictors([exact], bundle.deployment, here, other)[0]
        beside = {name: predictors(nets, bundle.deployment, here, other) for name, nets in networks.items()}

        def paired(info: StepInfo, beside: Mapping[str, Sequence[Predict]] = beside) -> None:
            nonlocal calls
            calls += 1
            for name, nets in beside.items():
                sqnr[name].add(info.index, view(info, info.output), view(info, nets[info.index](info.x, info.timestep)))
            progress("float, paired calls", calls, total)

        x = samplers.initial_noise(seed, (rows, *bundle.sample_shape), first=start + first)
        noise = samplers.seeded_noise(seed, first=start + first)
        float_images.append(
            samplers.sample(predict, x, bundle.schedule, bundle.deployment, noise=noise, callback=paired)
        )
    return np.concatenate(float_images), sqnr


@dataclass(frozen=True)
class Latency:
    """Seconds of one network call, measured one after the other; `blocks` has the median of each block of calls."""

    seconds: tuple[float, ...]
    blocks: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def minimum(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: of the medians, and the least and the most that neighbouring blocks gave."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4)}


def ratio(exact: Latency, other: Latency) -> Ratio:
    """Seconds of the one over seconds of the other; their blocks were measured in turns (`in_turns`)."""
    value = exact.median / other.median
    each = [value, *(e / o for e, o in zip(exact.blocks, other.blocks, strict=True))]
    return Ratio(value, min(each), max(each))


def latencies(
    bundle: Bundle,
    batch: int,
    *,
    float_model: Path | None = None,
    threads: int | None = None,
    repeats: int = 7,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
) -> list[Latency]:
    """[quantized], or with a float model [quantized, float], of one call at the deployment's middle timestep.

    Measured in blocks, float - quantized - float: the worker threads of one session go on spinning for a while after
    a call, and would slow down the other one if calls took turns. The first call of a block is not counted, and only
    the first row of each condition is used.
    """
    x = samplers.initial_noise(0, (batch, *bundle.sample_shape))
    t = middle_timestep(bundle)
    rows = {name: np.repeat(array[:1], batch, axis=0) for name, array in (conditions or {}).items()}

    def on_rows(net: Denoiser) -> Predict:
        return lambda x, t: net(x, t, **rows)

    quantized = on_rows(bundle.denoiser(threads))
    if float_model is None:
        return [Latency(_block(quantized, x, t, repeats))]
    exact = on_rows(Denoiser(float_model, bundle.signature, threads=threads))
    return list(_beside(exact, quantized, x, t, repeats))


def call_ratio(
    exact: Predict, quantized: Predict, x: Images, t: Timestep, *, repeats: int = 7
) -> tuple[float, float, float]:
    """(float seconds, quantized seconds, float / quantized) of one call of two denoisers: medians, in blocks."""
    mine, before = _beside(exact, quantized, x, t, repeats)
    return before.median, mine.median, before.median / mine.median


def in_turns(nets: Sequence[Predict], x: Images, t: Timestep, *, repeats: int = 7, rounds: int = 1) -> list[Latency]:
    """One call of each of several denoisers, in blocks there and back, so that a drift meets all of them alike."""
    found: list[list[tuple[float, ...]]] = [[] for _ in nets]
    for i in (*range(len(nets)), *reversed(range(len(nets)))) * rounds:
        found[i].append(_block(nets[i], x, t, repeats))
    return [Latency(sum(blocks, ()), tuple(float(np.median(block)) for block in blocks)) for blocks in found]


def _beside(exact: Predict, quantized: Predict, x: Images, t: Timestep, repeats: int) -> tuple[Latency, Latency]:
    before, mine, after = (_block(net, x, t, repeats) for net in (exact, quantized, exact))
    return Latency(mine), Latency(before + after)


def _block(net: Predict, x: Images, t: Timestep, repeats: int) -> tuple[float, ...]:
    net(x, t)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        net(x, t)
        times.append(time.perf_counter() - start)
    return tuple(times)


def latency_ratio(
    bundle: Bundle,
    float_model: Path,
    batch: int,
    *,
    threads: int | None = None,
    repeats: int = 7,
    conditions: Mapping[str, npt.NDArray[Any]] | None = None,
) -> tuple[float, float, float]:
    """(float seconds, quantized seconds, float / quantized) of one network call: the medians of `latencies`."""
    quantized, exact = latencies(
        bundle, batch, float_model=float_model, threads=threads, repeats=repeats, conditions=conditions
    )
    return exact.median, quantized.median, exact.median / quantized.median


def unseen_seed(bundle: Bundle) -> int:
    """A seed from which neither the calibration nor any pass drew."""
    return int(bundle.manifest["calibration"]["seed"]) + samplers.EVALUATION


def middle_timestep(bundle: Bundle) -> Timestep:
    """The timestep in the middle of the deployment's calls: what one call costs is measured there."""
    return bundle.deployment.calls[len(bundle.deployment.calls) // 2]


def folder_bytes(model: Path) -> int:
    """Bytes of an ONNX file and of the external data beside it."""
    return sum(f.stat().st_size for f in model.parent.glob(f"{model.name}*") if f.is_file())
