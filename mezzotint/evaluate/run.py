"""`mezzotint eval`: how good, how fast and how small a bundle is beside its float model, in pairs from the same noise.

Pictures are drawn in shards and only numbers of each are kept: memory is that of one shard, and of n times the number
of features. With a folder the shards stay there (eval_shards.py): the same command goes on where it stopped, and tells
a finished evaluation at once. What the pictures depend on has to be the same; features, speed and the number of
resamples may be other ones, and are measured anew from the pictures that are there.

Samples of other than one or three channels are latents: they have an SQNR, and no PSNR, SSIM or features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import json_db, psnr_db, ssim
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.session import Denoiser, running_version

from ..bench.pairs import PEAK, unseen_seed
from ..frechet import network_digest
from ..io.files import replacing
from ..shards.run import Run, belongs, condition_facts
from . import cost as eval_cost
from . import metrics as eval_metrics
from .extractors import NONE, Extractor, default_extractor, open_extractor, perceptual_distance
from .report import markdown
from .shards import FORMAT, SHARD_SIZE, Drawing, Pairs, PairShard

FACTS, PAGE = "eval.json", "eval.md"
LAYOUT = 1


def evaluate(
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
) -> dict[str, Any]:
    """Everything that is known of the bundle beside `reference`, the float .onnx, as JSON has it.

    `features` is a name of extractors.py, `conditions` are `[n, ...]` or `[1, ...]`, `correction` is that of
    `Bundle.sample`. The noise is one that no pass has seen, unless a seed is given. `speed` measures time and memory as
    well; without it the same evaluation twice gives the same bytes. Refusals come before the first call: InputError
    for settings that cannot be, or others than those of the run in the folder; OutputError where the folder cannot be
    written.
    """
    reference = Path(reference)
    if n < 1 or batch < 1 or shard_size < 1:
        raise InputError(f"{n} pictures in batches of {batch}", hint="ask for at least one of each")
    if not reference.is_file():
        raise InputError(
            "there is no such float model",
            where=str(reference),
            hint="write it with `mezzotint export MODEL -o FILE.onnx`, from the model that the bundle was made of",
        )
    given, other = dict(conditions or {}), dict(unconditional or {})
    seed = unseen_seed(bundle) if seed is None else seed
    exact = Denoiser(reference, bundle.signature, threads=threads)
    batch = _batch(bundle, exact, batch, n, threads)
    told = bundle.plan()
    table = bundle.correction
    settings = {
        "bundle": bundle.manifest["digest"],
        "reference": network_digest(reference),
        "sample_shape": list(bundle.sample_shape),
        "pictures": n,
        "shard_size": -(-shard_size // batch) * batch,
        "format": FORMAT,
        "seed": seed,
        "sampler": told.sampler,
        "steps": told.steps,
        "eta": float(told.eta),
        "guidance": float(told.guidance),
        "correction": correction is not False and table is not None and table.refusal(told) is None,
        "conditions": condition_facts("conditions", given, n),
        "unconditional": condition_facts("unconditional", other, n),
    }
    run = Run(Path() if output is None else Path(output), settings)
    known = output is not None and belongs(run.folder, settings)
    name, note = (features, "") if features is not None else default_extractor(bundle.sample_shape)
    extractor = None if name == NONE else open_extractor(name, bundle.sample_shape, threads)
    key = _key(run, extractor, resamples)
    if known and (found := _finished(run.folder / FACTS, key, batch, threads, speed)) is not None:
        return found
    drawing = Drawing(bundle, exact, seed, batch, threads, correction, given, other)
    same = _same_weights(bundle, reference)
    pairs = _pairs(run, drawing, extractor, note, output is not None, progress)
    found = {
        "key": key,
        "bundle": {"name": bundle.path.name, "recipe": bundle.manifest["recipe"]["name"], **_digests(bundle)},
        "reference": {"name": reference.name, "digest": settings["reference"], "same_weights": same},
        "deployment": str(bundle.deployment),
        "pictures": n,
        "seed": seed,
        "correction": settings["correction"],
        "features": None if extractor is None else {"name": extractor.name, "digest": extractor.digest},
        "onnxruntime": running_version(),
        "metrics": _metrics(pairs, resamples, progress),
        "eps_sqnr_db_per_step": _per_step(bundle, pairs),
        "worst_step": pairs.worst(),
        "size": eval_cost.size(bundle, reference),
        "kernels": eval_cost.kernels(bundle),
        "speed": None,
        "memory": None,
    }
    if speed:
        progress("speed and memory", 0, 2)
        found["speed"] = eval_cost.speed(bundle, exact, batch, threads, given)
        del exact, drawing  # the process below opens the float model again
        progress("speed and memory", 1, 2)
        found["memory"] = eval_cost.memory(bundle, reference, batch, threads, given)
        progress("speed and memory", 2, 2)
    if output is not None:
        _write(run.folder, found)
    return found


def _batch(bundle: Bundle, exact: Denoiser, batch: int, n: int, threads: int | None) -> int:
    """The batch size, or the one that is written into a graph."""
    nets = (exact, *bundle.denoisers(threads=threads))
    fixed = sorted({net.fixed_batch for net in nets if net.fixed_batch is not None})
    if not fixed:
        return batch
    size = fixed[0]
    halves = 2 if bundle.deployment.guided else 1
    if len(fixed) > 1 or size % halves or n % (size // halves):
        raise InputError(
            f"batches of {', '.join(map(str, fixed))} are written into the graphs, which cannot draw {n} pictures",
            where=str(bundle.path),
            hint=f"ask for a multiple of {size // halves or 1} pictures, or export the model with an open batch",
        )
    return size // halves


def _digests(bundle: Bundle) -> dict[str, Any]:
    return {"digest": bundle.manifest["digest"], "weights_sha256": bundle.manifest["source"].get("weights_sha256")}


def _key(run: Run, extractor: Extractor | None, resamples: int) -> dict[str, Any]:
    """What the numbers depend on."""
    features = None if extractor is None else [extractor.name, extractor.digest]
    return {"layout": LAYOUT, "run": run.digest, "features": features, "resamples": resamples}


def _finished(
    file: Path, key: Mapping[str, Any], batch: int, threads: int | None, speed: bool
) -> dict[str, Any] | None:
    """What was found before, if that is what is asked for."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        timed = found["speed"] is not None and (found["speed"]["batch"], found["speed"]["threads"]) == (batch, threads)
        same = found["key"] == key and found["onnxruntime"] == running_version() and (timed or not speed)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if same else None


