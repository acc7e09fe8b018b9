"""compile_model, export_model, sample: the work of the command line, from Python."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.acceptance.accept import AcceptanceLimits, accept
from mezzotint.compiler.bundle.staging import staged, staged_file
from mezzotint.compiler.bundle.writer import Compilation, save_model, write_bundle
from mezzotint.compiler.calibration.calibrate import check_conditions
from mezzotint.compiler.calibration.conditions import sizes_of_rows
from mezzotint.compiler.calibration.finite import require_finite
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import CPU, Context, Recipe
from mezzotint.compiler.errors import ModelError
from mezzotint.runtime import __version__
from mezzotint.runtime.bundle.acceptance import Acceptance
from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.bundle.manifest_entries import RecipeEntry
from mezzotint.runtime.errors import CompileWarning, InputError, LowFidelity
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.options import SamplingOptions
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.session import open_session
from mezzotint.runtime.signature import Images, Prediction, TimestepUnit

from .cluster.connection import check_cluster, cluster_or_none
from .cluster.spread import ClusterSpread
from .importing import import_source
from .io.hub import card_fields
from .options import (
    AcceptanceOptions,
    CalibrationOptions,
    CompileOptions,
    DeploymentOptions,
    ImportRoles,
    OutputOptions,
    RecipeOptions,
    WeightOptions,
)
from .prepared import calibration_rows, prepare, prepare_model, with_prompts
from .shared_cache import opened_cache

if TYPE_CHECKING:
    from mezzotint.runtime.engine import Engine
    from mezzotint.runtime.sampling.condition_network import ConditionNetwork

    from .io.sources import Model
    from .options import ConditionSource, LoraSource

VERSIONED = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def compile_model(
    model: Model,
    output: str | Path,
    *,
    recipe: str | Recipe | None = None,
    settings: Mapping[str, Any] | None = None,
    target: str | None = None,
    scheduler: str | Path | Schedule | None = None,
    sampler: str | None = None,
    steps: int = 50,
    eta: float = 0.0,
    guidance: float = 1.0,
    calibration_samples: int = 32,
    calibration_batch: int = 8,
    conditions: ConditionSource = None,
    unconditional: ConditionSource = None,
    prompts: str | Path | None = None,
    negative: str | None = None,
    condition_network: ConditionNetwork | None = None,
    seed: int = 0,
    threads: int | None = None,
    cluster: str | None = None,
    device: str = CPU,
    inputs: Mapping[str, str] | None = None,
    output_name: str | None = None,
    prediction: Prediction | None = None,
    size: tuple[int, ...] | None = None,
    timestep_unit: TimestepUnit | None = None,
    channels: int | None = None,
    channel_axis: int | None = None,
    loras: LoraSource = (),
    variant: str | None = None,
    config: str | Path | None = None,
    dump_passes: bool = False,
    export: str | Path | None = None,
    cache: str | Path | None = None,
    license: str | None = None,
    min_sqnr: float = 15.0,
    strict: bool = False,
    acceptance_seconds: float = 120.0,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Compile a denoiser into a bundle folder and open it.

    `model` is `"digits"`, a diffusers model or pipeline folder, an .onnx file, or a network of diffusers in memory, of
    a class that docs/models.md lists. `settings` maps "pass.option" to a value. `target` is the engine that the graph
    is written for: "onnxruntime" (its integer CPU kernels; the default), "openvino", "tensorrt" or "portable". Without
    a `recipe` it is the best one for the target. `sampler` (ddim, or flow-euler for flow matching, when left out),
    `steps`, `eta` and `guidance` are the deployment: tables hold the timesteps that it calls.
    `conditions` is a mapping of arrays `[rows, ...]`, an .npz file, or "random", and so is `unconditional`, the rows of
    the empty prompt or of the null class, which guidance needs. In their place `prompts`, a text file or "default", and
    `negative` are encoded by the pipeline's own encoders. `condition_network` computes conditions that change from call
    to call, as those of a ControlNet (runtime/sampling/condition_network.py). `inputs`, `output_name` and `prediction`
    name the roles of an ONNX file that cannot be inferred; `size` is (height, width) where the file leaves them open,
    or the sizes of another sample beside its batch and channels. `timestep_unit` says what its timestep counts:
    "steps", "fraction" (0 to 1) or "reversed_fraction" (1 to 0); `channels` how many channels are the image's;
    `channel_axis` is theirs.
    `loras` are safetensors files, or pairs of a file and a weight, which are fused into a diffusers model's weights;
    `variant` says which weights of a folder are read, as "fp16", where it has several. `config` is a diffusers folder
    with the configuration of a checkpoint of one file (.safetensors).
    `export` is a path for the imported float graph. `cache` is a folder, or a URL of fsspec, of calibration statistics:
    compilations that calibrate on the same graph in the same way measure once. With `cluster`, "local" or an address
    (cluster/connection.py), its workers compute the pieces of observe, round_weights, fit_noise, and of reconstruct and
    learn_scales from the start of the pass, with the same result. `license` is the model's, for the bundle's card.
    `device` is where passes train: "cpu", "cuda" or "cuda:N"; all else runs on the CPU, and one that no pass of the
    recipe would use is refused. The finished file is run beside the float model before the bundle is written, for
    about `acceptance_seconds` at most. Where the SQNR of the prediction is below `min_sqnr` dB at a group of
    timesteps, a `LowFidelity` warning names the worst layers and what helps; with `strict` this is an error.
    `progress` is a function of (stage, done, total); `mezzotint.progress.auto()` shows bars in a terminal and lines in
    a notebook.

    Raises the errors of compiler/errors.py; an existing output is left as it was.
    """
    options = CompileOptions(
        RecipeOptions(recipe, settings or {}, target),
        DeploymentOptions(sampler, steps, eta, guidance, scheduler),
        CalibrationOptions(
            calibration_samples,
            calibration_batch,
            conditions,
            unconditional,
            seed,
            cache,
            prompts,
            negative,
            condition_network,
            cluster,
        ),
        ImportRoles(inputs or {}, output_name, prediction, size, timestep_unit, channels, channel_axis),
        OutputOptions(dump_passes, export, license, force),
        AcceptanceOptions(min_sqnr, strict, acceptance_seconds),
        WeightOptions(loras, variant, config),
    )
    return compile_with(model, Path(output), options, threads=threads, device=device, progress=progress)


