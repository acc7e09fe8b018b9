"""What the noise correction is worth: images of float and quantized from the same noise.

For each sampler that adds noise, each seed and each width of the weights (static ranges, weights to nearest) images are
drawn by the float network, by the quantized one, and by the quantized one with its output corrected (slope and bias),
and with the sampler's noise lessened as well. Results: SQNR of epsilon on held-out calls, the Frechet distance to the
float network's images on features of a classifier, how many are of the same class, and PSNR. Bundles and images stay in
the folder.

The Frechet distance of resampled images is larger than that of all (mezzotint/evaluate/metrics.py): its draws are
scaled by the value over their median. Over several seeds it is the mean; its interval resamples seeds and their draws.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint import compile_model, open_bundle
from mezzotint.cluster.placement import Fetch
from mezzotint.evaluate.feature_sums import DrawnMoments, draw_counts
from mezzotint.evaluate.metrics import frechet_draws, interval_ends
from mezzotint.frechet import CLASSIFIER, FeatureNet, Features, network_digest
from mezzotint.io.files import replacing
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.progress import shown
from mezzotint.runtime.arrays import Doubles
from mezzotint.runtime.bundle.bundle import MANIFEST, Bundle
from mezzotint.runtime.compare import db_text, psnr_db
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.session import Denoiser, running_version
from mezzotint.runtime.signature import Images, Predict
from mezzotint.runtime.streams import BOOTSTRAP
from tools.experiment_file import NoiseExperiment, NoisySampler, place_models
from tools.experiment_results import RESAMPLES, Interval, Panel, Results, Table, over_seeds
from tools.leaderboard_model import FloatModel
from tools.leaderboard_recipes import chosen_options
from tools.pieces import Job, fill

RECIPE = "d2-dpm-gated"
CHUNK, BATCH = 500, 50
OTHER_SEED = 7  # above that of the calibration: images are others than calibration and fit have seen
FRECHET_DRAWS = 100
FIGURES = ("epsilon, dB", "Frechet", "95 %", "same class", "95 %", "PSNR, dB", "95 %")
COLUMNS = ("sampler", "weights", "correction", "seeds", *FIGURES)


@dataclass(frozen=True)
class NoiseRow:
    """The images of one part of the correction: PSNR of each in dB, whether its class is the same, and the distance.

    `epsilon` is the SQNR of the prediction, the mean over held-out calls in dB, None without any error.
    """

    weights: int
    part: str
    epsilon: float | None
    frechet: float
    frechet_draws: tuple[float, ...]
    same: tuple[bool, ...]
    psnr: tuple[float, ...]


@dataclass(frozen=True)
class NoiseRows:
    """The rows of a sampler and a seed; `key` is what makes two measurements the same."""

    key: str
    rows: tuple[NoiseRow, ...]

    def save(self, file: Path) -> None:
        with replacing(file) as part:
            part.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8", newline="\n")

    @staticmethod
    def load(file: Path, key: str) -> NoiseRows | None:
        """Return the rows of a file; None where there are none, or others."""
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            rows = tuple(NoiseRow(**row) for row in data["rows"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return NoiseRows(key, rows) if data["key"] == key else None


@dataclass(frozen=True)
class NoiseWork:
    """The study of one model; a piece is (sampler, seed), and its result are the rows."""

    experiment: NoiseExperiment
    folder: Path
    model: str
    scheduler: str | None
    digest: str
    features: Path

    @property
    def threads(self) -> int:
        return self.experiment.threads

    def open(self, fetch: Fetch) -> Callable[[tuple[int, int]], NoiseRows]:
        return self.measure

    def home_key(self, sampler: NoisySampler, seed: int) -> str:
        """Return what makes two sets of images the same, apart from their number."""
        facts = [self.digest, sampler.model_dump(), seed, self.experiment.calibration, self.threads, running_version()]
        recipe = chosen_options(RECIPES[RECIPE])
        return hashlib.sha256(json.dumps([facts, recipe], sort_keys=True).encode()).hexdigest()

    def key(self, sampler: NoisySampler, seed: int) -> str:
        plan = self.experiment
        facts = [self.home_key(sampler, seed), plan.images, plan.weight_bits, plan.parts]
        facts.append(network_digest(self.features))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def measure(self, piece: tuple[int, int]) -> NoiseRows:
        """Return the rows of a piece. Images that were drawn before it was stopped are taken from the folder."""
        index, seed = piece
        sampler = self.experiment.samplers[index]
        home = self.folder / "images" / f"{_name(sampler, seed)}-{self.home_key(sampler, seed)[:12]}"
        rows: list[NoiseRow] = []
        with shown() as report:
            features = FeatureNet(self.features, threads=self.threads)
            bits_of = self.experiment.weight_bits
            bundles = [self._compiled(home, sampler, seed, bits, report) for bits in bits_of]
            exact = Denoiser(home / "float.onnx", bundles[0].signature, threads=self.threads)
            reference = self._draw(exact, bundles[0], None, home / "float", report)
            wanted = features.features(reference), features.classify(reference)
            for bits, bundle in zip(bits_of, bundles, strict=True):
                rows += self._parts(bundle, bits, reference, wanted, features, home, report)
        return NoiseRows(self.key(sampler, seed), tuple(rows))

    def _parts(
        self,
        bundle: Bundle,
        bits: int,
        reference: Images,
        wanted: tuple[Features, Any],
        features: FeatureNet,
        home: Path,
        report: Progress,
    ) -> list[NoiseRow]:
        assert bundle.correction is not None and bundle.manifest.noise is not None
        shares = bundle.manifest.noise["shares"]
        rows = []
        for part, correction in variants(bundle.correction).items():
            if part not in self.experiment.parts:
                continue
            mine = self._draw(bundle.denoiser(self.threads), bundle, correction, home / f"w{bits}a8-{part}", report)
            psnr = psnr_db(np.clip(reference, -1, 1), np.clip(mine, -1, 1), peak=2.0)
            distance, draws = _frechet(wanted[0], features.features(mine))
            rows.append(
                NoiseRow(
                    bits,
                    part,
                    shares.get("none" if part == "none" else "kept"),
                    distance,
                    tuple(round(draw, 5) for draw in draws),
                    tuple(bool(same) for same in wanted[1] == features.classify(mine)),
                    tuple(round(float(db), 2) for db in psnr),
                )
            )
        return rows

    def _compiled(self, home: Path, sampler: NoisySampler, seed: int, bits: int, report: Progress) -> Bundle:
        target = home / f"w{bits}a8"
        if (target / MANIFEST).is_file():
            return open_bundle(target)
        return compile_model(
            self.model,
            target,
            recipe=RECIPE,
            settings={"choose_scales.weight_bits": bits},
            scheduler=self.scheduler,
            sampler=sampler.sampler,
            eta=sampler.eta,
            steps=sampler.steps,
            seed=seed,
            calibration_samples=self.experiment.calibration,
            threads=self.threads,
            export=home / "float.onnx",
            force=True,
            progress=report,
        )

    def _draw(
        self, net: Predict, bundle: Bundle, correction: Correction | None, folder: Path, report: Progress
    ) -> Images:
        """Return `[images, C, H, W]`, in chunks that are files of the folder."""
        found, total = [], self.experiment.images
        for first in range(0, total, CHUNK):
            file, count = folder / f"{first:06d}.npy", min(CHUNK, total - first)
            if not (file.is_file() and len(known := np.load(file)) == count):
                batches = [(first + k, min(BATCH, count - k)) for k in range(0, count, BATCH)]
                known = np.concatenate([_batch(net, bundle, correction, *batch) for batch in batches])
                with replacing(file) as part, part.open("wb") as out:
                    np.save(out, known)
            found.append(known)
            report(folder.name, first + count, total)
        return np.concatenate(found)


def _name(sampler: NoisySampler, seed: int) -> str:
    eta = f"-eta{sampler.eta:g}" if sampler.eta else ""
    return f"{sampler.sampler}-{sampler.steps}{eta}-seed{seed}"


def variants(correction: Correction) -> dict[str, Correction | None]:
    """Nothing; the output corrected (slope and bias); and the sampler's noise lessened as well."""
    return {"none": None, "output": replace(correction, excess=np.zeros_like(correction.excess)), "all": correction}