def _same_weights(bundle: Bundle, reference: Path) -> bool:
    """Whether the reference has the very weights that the bundle was compiled from. Raises ModelError."""
    signature = bundle.signature
    with TemporaryDirectory() as work:
        program = import_onnx(
            reference,
            Path(work),
            schedule=bundle.schedule,
            deployment=bundle.deployment,
            inputs={"sample": signature.sample, "timestep": signature.timestep},
            output=signature.output,
            prediction=signature.prediction,
            size=bundle.sample_shape[1:],
        )
    return bool(program.source.get("weights_sha256") == bundle.manifest["source"].get("weights_sha256"))


def _shards(run: Run, drawing: Drawing, keep: bool, progress: Progress) -> Iterator[Pairs]:
    """All pairs in order, a shard at a time; with `keep` from the folder where they are there, and into it."""
    n = run.settings["pictures"]
    for number in range(run.count):
        shard = PairShard(run, number)
        pairs = shard.load() if keep else None
        if pairs is None:

            def report(calls: int, of: int, shard: PairShard = shard) -> None:
                # The last picture of a shard is told of when it is written.
                progress("pairs of pictures", shard.first + (shard.stop - shard.first) * calls // (of + 1), n)

            pairs = drawing.draw(shard.first, shard.stop, report)
            if keep:
                run.announce()
                shard.write(pairs)
        progress("pairs of pictures", shard.stop, n)
        yield pairs


def _pairs(
    run: Run, drawing: Drawing, extractor: Extractor | None, note: str, keep: bool, progress: Progress
) -> eval_metrics.Pairs:
    """The numbers of every picture."""
    pictures = run.settings["sample_shape"][0] in (1, 3)
    latents = f"samples of {run.settings['sample_shape'][0]} channels are latents, not pictures"
    lpips, no_lpips = perceptual_distance() if pictures else (None, latents)
    missing = {"psnr": latents, "ssim": latents, "lpips": no_lpips, "features": note or "no features were asked for"}
    missing["agreement"] = missing["features"] if extractor is None else f"{extractor.name} has no classes"
    parts: dict[str, list[npt.NDArray[Any]]] = {}

    def keep_numbers(**numbers: npt.NDArray[Any]) -> None:
        for name, array in numbers.items():
            parts.setdefault(name, []).append(array)

    for pairs in _shards(run, drawing, keep, progress):
        for who, images in (("the float model", pairs.exact), ("the bundle", pairs.quantized)):
            if not np.isfinite(images).all():
                raise InputError(
                    f"{who} makes pictures that are not finite numbers",
                    where=str(drawing.bundle.path),
                    hint="`mezzotint debug` tells of every layer where the bundle parts from the float model",
                )
        signal, noise = eval_metrics.squares(pairs.exact, pairs.quantized)
        keep_numbers(signal=pairs.signal.T, noise=pairs.noise.T, sample_signal=signal, sample_noise=noise)
        one, other = (np.clip(images, -1, 1) for images in (pairs.exact, pairs.quantized))
        if pictures:
            keep_numbers(psnr=psnr_db(one, other, PEAK), ssim=ssim(one + 1, other + 1, PEAK))
        if lpips is not None and not no_lpips:
            try:
                keep_numbers(lpips=lpips(one, other))
            except Exception as error:  # somebody else's network: pictures may be too small for it
                lpips, missing["lpips"] = None, f"LPIPS failed: {error}"
        if extractor is not None:
            keep_numbers(exact=extractor.features(one), quantized=extractor.features(other))
            if extractor.classify is not None:
                keep_numbers(same=extractor.classify(one) == extractor.classify(other))
    if lpips is None:
        parts.pop("lpips", None)
    found = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    features = (found["exact"], found["quantized"]) if extractor is not None else None
    return eval_metrics.Pairs(
        found["signal"].T,
        found["noise"].T,
        found["sample_signal"],
        found["sample_noise"],
        found.get("psnr"),
        found.get("ssim"),
        found.get("lpips"),
        features,
        found.get("same"),
        missing,
    )


def _metrics(pairs: eval_metrics.Pairs, resamples: int, progress: Progress) -> dict[str, Any]:
    found = eval_metrics.metrics(
        pairs, resamples=resamples, progress=lambda done, total: progress("intervals", done, total)
    )
    return {name: metric.to_json() for name, metric in found.items()}


def _per_step(bundle: Bundle, pairs: eval_metrics.Pairs) -> list[dict[str, Any]]:
    calls = bundle.deployment.calls
    return [{"call": i, "timestep": calls[i], "db": json_db(db)} for i, db in enumerate(pairs.steps())]


def _write(folder: Path, found: Mapping[str, Any]) -> None:
    for name, text in ((PAGE, markdown(found)), (FACTS, json.dumps(found, indent=2, allow_nan=False) + "\n")):
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="\n")
