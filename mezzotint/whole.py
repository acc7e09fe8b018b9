"""compile_pipeline: a whole pipeline, from a diffusers folder to a compiled one."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.bundle.card import CARD
from mezzotint.compiler.bundle.slot import make_slot
from mezzotint.compiler.bundle.staging import check_target, staged, write_text
from mezzotint.compiler.components.classes import DECODER, ENCODER, parts_of
from mezzotint.compiler.components.compile import compile_component
from mezzotint.compiler.components.data import COMPONENT_FORMS, ComponentData, ComponentForm, ComponentPasses
from mezzotint.compiler.core.pipeline import CPU, Context
from mezzotint.compiler.errors import RecipeError
from mezzotint.passes.recipes.components import EXACT_PICTURE, EXACT_TEXT, static_passes
from mezzotint.runtime import __version__
from mezzotint.runtime.bundle.pipeline import (
    MODEL_INDEX,
    ComponentEntry,
    PipelineFolder,
    PipelineManifest,
    open_pipeline,
    seal_pipeline,
)
from mezzotint.runtime.errors import CompileWarning
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.streams import SeedOffset

from .api import compile_with
from .diffusers import stand_in
from .dry_run import plan_compile
from .options import RANDOM, CompileOptions
from .pipeline.card import pipeline_card
from .pipeline.copies import copy_texts, written_index
from .pipeline.loading import library
from .pipeline.prompts import CALIBRATION_PROMPTS, HELD_OUT_PROMPTS
from .pipeline.schedulers import sampler_for, scheduler_config, write_scheduler
from .pipeline.source import PipelineSource, pipeline_source
from .pipeline.watch import (
    PipelineParts,
    Recording,
    batches_of,
    check_pipeline_class,
    drawn,
    load_parts,
    prompts_of,
    recorded,
)
from .prepared import deployment_of
from .progress import stage

if TYPE_CHECKING:
    from mezzotint.runtime.bundle.bundle import Bundle

IMAGES_OF_VAE = 4  # whose latents the decoder is calibrated on
PAIR = 2  # drawn by one call


@dataclass(frozen=True)
class ComponentOptions:
    """How the networks beside the denoiser are compiled, and what prompts the pipeline is calibrated with.

    `floor_db` is the fidelity below which an int8 component keeps further layers in float.
    """

    form: ComponentForm = "float"
    prompts: Sequence[str] = CALIBRATION_PROMPTS
    negative: str = ""
    floor_db: float = 30.0

    def __post_init__(self) -> None:
        if self.form not in COMPONENT_FORMS:
            raise RecipeError(
                f"components cannot be {self.form!r}",
                where="--components",
                hint=f"choose {' or '.join(COMPONENT_FORMS)}",
            )


def compile_pipeline(
    folder: str | Path,
    output: str | Path,
    options: CompileOptions | None = None,
    components: ComponentOptions | None = None,
    *,
    threads: int | None = None,
    device: str = CPU,
    progress: Progress = silent,
) -> PipelineFolder:
    """Compile a diffusers pipeline folder into a folder with all of its networks, and open that.

    The denoiser becomes a bundle, as `compile_with` makes it, in its slot; its conditions come from the pipeline's own
    encoders unless the options have some. Text encoders and VAE become ONNX files in float or int8.
    Raises the errors of compiler/errors.py; a failure leaves no folder, and an existing output as it was.
    """
    wanted = components or ComponentOptions()
    target = Path(output)
    source = pipeline_source(folder)
    kind = check_pipeline_class(source)
    options = _with_sampler(options or CompileOptions(), source)
    check_target(target, force=options.output.force)
    with staged(target, force=options.output.force) as (out, work):
        with stage(progress, "load the pipeline"):
            parts = load_parts(source, kind)
        bundle, seen, held_out = _denoiser(source, parts, options, wanted, work / "denoiser", threads, device, progress)
        with stage(progress, "draw for the components"):
            data = _data(parts, bundle, seen, held_out, wanted, options.calibration.seed)
        entries: dict[str, ComponentEntry] = {}
        for slot, row in source.components.items():
            for part in parts_of(slot, row):
                (work / part).mkdir()
                exact = EXACT_TEXT if row.kind == "text encoder" else EXACT_PICTURE
                passes = ComponentPasses(exact, static_passes, wanted.floor_db)
                context = Context(work / part, threads=threads, progress=progress)
                with stage(progress, f"compile {part}"):
                    entries[part] = compile_component(
                        parts.parts[slot], row, part, data[part], passes, wanted.form, out / part, context
                    )
                shutil.rmtree(work / part)
        scheduler = write_scheduler(bundle.schedule.config, bundle.deployment.sampler, out / "scheduler")
        for slot in source.copied:
            copy_texts(source.path / slot, out / slot)
        write_text(out / MODEL_INDEX, json.dumps(written_index(source, scheduler), indent=2) + "\n")
        shutil.move(bundle.path, out / source.denoiser)
        make_slot(out / source.denoiser)
        manifest = PipelineManifest(
            __version__, source.class_name, source.denoiser, entries, source.left_out, seen.options
        )
        write_text(out / CARD, pipeline_card(manifest, bundle.manifest, source.path.name))
        seal_pipeline(out, manifest)
    for slot, reason in source.left_out.items():
        warnings.warn(f"the compiled pipeline has no {slot}: {reason}", CompileWarning, stacklevel=2)
    return open_pipeline(target, verify=False)


def _with_sampler(options: CompileOptions, source: PipelineSource) -> CompileOptions:
    """Return the options with the sampler of the pipeline's own scheduler, where none is asked for."""
    if options.deployment.sampler is not None or options.deployment.scheduler is not None:
        return options
    config = scheduler_config(source.path)
    sampler = sampler_for(config)
    if sampler is None:
        warnings.warn(
            f"no sampler does what a {config.get('_class_name')} does: the compiled pipeline has another scheduler",
            CompileWarning,
            stacklevel=3,
        )
    return replace(options, deployment=replace(options.deployment, sampler=sampler))


