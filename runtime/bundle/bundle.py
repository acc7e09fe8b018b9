"""A compiled model on disk: opened, checked, and sampled from.

    mezzotint.json                     the manifest: facts of the bundle, how it was made, the hash of every file
    unet/model.onnx (+ model.onnx.data); other precisions of it as model.NAME.onnx, see precisions.py
    scheduler/scheduler_config.json    as it came from the model; correction.safetensors is optional

The manifest's digest covers everything except times, so the same compilation twice gives the same digest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..engine import Engine, EngineUsage
from ..errors import BundleError, InputError, MezzotintError, TimestepNotDeployed
from ..progress import CallProgress
from ..sampling.condition_network import ConditionNetwork
from ..sampling.correction import Correction
from ..sampling.deployment import Deployment
from ..sampling.guidance import Conditions, predictors, rows_in_turn, with_labels
from ..sampling.options import SamplingOptions
from ..sampling.samplers import StepInfo, initial_noise, sample, seeded_noise
from ..sampling.schedule import Schedule
from ..session import CPU_ENGINE, Denoiser
from ..signature import Images
from .controlnet import pipeline_controlnet
from .file_checks import check_file, file_sha256, read_manifest
from .layout import CORRECTION, MANIFEST, MODEL, SCHEDULER, bundle_folder, located
from .manifest import Manifest, manifest_digest
from .manifest_entries import FileEntry
from .precisions import Precisions

__all__ = ["CORRECTION", "MANIFEST", "MODEL", "SCHEDULER", "Bundle", "check_file", "file_sha256", "open_bundle"]


def seal_bundle(folder: str | Path, manifest: Manifest) -> Manifest:
    """Write `mezzotint.json` with the hash of every file in the folder and the digest. Return what was written."""
    folder = Path(folder)
    paths = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    files = {
        name: FileEntry(file_sha256(folder / name), (folder / name).stat().st_size)
        for name in paths
        if name != MANIFEST
    }
    manifest = replace(manifest, files=files)
    manifest = replace(manifest, digest=manifest_digest(manifest.to_json()))
    text = json.dumps(manifest.to_json(), indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8", newline="\n")
    return manifest


def open_bundle(path: str | Path, *, verify: bool = True) -> Bundle:
    """Open a bundle folder, or the denoiser of a pipeline's folder (layout.py), with its ControlNet if it has one.

    `verify` reads every file and compares its hash; the manifest is always checked.
    Raises BundleError: no folder, no manifest, unreadable, of another format, a file missing or changed.
    """
    folder = bundle_folder(Path(path))
    if not folder.is_dir():
        raise BundleError("there is no such folder", where=str(folder), hint="give the folder that `compile` wrote")
    manifest = read_manifest(folder / MANIFEST)
    for name, entry in manifest.files.items():
        check_file(folder, name, entry, verify)
    networks = () if manifest.mixture is None else [entry.file for entry in manifest.mixture.precisions.values()]
    for name in (located(MODEL, manifest.files), SCHEDULER, *networks):
        if name not in manifest.files:
            raise BundleError(f"the manifest does not list {name}", where=str(folder / MANIFEST))
    computing = None if folder == Path(path) else pipeline_controlnet(Path(path), verify=verify)
    return Bundle(folder, manifest, condition_network=computing)


class Bundle:
    """An opened bundle; make it with `open_bundle`. Its networks run on `engine`; `on` returns it on another one.

    `condition_network` computes conditions that change from call to call; None where all are rows.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        engine: Engine = CPU_ENGINE,
        condition_network: ConditionNetwork | None = None,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.engine = engine
        self.condition_network = condition_network
        self._model = located(MODEL, manifest.files)
        self.model_path = path / self._model
        self.signature = manifest.signature
        self.deployment = manifest.deployment
        self.deployed_timesteps = manifest.deployed_timesteps
        self.sample_shape = manifest.sample_shape
        self.precisions: Precisions | None = None
        self._denoisers: dict[tuple[int | None, str], Denoiser] = {}
        try:
            self.schedule = Schedule.load(path / SCHEDULER)
            if manifest.mixture is not None:
                steps = self.deployment.solver(self.schedule).steps
                self.precisions = Precisions.of_mixture(manifest.mixture, steps)
        except MezzotintError as error:
            what = f"the manifest does not fit the other files: {type(error).__name__} {error.what}"
            raise BundleError(what, where=str(path / MANIFEST), hint="compile the model again") from error

    def __repr__(self) -> str:
        """Return the bundle in short, one line for each fact."""
        facts, kernels = self.manifest, self.manifest.kernels
        lines = {
            "recipe": facts.recipe.name,
            "deployment": str(self.deployment),
            "sample": " x ".join(map(str, self.sample_shape)),
            "size": f"{self.model_bytes / 1e6:.2f} MB",
            "kernels": f"{kernels.integer} of {kernels.integer + kernels.floating} integer",
            "islands": f"{len(facts.islands)}",
            "correction": "yes" if CORRECTION in facts.files else "no",
        }
        return "\n".join([f"Bundle {self.path}", *(f"  {key:<11}{value}" for key, value in lines.items())])

    @property
    def model_bytes(self) -> int:
        """The bytes of the ONNX files and their external data."""
        folder, slash, _ = self._model.rpartition("/")
        prefix = folder + slash or "model."
        return sum(entry.bytes for name, entry in self.manifest.files.items() if name.startswith(prefix))

    def on(self, engine: Engine) -> Bundle:
        """Return this bundle with its networks on an engine (`runtime.providers.names.find_engine`).

        Nothing is opened before the first network: an engine that cannot run it raises EngineError there.
        """
        return self if engine == self.engine else Bundle(self.path, self.manifest, engine, self.condition_network)

    def fed_by(self, network: ConditionNetwork) -> Bundle:
        """Return this bundle with conditions that a network computes at each call. Raises InputError for others."""
        known = self.signature.conditions
        if unknown := [name for name in (*network.outputs, *network.shared) if name not in known]:
            raise InputError(
                f"the bundle has no condition {unknown[0]!r}, which the network computes or shares",
                where=str(self.path),
                hint=f"its conditions are: {', '.join(known) or 'none'}",
            )
        return Bundle(self.path, self.manifest, self.engine, network)

    def usage(self, threads: int | None = None) -> EngineUsage:
        """Return what the network really uses: library, device, threads, precision, nodes that fell back."""
        return self.denoiser(threads).usage

    @cached_property
    def correction(self) -> Correction | None:
        """The tables that undo the quantization noise; None for a bundle without."""
        return Correction.load(self.path / CORRECTION) if CORRECTION in self.manifest.files else None

    def correction_for(self, deployment: Deployment) -> Correction | None:
        """Return the tables for a deployment, interpolated where only the steps differ; None where they do not fit."""
        table = self.correction
        if table is None or table.refusal(deployment):
            return None
        steps = deployment.solver(self.schedule).steps
        if self.precisions is not None:
            return table.picked(deployment, steps, self.precisions.nearest(steps))
        return table.for_deployment(deployment, steps)

    def denoiser(self, threads: int | None = None, precision: str | None = None) -> Denoiser:
        """Return the network, or one of `precisions` by name, as a callable. It opens once for each `threads`."""
        known = self.precisions.files if self.precisions else {}
        if precision is not None and precision not in known:
            raise InputError(f"no precision is called {precision!r}", where=str(self.path), hint="see `inspect`")
        key = threads, self._model if precision is None else known[precision]
        if key not in self._denoisers:
            deployed = self.deployed_timesteps
            self._denoisers[key] = Denoiser(
                self.path / key[1], self.signature, threads=threads, deployed=deployed, engine=self.engine
            )
        return self._denoisers[key]

    def denoisers(self, plan: Deployment | None = None, threads: int | None = None) -> list[Denoiser]:
        """Return the network of each call of `plan`, by default the deployment: they differ by precision."""
        plan = plan or self.deployment
        if self.precisions is None:
            return [self.denoiser(threads)] * len(plan.calls)
        return [self.denoiser(threads, name) for name in self.precisions.of(plan.solver(self.schedule).steps)]

    def sample(
        self,
        n: int,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance: float | None = None,
        seed: int = 0,
        first: int = 0,
        batch: int = 16,
        correction: bool | None = None,
        conditions: Conditions | None = None,
        unconditional: Conditions | None = None,
        threads: int | None = None,
        progress: CallProgress | None = None,
    ) -> Images:
        """Return `n` images, float32 `[n, C, H, W]` in the model's own range.

        Sampler, steps, eta and guidance default to those of the deployment (eta to 0 with another sampler). Image i
        depends only on `seed` and i, not on `batch`; with `first` the result is images first .. first + n - 1 of the
        seed. `correction` None applies the tables where they are valid, True requires them, False ignores them; None
        and True raise InputError for tables of another guidance scale. `conditions` are arrays `[rows, ...]`,
        which the images take in turn; so is `unconditional`, which guidance needs. Class labels that the signature
        knows may be left out: image i gets class i, starting over. Raises TimestepNotDeployed before
        the first call if a timestep of the steps has no row in the tables.
        """
        plan = (sampler, steps, eta, guidance)
        options = SamplingOptions(*plan, seed, batch, correction, conditions or {}, unconditional or {})
        return self.sample_with(options, n, first=first, threads=threads, progress=progress)

    def sample_with(
        self,
        options: SamplingOptions,
        n: int,
        *,
        first: int = 0,
        threads: int | None = None,
        progress: CallProgress | None = None,
    ) -> Images:
        """Return what `sample` returns, for its choices as one value."""
        options = options.checked(n)
        plan = self.plan(options.sampler, options.steps, options.eta, options.guidance)
        table = self.chosen_correction(plan, options.correction)
        networks = self.denoisers(plan, threads)
        # A graph with a fixed batch size gets whole batches; the surplus images are dropped.
        fixed = networks[0].fixed_batch and networks[0].fixed_batch // (2 if plan.guided else 1)
        size = fixed or min(options.batch, n)
        computing = self.condition_network
        both = with_labels(self.signature, plan, options.conditions, options.unconditional, first, computing)
        starts = range(0, n, size)
        done = 0

        def count(info: StepInfo) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, len(starts) * len(plan.calls))

        batches = []
        for start in starts:
            width = size if fixed else min(size, n - start)
            rows, without = (rows_in_turn(arrays, start, width) for arrays in both)
            predict = predictors(networks, plan, rows, without, computing)
            x = initial_noise(options.seed, (width, *self.sample_shape), first=first + start)
            noise = seeded_noise(options.seed, first=first + start)
            x = sample(predict, x, self.schedule, plan, noise=noise, correction=table, callback=count)
            batches.append(x[: n - start])
        return np.concatenate(batches)

    def plan(
        self,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance: float | None = None,
    ) -> Deployment:
        """Return the deployment with these choices instead of its own. Raises TimestepNotDeployed, ScheduleError."""
        own = self.deployment
        sampler = sampler or own.sampler
        if eta is None:
            eta = own.eta if sampler == own.sampler else 0.0
        scale = own.guidance if guidance is None else guidance
        plan = Deployment.of(self.schedule, sampler, own.steps if steps is None else steps, eta, scale)
        deployed = self.deployed_timesteps
        missing = [] if deployed is None else [t for t in plan.timesteps if t not in deployed]
        if missing:
            counts = self.deployed_steps(sampler)
            raise TimestepNotDeployed(
                f"{plan.steps} steps of {sampler} call timestep {missing[0]:g}, for which this bundle has no row "
                f"({len(missing)} of {len(plan.timesteps)} are missing)",
                where=str(self.path),
                hint=f"these numbers of steps work: {', '.join(map(str, counts)) or 'none'}",
            )
        return plan

    def deployed_steps(self, sampler: str | None = None) -> tuple[int, ...]:
        """Return the numbers of steps whose timesteps all have a row; without frozen tables, every possible number."""
        deployed = self.deployed_timesteps
        most = self.schedule.num_train_timesteps if deployed is None else len(deployed)
        counts = []
        for steps in range(1, most + 1):
            try:
                times = Deployment.of(self.schedule, sampler or self.deployment.sampler, steps).timesteps
            except MezzotintError:  # too many for the schedule's offset, or too few for the sampler
                continue
            if deployed is None or set(times) <= set(deployed):
                counts.append(steps)
        return tuple(counts)

    def chosen_correction(self, plan: Deployment, requested: bool | None) -> Correction | None:
        """Return the tables that `sample` applies for a plan, where `requested` is its `correction`."""
        if requested is False:
            return None
        reason = self.correction.refusal(plan) if self.correction else "this bundle has none"
        # Another sampler is a visible choice. Another guidance scale is not, and it multiplies the errors.
        own = self.deployment
        visible = self.correction is None or (plan.sampler, plan.eta) != (own.sampler, own.eta)
        if reason is None or (requested is None and visible):
            return self.correction_for(plan)
        raise InputError(
            f"the correction is not valid for {plan}: {reason}",
            where=str(self.path),
            hint="sample as it was fitted, compile the bundle for this, or switch it off (--no-correction)",
        )
