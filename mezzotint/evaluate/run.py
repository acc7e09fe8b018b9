"""`mezzotint eval`: a bundle compared with its float model, in pairs of images from the same noise.

Images are sampled in shards, and what is kept of them are some numbers of each pair and sums of features: the memory
needed is that of one shard, whatever the number of images. With a folder the shards stay on disk (shards.py): the same
command continues where it stopped, and returns a finished evaluation at once. The settings that the images depend on
must be the same; features, speed and the number of resamples may differ, and are then measured again on the images of
the folder.

Samples with other than one or three channels are latents: they have an SQNR, but no PSNR, SSIM or features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.compiler.stages import scratch
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import json_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import read_text
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions, with_labels
from mezzotint.runtime.session import CPU_ENGINE, Denoiser, running_version

from ..bench.pairs import unseen_seed
from ..bench.reference import ReferenceModel
from ..cluster.connection import check_cluster, cluster_or_none, piece_threads
from ..frechet import network_digest
from ..shards.objects import run_at
from ..shards.run import Run, condition_facts, engine_facts, network_facts
from . import cost as eval_cost
from . import metrics as eval_metrics
from .extractors import NONE, Extractor, default_extractor, open_extractor
from .images import measure_images
from .options import EvaluationOptions
from .report import markdown
from .result import Evaluation
from .shards import PAIR_FORMAT, SHARD_SIZE, PairSampler

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
    cluster: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Compare the bundle with `reference`, the float .onnx: images, and with `speed` the time and memory of a call.

    The options are those of `EvaluationOptions`. With `output`, a folder or a URL, a run that was stopped is resumed.
    Without `speed` the same evaluation gives the same bytes. With `cluster`, "local" or an address
    (cluster/connection.py), its workers sample and measure the images, and the numbers are the same. Every refusal
    comes before the first network call: InputError for settings that are impossible or differ from those of the run in
    the folder; OutputError where the folder cannot be written.
    """
    options = EvaluationOptions(
        n, seed, batch, conditions or {}, unconditional or {}, features, correction, speed, resamples, shard_size
    )
    return evaluate_with(bundle, reference, options, output=output, threads=threads, cluster=cluster, progress=progress)


def evaluate_with(
    bundle: Bundle,
    reference: str | Path,
    options: EvaluationOptions,
    *,
    output: str | Path | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Do the work of `evaluate_bundle`, for its options as one value."""
    if cluster is not None:
        check_cluster(cluster)
        threads = piece_threads(threads)
    float_model = ReferenceModel(bundle, reference, threads=threads)
    float_model.check()
    sampler = PairSampler(
        bundle,
        float_model,
        unseen_seed(bundle) if options.seed is None else options.seed,
        _batch(bundle, float_model.network, options.batch, options.n, threads),
        threads,
        options.correction,
        *with_labels(
            bundle.signature,
            bundle.deployment,
            options.conditions,
            options.unconditional,
            computing=bundle.condition_network,
        ),
    )
    job = _prepare(sampler, options, output)
    if job.begun and (earlier := _finished(job, options.speed)) is not None:
        return earlier
    with scratch() as work:
        same_weights = float_model.has_weights_of(float_model.program(work))
    with cluster_or_none(cluster, threads) as opened:
        numbers = measure_images(
            sampler,
            job.run,
            job.extractor,
            job.no_features,
            keep=job.keep,
            progress=progress,
            resamples=options.resamples,
            cluster=opened,
        )
    metrics = _metrics(numbers, options.resamples, progress)
    timed, memory = _measure_cost(sampler, progress) if options.speed else (None, None)
    evaluation = _evaluation(job, same_weights, numbers, metrics, timed, memory)
    if job.keep:
        _write(job.run, evaluation)
    return evaluation


@dataclass(frozen=True)
class _Job:
    """The samples and measurements of an evaluation. `begun` says that the folder holds this run.

    `key` has everything that the numbers depend on. `keep` says that shards are written to the folder of the run;
    `no_features` is the reason for an absent extractor.
    """

    sampler: PairSampler
    run: Run
    keep: bool
    begun: bool
    extractor: Extractor | None
    no_features: str
    key: dict[str, Any]


def _prepare(sampler: PairSampler, options: EvaluationOptions, output: str | Path | None) -> _Job:
    """Step 1: return the job. Raises InputError, OutputError for settings and folders that are refused."""
    bundle, n, features = sampler.bundle, options.n, options.features
    deployment, table = bundle.plan(), bundle.correction
    settings = {
        "bundle": bundle.manifest.digest,
        "reference": network_digest(sampler.reference.path),
        "sample_shape": list(bundle.sample_shape),
        "pictures": n,
        "shard_size": -(-options.shard_size // sampler.batch) * sampler.batch,
        "format": PAIR_FORMAT,
        "seed": sampler.seed,
        "sampler": deployment.sampler,
        "steps": deployment.steps,
        "eta": float(deployment.eta),
        "guidance": float(deployment.guidance),
        "correction": sampler.correction is not False and table is not None and table.refusal(deployment) is None,
        "conditions": condition_facts("conditions", sampler.conditions),
        "unconditional": condition_facts("unconditional", sampler.unconditional),
        **engine_facts(bundle.engine),
        **network_facts(bundle.condition_network),
    }
    run = run_at(output or Path(), settings)
    begun = output is not None and run.is_begun()
    name, reason = (features, "") if features is not None else default_extractor(bundle.sample_shape)
    extractor = None if name == NONE else open_extractor(name, bundle.sample_shape, sampler.threads)
    key = {
        "layout": EVALUATION_LAYOUT,
        "run": run.digest,
        "features": None if extractor is None else [extractor.name, extractor.digest],
        "resamples": options.resamples,
    }
    if bundle.engine != CPU_ENGINE:
        key["engine"] = bundle.usage(sampler.threads).library
    return _Job(sampler, run, output is not None, begun, extractor, reason or "no features were requested", key)


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
    """Return the earlier evaluation in the folder when it has the settings of this job, else None."""
    with job.run.fetched(RESULT_FILE) as file:
        earlier = Evaluation.load(file)
    if earlier is None or earlier.key != job.key or not _is_whole(job.run, earlier):
        return None
    timing = None if earlier.speed is None else (earlier.speed.get("batch"), earlier.speed.get("threads"))
    return earlier if not speed or timing == (job.sampler.batch, job.sampler.threads) else None


def _is_whole(run: Run, earlier: Evaluation) -> bool:
    """Return whether an evaluation is as this version wrote it: the page beside it says the same."""
    try:
        with run.fetched(PAGE_FILE) as file:
            page = read_text(file, "the page", InputError)
        return earlier.onnxruntime == running_version() and page == markdown(earlier)
    except (InputError, KeyError, TypeError, ValueError, AttributeError, IndexError):  # values of other types
        return False


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
            "recipe": manifest.recipe.name,
            "digest": manifest.digest,
            "weights_sha256": manifest.source.weights_sha256,
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
        engine=bundle.usage(job.sampler.threads).to_json(),
    )


def _write(run: Run, evaluation: Evaluation) -> None:
    text = json.dumps(evaluation.to_json(), indent=2, allow_nan=False) + "\n"
    for name, content in ((PAGE_FILE, markdown(evaluation)), (RESULT_FILE, text)):
        run.store(name, content.encode())
