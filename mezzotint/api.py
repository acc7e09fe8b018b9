"""compile_model, export_model, sample: what the command line does, from Python."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.bundle.staging import staged, staged_file
from mezzotint.compiler.bundle.writer import save_model, write_bundle
from mezzotint.compiler.calibration.calibrate import check_conditions, random_conditions
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context, Recipe
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import ConditionError, ModelError
from mezzotint.compiler.frontend.from_onnx import import_onnx
from mezzotint.passes.recipes.catalog import DEFAULT
from mezzotint.passes.recipes.files import load_recipe, with_options
from mezzotint.runtime import __version__
from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.deployment import UNGUIDED, Deployment, usual_sampler
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.streams import SeedOffset

from .io.hub import card_fields
from .io.settings import load_conditions
from .io.sources import Source, resolve

if TYPE_CHECKING:
    import torch

    from mezzotint.runtime.signature import Prediction

    Model = str | Path | torch.nn.Module
RANDOM = "random"
VERSIONED = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def compile_model(
    model: Model,
    output: str | Path,
    *,
    recipe: str | Recipe = DEFAULT,
    settings: Mapping[str, Any] | None = None,
    scheduler: str | Path | Schedule | None = None,
    sampler: str | None = None,
    steps: int = 50,
    eta: float = 0.0,
    guidance: float = UNGUIDED,
    calibration_samples: int = 32,
    calibration_batch: int = 8,
    conditions: Conditions | str | Path | None = None,
    unconditional: Conditions | str | Path | None = None,
    seed: int = 0,
    threads: int | None = None,
    inputs: Mapping[str, str] | None = None,
    output_name: str | None = None,
    prediction: Prediction | None = None,
    size: tuple[int, int] | None = None,
    dump_passes: bool = False,
    export: str | Path | None = None,
    cache: str | Path | None = None,
    license: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Compile a denoiser into a bundle folder and open it.

    `model` is `"digits"`, a diffusers model or pipeline folder, an .onnx file, or a `UNet2DModel`,
    `UNet2DConditionModel` or `DiTTransformer2DModel` in memory. `settings` maps "pass.option" to a value. `sampler`
    (ddim, or flow-euler for flow matching, when left out), `steps`, `eta` and `guidance` are the deployment: tables
    hold the timesteps it calls.
    `conditions` is a mapping of arrays `[rows, ...]`, an .npz file, or "random", and so is `unconditional`, the rows of
    the empty prompt or of the null class, which guidance needs. `inputs`, `output_name` and `prediction` say roles of
    an ONNX file that cannot be inferred; `size` is (height, width) where it leaves them open. `export` also writes the
    imported float graph there. `cache` is a folder where statistics are kept: compilations that calibrate on the same
    graph in the same way measure once. `license` is the identifier of the model's licence, for the bundle's card; when
    left out, what the card in the model's own folder says.

    Raises the errors of compiler/errors.py; an existing output is left as it was.
    """
    if isinstance(conditions, (str, Path)) and str(conditions) != RANDOM:
        conditions = load_conditions(Path(conditions))
    if isinstance(unconditional, (str, Path)) and str(unconditional) != RANDOM:
        unconditional = load_conditions(Path(unconditional))
    if calibration_samples < 1 or calibration_batch < 1:
        raise ConditionError(
            f"nothing to calibrate on: {calibration_samples} samples in batches of {calibration_batch}",
            hint="both must be at least 1",
        )
    chosen = with_options(load_recipe(recipe) if isinstance(recipe, str) else recipe, dict(settings or {}))
    source = resolve(model, scheduler)
    deployment = Deployment.of(source.schedule, sampler or usual_sampler(source.schedule), steps, eta, guidance)
    target = Path(output)
    told = card_fields(model if isinstance(model, (str, Path)) else None, license)
    with staged(target, force=force) as (bundle, work):
        program = _import(source, work, deployment, inputs, output_name, prediction, size, threads, progress)
        if export is not None:
            save_model(program.model, Path(export))
        rows = _conditions(program, conditions, calibration_samples, seed)
        context = Context(
            work,
            seed=seed,
            threads=threads,
            samples=calibration_samples,
            batch=calibration_batch,
            conditions=rows,
            unconditional=_conditions(program, unconditional, 1, SeedOffset.UNCONDITIONAL.after(seed)),
            progress=progress,
            cache=None if cache is None else Path(cache).absolute(),
        )
        check_conditions(program, context)
        program = pipeline.run_passes(
            program,
            chosen.passes,
            context,
            dump=pipeline.Dump(bundle / "passes", models=dump_passes),
            reproducer=target.absolute().with_name(f"{target.name}.failed"),
        )
        facts = {
            "mezzotint": __version__,
            "recipe": chosen.to_json(),
            "calibration": {"seed": seed, "samples": calibration_samples, "batch": calibration_batch},
            "versions": {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}},
            **({"card": told} if told else {}),
        }
        write_bundle(program, bundle, work, facts, threads=threads)
    return open_bundle(target, verify=False)  # written a moment ago, and hashed while writing