def compile_with(
    model: Model,
    target: Path,
    options: CompileOptions,
    *,
    threads: int | None = None,
    device: str = CPU,
    progress: Progress = silent,
) -> Bundle:
    """Do the work of `compile_model`, for its options as one value."""
    if options.calibration.cluster is not None:
        check_cluster(options.calibration.cluster)
    with opened_cache(options.calibration.cache) as cache:
        _write_compiled(model, target, options, cache, threads, device, progress)
    compiled = open_bundle(target, verify=False)  # its files were hashed while they were written
    for text in compiled.manifest.warnings:
        warnings.warn(text, CompileWarning, stacklevel=2)
    if compiled.manifest.acceptance is not None and compiled.manifest.acceptance.warning:
        warnings.warn(compiled.manifest.acceptance.warning, LowFidelity, stacklevel=2)
    return compiled


def _write_compiled(
    model: Model,
    target: Path,
    options: CompileOptions,
    cache: Cache | None,
    threads: int | None,
    device: str,
    progress: Progress,
) -> None:
    """Compile, and move what was written to `target`."""
    calibration, output = options.calibration, options.output
    prepared = with_prompts(prepare(model, target, options, device), cache, progress)
    recipe = prepared.recipe
    card = card_fields(model if isinstance(model, (str, Path)) else None, output.license)
    with ExitStack() as exported, staged(target, force=output.force) as (bundle, work):
        imported = import_source(
            prepared.source, work, prepared.deployment, prepared.roles, threads, progress, prepared.sizes
        )
        program = imported = replace(imported, target=recipe.target)
        if output.export is not None:
            save_model(program.model, exported.enter_context(staged_file(Path(output.export), force=output.force))[0])
        conditions, unconditional = calibration_rows(prepared, program.conditions(), calibration)
        context = Context(
            work,
            seed=calibration.seed,
            threads=threads,
            device=device,
            samples=calibration.samples,
            batch=calibration.batch,
            conditions=conditions,
            unconditional=unconditional,
            progress=progress,
            cache=cache,
            condition_network=calibration.condition_network,
        )
        check_conditions(program, context)
        require_finite(program, context)
        with cluster_or_none(calibration.cluster, threads) as cluster:
            program = pipeline.run_passes(
                program,
                recipe.passes,
                context if cluster is None else replace(context, spread=ClusterSpread(cluster, progress)),
                dump=pipeline.Dump(bundle / "passes", models=output.dump_passes),
                reproducer=target.absolute().with_name(f"{target.name}.failed"),
            )
        compilation = Compilation(
            mezzotint=__version__,
            recipe=RecipeEntry(recipe.to_json()),
            calibration=prepared.entry(calibration, sizes_of_rows(program.conditions(), conditions)),
            versions={"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
            card=card,
        )
        wanted = options.acceptance
        limits = AcceptanceLimits(wanted.min_sqnr, wanted.strict, wanted.acceptance_seconds)
        finished = program

        def run(file: Path) -> Acceptance:
            return accept(imported, finished, file, recipe, context, limits)

        write_bundle(program, bundle, work, compilation, threads=threads, accept=run)


def export_model(
    model: Model,
    output: str | Path,
    *,
    scheduler: str | Path | Schedule | None = None,
    conditions: ConditionSource = None,
    inputs: Mapping[str, str] | None = None,
    output_name: str | None = None,
    prediction: Prediction | None = None,
    size: tuple[int, ...] | None = None,
    timestep_unit: TimestepUnit | None = None,
    channels: int | None = None,
    channel_axis: int | None = None,
    loras: LoraSource = (),
    variant: str | None = None,
    config: str | Path | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the float ONNX file that a compilation starts from: the imported model, before any pass.

    The options are those of `compile_model`, and the file has the inputs and the output of a bundle with the same ones.
    """
    target = Path(output)
    roles = ImportRoles(inputs or {}, output_name, prediction, size, timestep_unit, channels, channel_axis)
    deployment = DeploymentOptions(steps=1, scheduler=scheduler)
    weights = WeightOptions(loras, variant, config)
    prepared = prepare_model(model, target, deployment, roles, conditions, weights, force=force)
    source = prepared.source
    with staged_file(target, force=force) as (file, work):
        program = import_source(source, work, prepared.deployment, prepared.roles, threads, progress, prepared.sizes)
        save_model(program.model, file)
        try:
            open_session(file, threads=threads, level="none")  # what is not a model for onnxruntime is not written
        except InputError as error:
            raise ModelError(error.what, where=source.name, hint="export the model again") from error
    return target


def sample(
    bundle: Bundle | str | Path,
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
    engine: Engine | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Images:
    """Return `n` images from a bundle, float32 `[n, C, H, W]`. The options are those of `Bundle.sample`.

    `engine` is what computes (`mezzotint.find_engine`), None for the one that the bundle is on.
    """
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    opened = opened if engine is None else opened.on(engine)
    plan = (sampler, steps, eta, guidance)
    options = SamplingOptions(*plan, seed, batch, correction, conditions or {}, unconditional or {})
    return opened.sample_with(options, n, first=first, threads=threads, progress=progress)
