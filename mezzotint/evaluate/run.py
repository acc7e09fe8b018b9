"""`mezzotint eval`: a bundle compared with its float model, in pairs of images from the same noise.

Images are sampled in shards, and only their numbers are kept: the memory needed is that of one shard, and of n times
the number of features. With a folder the shards stay on disk (shards.py): the same command continues where it stopped,
and returns a finished evaluation at once. The settings that the images depend on must be the same; features, speed and
the number of resamples may differ, and are then measured again on the images of the folder.

Samples with other than one or three channels are latents: they have an SQNR, but no PSNR, SSIM or features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import json_db, psnr_db, ssim
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.session import Denoiser, running_version

from ..bench.pairs import PEAK, unseen_seed
from ..bench.reference import ReferenceModel
from ..frechet import network_digest
from ..io.files import replacing
from ..shards.run import Run, belongs, condition_facts
from . import cost as eval_cost
from . import metrics as eval_metrics
from .extractors import NONE, Extractor, default_extractor, open_extractor, perceptual_distance
from .report import markdown
from .result import Evaluation
from .shards import PAIR_FORMAT, SHARD_SIZE, ImagePairs, PairSampler, PairShard

RESULT_FILE, PAGE_FILE = "eval.json", "eval.md"
EVALUATION_LAYOUT = 1


def evaluate_bundle(
    bundle: Bundle,
    reference: str | Path,
    n: int = 64,
    *,
    seed: int | None = None,
    batch: int = 16,
    threads: int | None = None,
    conditions: Conditions | None = None,
    unconditional: Conditions | None = None,
    features: str | None = None,
    correction: bool | None = None,
    output: str | Path | None = None,
    speed: bool = True,
    resamples: int = eval_metrics.RESAMPLES,
    shard_size: int = SHARD_SIZE,
    progress: Progress = silent,
) -> Evaluation:
    """Compare the bundle with `reference`, the float .onnx: images, and with `speed` the time and memory of a call.

    `features` is a name of extractors.py, `conditions` are `[n, ...]` or `[1, ...]`, `correction` is that of
    `Bundle.sample`. Without a seed the noise is one that no pass has seen. Without `speed` the same evaluation gives
    the same bytes. Every refusal comes before the first network call: InputError for settings that are impossible or
    differ from those of the run in the folder; OutputError where the folder cannot be written.
    """
    if n < 1 or batch < 1 or shard_size < 1:
        raise InputError(f"{n} images in batches of {batch}", hint="ask for at least one of each")
    float_model = ReferenceModel(bundle, reference, threads=threads)
    float_model.check()
    batch = _batch(bundle, float_model.network, batch, n, threads)
    sampler = PairSampler(
        bundle,
        float_model,
        unseen_seed(bundle) if seed is None else seed,
        batch,
        threads,
        correction,
        dict(conditions or {}),
        dict(unconditional or {}),
    )
    folder = None if output is None else Path(output)
    job = _prepare(sampler, n, folder, shard_size, features, resamples)
    if job.begun and (earlier := _finished(job, speed)) is not None:
        return earlier
    with TemporaryDirectory() as work:
        same_weights = float_model.has_weights_of(float_model.program(Path(work)))
    numbers = _measure_images(job, progress)
    metrics = _metrics(numbers, resamples, progress)
    timed, memory = _measure_cost(sampler, progress) if speed else (None, None)
    evaluation = _evaluation(job, same_weights, numbers, metrics, timed, memory)
    if folder is not None:
        _write(folder, evaluation)
    return evaluation


@dataclass(frozen=True)
class _Job:
    """Step 1: what is sampled and measured. `begun` says that the folder holds this run, `note` why features are none.

    `key` has everything that the numbers depend on. `keep` says that shards are written to the folder of the run.
    """

    sampler: PairSampler
    run: Run
    keep: bool
    begun: bool
    extractor: Extractor | None
    note: str
    key: dict[str, Any]


def _prepare(
    sampler: PairSampler, n: int, folder: Path | None, shard_size: int, features: str | None, resamples: int
) -> _Job:
    bundle = sampler.bundle
    deployment, table = bundle.plan(), bundle.correction
    settings = {
        "bundle": bundle.manifest["digest"],
        "reference": network_digest(sampler.reference.path),
        "sample_shape": list(bundle.sample_shape),
        "pictures": n,
        "shard_size": -(-shard_size // sampler.batch) * sampler.batch,
        "format": PAIR_FORMAT,
        "seed": sampler.seed,
        "sampler": deployment.sampler,
        "steps": deployment.steps,
        "eta": float(deployment.eta),
        "guidance": float(deployment.guidance),
        "correction": sampler.correction is not False and table is not None and table.refusal(deployment) is None,
        "conditions": condition_facts("conditions", sampler.conditions, n),
        "unconditional": condition_facts("unconditional", sampler.unconditional, n),
    }
    run = Run(Path() if folder is None else folder, settings)
    begun = folder is not None and belongs(folder, settings)
    name, note = (features, "") if features is not None else default_extractor(bundle.sample_shape)
    extractor = None if name == NONE else open_extractor(name, bundle.sample_shape, sampler.threads)
    key = {
        "layout": EVALUATION_LAYOUT,
        "run": run.digest,
        "features": None if extractor is None else [extractor.name, extractor.digest],
        "resamples": resamples,
    }
    return _Job(sampler, run, folder is not None, begun, extractor, note, key)


def _batch(bundle: Bundle, exact: Denoiser, batch: int, n: int, threads: int | None) -> int:
    """Return the batch size, or the one that is fixed in a graph. Raise InputError where the graphs contradict it."""
    nets = (exact, *bundle.denoisers(threads=threads))
    fixed = sorted({net.fixed_batch for net in nets if net.fixed_batch is not None})
    if not fixed:
        return batch
    size = fixed[0]
    halves = 2 if bundle.deployment.guided else 1
    if len(fixed) > 1 or size % halves or n % (size // halves):
        raise InputError(
            f"the graphs have fixed batches of {', '.join(map(str, fixed))}, which cannot sample {n} images",
            where=str(bundle.path),
            hint=f"ask for a multiple of {size // halves or 1} images, or export the model with an open batch",
        )
    return size // halves


def _finished(job: _Job, speed: bool) -> Evaluation | None:
    """Return the evaluation in the folder when it answers this job."""
    earlier = Evaluation.load(job.run.folder / RESULT_FILE)
    if earlier is None or earlier.key != job.key or earlier.onnxruntime != running_version():
        return None
    timing = None if earlier.speed is None else (earlier.speed.get("batch"), earlier.speed.get("threads"))
    return earlier if not speed or timing == (job.sampler.batch, job.sampler.threads) else None


def _shards(job: _Job, progress: Progress) -> Iterator[ImagePairs]:
    """All pairs in order, one shard at a time. A job that keeps its shards reads those that exist and writes others."""
    n = job.run.settings["pictures"]
    for number in range(job.run.count):
        shard = PairShard(job.run, number)
        pairs = shard.load() if job.keep else None
        if pairs is None:

            def report(calls: int, of: int, shard: PairShard = shard) -> None:
                # The last image of a shard is reported when the shard is written.
                progress("pairs of images", shard.first + (shard.stop - shard.first) * calls // (of + 1), n)

            pairs = job.sampler.sample(shard.first, shard.stop, report)
            if job.keep:
                job.run.announce()
                shard.write(pairs)
        progress("pairs of images", shard.stop, n)
        yield pairs


def _measure_images(job: _Job, progress: Progress) -> eval_metrics.PairNumbers:
    """Step 2: sample or read all pairs and return the numbers of every pair."""
    channels = job.run.settings["sample_shape"][0]
    are_images = channels in (1, 3)
    latents = f"samples of {channels} channels are latents, not images"
    lpips, no_lpips = perceptual_distance() if are_images else (None, latents)
    extractor, no_features = job.extractor, job.note or "no features were requested"
    missing = {"psnr": latents, "ssim": latents, "lpips": no_lpips, "features": no_features}
    missing["agreement"] = no_features if extractor is None else f"{extractor.name} has no classes"
    columns: dict[str, list[npt.NDArray[Any]]] = {}

    def keep(name: str, numbers: npt.NDArray[Any]) -> None:
        columns.setdefault(name, []).append(numbers)

    for pairs in _shards(job, progress):
        _check_finite(job.sampler.bundle, pairs)
        sample_signal, sample_noise = eval_metrics.squares(pairs.exact, pairs.quantized)
        keep("signal", pairs.signal.T)
        keep("noise", pairs.noise.T)
        keep("sample_signal", sample_signal)
        keep("sample_noise", sample_noise)
        exact, quantized = (np.clip(images, -1, 1) for images in (pairs.exact, pairs.quantized))
        if are_images:
            keep("psnr", psnr_db(exact, quantized, PEAK))
            keep("ssim", ssim(exact + 1, quantized + 1, PEAK))
        if lpips is not None and not no_lpips:
            try:
                keep("lpips", lpips(exact, quantized))
            except Exception as error:  # a third-party network: it may refuse small images
                lpips, missing["lpips"] = None, f"LPIPS failed: {error}"
        if extractor is not None:
            keep("exact", extractor.features(exact))
            keep("quantized", extractor.features(quantized))
            if extractor.classify is not None:
                keep("same", extractor.classify(exact) == extractor.classify(quantized))
    if lpips is None:
        columns.pop("lpips", None)
    rows = {name: np.concatenate(arrays) for name, arrays in columns.items()}
    return eval_metrics.PairNumbers(
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


def _measure_cost(sampler: PairSampler, progress: Progress) -> tuple[dict[str, Any], dict[str, Any]]:
    """Step 3: return (time, memory) of a call of both networks."""
    bundle, reference = sampler.bundle, sampler.reference
    progress("speed and memory", 0, 2)
    speed = eval_cost.speed(bundle, reference.network, sampler.batch, sampler.threads, sampler.conditions)
    reference.close()  # free it first: the memory probe below loads the float model in a new process
    progress("speed and memory", 1, 2)
    memory = eval_cost.memory(bundle, reference.path, sampler.batch, sampler.threads, sampler.conditions)
    progress("speed and memory", 2, 2)
    return speed, memory


def _metrics(numbers: eval_metrics.PairNumbers, resamples: int, progress: Progress) -> dict[str, dict[str, Any]]:
    measured = eval_metrics.metrics(
        numbers, resamples=resamples, progress=lambda done, total: progress("intervals", done, total)
    )
    return {name: metric.to_json() for name, metric in measured.items()}


def _evaluation(
    job: _Job,
    same_weights: bool,
    numbers: eval_metrics.PairNumbers,
    metrics: dict[str, dict[str, Any]],
    speed: dict[str, Any] | None,
    memory: dict[str, Any] | None,
) -> Evaluation:
    bundle, reference, settings = job.sampler.bundle, job.sampler.reference.path, job.run.settings
    manifest, calls = bundle.manifest, bundle.deployment.calls
    return Evaluation(
        key=job.key,
        bundle={
            "name": bundle.path.name,
            "recipe": manifest["recipe"]["name"],
            "digest": manifest["digest"],
            "weights_sha256": manifest["source"].get("weights_sha256"),
        },
        reference={"name": reference.name, "digest": settings["reference"], "same_weights": same_weights},
        deployment=str(bundle.deployment),
        pictures=settings["pictures"],
        seed=settings["seed"],
        correction=settings["correction"],
        features=None if job.extractor is None else {"name": job.extractor.name, "digest": job.extractor.digest},
        onnxruntime=running_version(),
        metrics=metrics,
        eps_sqnr_db_per_step=[
            {"call": i, "timestep": calls[i], "db": json_db(db)} for i, db in enumerate(numbers.steps())
        ],
        worst_step=numbers.worst(),
        size=eval_cost.size(bundle, reference),
        kernels=eval_cost.kernels(bundle),
        speed=speed,
        memory=memory,
    )


def _write(folder: Path, evaluation: Evaluation) -> None:
    text = json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n"
    for name, content in ((PAGE_FILE, markdown(evaluation)), (RESULT_FILE, text)):
        with replacing(folder / name) as part:
            part.write_text(content, encoding="utf-8", newline="\n")