def _batch(net: Predict, bundle: Bundle, correction: Correction | None, first: int, count: int) -> Images:
    seed = int(bundle.manifest.calibration.seed) + OTHER_SEED
    x = samplers.initial_noise(seed, (count, *bundle.sample_shape), first=first)
    noise = samplers.seeded_noise(seed, first=first)
    return samplers.sample(net, x, bundle.schedule, bundle.deployment, noise=noise, correction=correction)


def _frechet(one: Features, other: Features) -> tuple[float, Doubles]:
    """Return the distance and draws of it. Raises InputError for fewer images than features."""
    counts = draw_counts(len(one), FRECHET_DRAWS, seed=0)
    both = DrawnMoments(counts), DrawnMoments(counts)
    for moments, features in zip(both, (one, other), strict=True):
        moments.add(features)
    return frechet_draws(*both)


def measure_noise(
    experiment: NoiseExperiment, file: Path, folder: Path, given: dict[str, Path], cluster: str | None, write_only: bool
) -> Results | None:
    """Measure the rows that are missing, and return the results; None without any row. Raises what the rows raise."""
    ((model, scheduler),) = place_models([experiment.model], file, given)
    digest = FloatModel(model, folder, scheduler=scheduler).digest
    features = CLASSIFIER if experiment.features is None else file.parent / experiment.features
    if not features.is_file():
        raise InputError("there is no such network of features", where=str(features))
    work = NoiseWork(experiment, folder, model, scheduler, digest, features)
    wanted = []
    for index, sampler in enumerate(experiment.samplers):
        for seed in experiment.seeds:
            name = _name(sampler, seed)
            wanted.append((Job(folder / "rows" / f"{name}.json", (index, seed), name), work.key(sampler, seed)))
    if not write_only:
        fill(lambda: work, [job for job, key in wanted if NoiseRows.load(job.file, key) is None], cluster)
    groups: dict[tuple[str, int, str], list[NoiseRow]] = {}
    for job, key in wanted:
        sampler = experiment.samplers[job.piece[0]]
        eta = f", eta {sampler.eta:g}" if sampler.eta else ""
        for row in getattr(NoiseRows.load(job.file, key), "rows", ()):
            groups.setdefault((f"{sampler.sampler}, {sampler.steps} steps{eta}", row.weights, row.part), []).append(row)
    return results_of(experiment, groups) if groups else None