def export_model(
    model: Model,
    output: str | Path,
    *,
    scheduler: str | Path | Schedule | None = None,
    size: tuple[int, int] | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Path:
    """Write the float ONNX file that a compile starts from: the model as its front end reads it, no pass applied."""
    target = Path(output)
    source = resolve(model, scheduler)
    deployment = Deployment.of(source.schedule, usual_sampler(source.schedule), 1)
    with staged_file(target, force=force) as (file, work):
        program = _import(source, work, deployment, None, None, None, size, threads, progress)
        save_model(program.model, file)
    return target


def sample(bundle: Bundle | str | Path, n: int, **options: Any) -> npt.NDArray[np.float32]:
    """`n` pictures from a bundle, float32 `[n, C, H, W]`; options as in `Bundle.sample`."""
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    return opened.sample(n, **options)


def _import(
    source: Source,
    work: Path,
    deployment: Deployment,
    inputs: Mapping[str, str] | None,
    output_name: str | None,
    prediction: Prediction | None,
    size: tuple[int, int] | None,
    threads: int | None,
    progress: Progress,
) -> Program:
    with _stage(progress, f"import {source.name}"):
        if source.kind == "onnx":
            assert source.path is not None
            return import_onnx(
                source.path,
                work,
                schedule=source.schedule,
                deployment=deployment,
                inputs=inputs,
                output=output_name,
                prediction=prediction,
                size=size,
                config=source.config,
            )
        if inputs or output_name or prediction:
            raise ModelError(
                "roles of inputs and outputs are for ONNX files", hint="a diffusers model knows its own; leave them out"
            )
        torch_front = _torch_front_end()
        options: dict[str, Any] = {
            "schedule": source.schedule,
            "deployment": deployment,
            "size": size,
            "name": source.name,
            "threads": threads,
        }
        program: Program
        if source.module is not None:
            program = torch_front.import_torch(source.module, work, **options)
        else:
            program = torch_front.import_folder(source.path, work, **options)
        return program


def _torch_front_end() -> Any:
    try:
        from mezzotint.compiler.frontend import from_torch as import_torch
    except ModuleNotFoundError as error:
        raise ModelError(
            f"compiling a diffusers model needs {error.name}, which is not installed",
            hint="install the extra: pip install 'mezzotint[torch]', or compile an .onnx file",
        ) from error
    return import_torch


def _conditions(program: Program, wish: Conditions | str | Path | None, rows: int, seed: int) -> Conditions:
    if isinstance(wish, (str, Path)):
        return random_conditions(program, rows, seed)
    return {name: np.asarray(array) for name, array in (wish or {}).items()}


@contextmanager
def _stage(progress: Progress, name: str) -> Iterator[None]:
    """Report a stage of one step that cannot say how far it is; one that fails is not reported as done."""
    progress(name, 0, 1)
    yield
    progress(name, 1, 1)