def _denoiser(
    source: PipelineSource,
    parts: PipelineParts,
    options: CompileOptions,
    wanted: ComponentOptions,
    folder: Path,
    threads: int | None,
    device: str,
    progress: Progress,
) -> tuple[Bundle, Recording, Recording]:
    """Return the bundle of the denoiser, and what the pipeline did with the prompts and with those held out."""
    deployment, size = (
        deployment_of(source.path, options.deployment, options.roles, options.weights),
        options.roles.size,
    )
    with stage(progress, "encode prompts"):
        seen = recorded(parts, wanted.prompts, wanted.negative, deployment, size)
        held_out = recorded(parts, HELD_OUT_PROMPTS, wanted.negative, deployment, size)
    calibration = options.calibration
    if calibration.conditions is None:
        unconditional = seen.unconditional if deployment.guided else None
        calibration = replace(calibration, conditions=seen.conditions, unconditional=unconditional)
    inner = replace(options, calibration=calibration, output=replace(options.output, force=False))
    bundle = compile_with(source.path, folder, inner, threads=threads, device=device, progress=progress)
    return bundle, seen, held_out


def _data(
    parts: PipelineParts, bundle: Bundle, seen: Recording, held_out: Recording, wanted: ComponentOptions, seed: int
) -> dict[str, ComponentData]:
    """Return the data of each component by its folder: prompts, and latents that the bundle draws."""
    found = {
        slot: ComponentData(
            batches_of(rows),
            batches_of(held_out.texts[slot]),
            f"{len(rows['input_ids'])} prompts, measured on {len(held_out.texts[slot]['input_ids'])} others",
        )
        for slot, rows in seen.texts.items()
    }
    denoiser, steps = stand_in(bundle), bundle.deployment.steps
    groups: list[list[dict[str, Any]]] = []
    for prompts, offset in (
        (wanted.prompts[:IMAGES_OF_VAE], SeedOffset.COMPONENTS),
        (HELD_OUT_PROMPTS[:PAIR], SeedOffset.COMPONENTS_HELD_OUT),
    ):
        generator = library("torch").Generator().manual_seed(offset.after(seed))
        pairs = [prompts[i : i + PAIR] for i in range(0, len(prompts), PAIR)]
        calls = [{**prompts_of(parts.kind, pair, wanted.negative), **seen.options} for pair in pairs]
        groups.append([drawn(parts, denoiser, call, steps, generator) for call in calls])
    words = f"latents of {len(wanted.prompts[:IMAGES_OF_VAE])} images, measured on {PAIR} others"
    for part in (DECODER, ENCODER):
        own, others = ([batch for one in group for batch in batches_of(one[part])] for group in groups)
        found[part] = ComponentData(own, others, words)
    return found


def plan_pipeline(
    folder: str | Path, output: Path, options: CompileOptions, components: ComponentOptions, device: str = CPU
) -> dict[str, Any]:
    """Return what `compile_pipeline` would do, as plain data. Raises what it raises before anything is loaded."""
    source = pipeline_source(folder)
    options = _with_sampler(options, source)
    calibration = options.calibration
    if calibration.conditions is None:
        calibration = replace(calibration, conditions=RANDOM, unconditional=RANDOM)
    plan = plan_compile(str(folder), output, replace(options, calibration=calibration), device)
    rows = {
        part: f"{row.name}, {components.form}"
        for slot, row in source.components.items()
        for part in parts_of(slot, row)
    }
    return {**plan, "pipeline": source.class_name, "components": rows, "left out": dict(source.left_out)}