def results_of(experiment: NoiseExperiment, groups: dict[tuple[str, int, str], list[NoiseRow]]) -> Results:
    lines: list[dict[str, Any]] = []
    text: list[list[str]] = []
    points: dict[str, list[tuple[str, Interval]]] = {"Frechet distance": [], "same class": [], "PSNR, dB": []}
    for (sampler, bits, part), rows in groups.items():
        known = [row.epsilon for row in rows if row.epsilon is not None]
        epsilon = float(np.mean(known)) if known else None
        frechet = _mean_distance(rows)
        same = over_seeds([np.array(row.same, np.float64) for row in rows], np.mean)
        psnr = over_seeds([np.array(row.psnr, np.float64) for row in rows], np.median)
        figures = {"frechet": frechet.to_json(), "same": same.to_json(), "psnr": psnr.to_json()}
        names = {"sampler": sampler, "weights": bits, "part": part, "seeds": len(rows), "epsilon": epsilon}
        lines.append({**names, **figures})
        cells = [*frechet.text(4), *same.text(4), *psnr.text(2)]
        text.append([sampler, f"W{bits}A8", part, str(len(rows)), db_text(epsilon, 2), *cells])
        for name, interval in zip(points, (frechet, same, psnr), strict=True):
            points[name].append((f"{sampler} W{bits}A8 {part}", interval))
    about = (
        f"{experiment.images} images of each row, beside the float network's from the same noise. Correction: none; "
    )
    about += "output is slope and bias; all has the sampler's noise lessened as well. Epsilon is on held-out calls."
    panels = [[Panel(name, name, each)] for name, each in points.items()]
    facts = {"experiment": experiment.model_dump(), "lines": lines}
    return Results(about, [Table("Noise correction", COLUMNS, text)], panels, facts)


def _mean_distance(rows: Sequence[NoiseRow]) -> Interval:
    rng = BOOTSTRAP.generator(0)
    seeds = rng.integers(len(rows), size=(RESAMPLES, len(rows)))
    known = np.array([row.frechet_draws for row in rows], np.float64)
    which = rng.integers(known.shape[1], size=seeds.shape)
    draws = known[seeds, which].mean(axis=1)
    return Interval(float(np.mean([row.frechet for row in rows])), *interval_ends(draws))
