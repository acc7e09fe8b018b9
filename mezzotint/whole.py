"""compile_pipeline: a whole pipeline, from a diffusers folder to a compiled one."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.bundle.card import CARD
from mezzotint.compiler.bundle.slot import make_slot
from mezzotint.compiler.bundle.staging import check_target, staged, write_text
from mezzotint.compiler.components.classes import parts_of, with_states
from mezzotint.compiler.components.compile import compile_component
from mezzotint.compiler.components.data import COMPONENT_FORMS, ComponentData, ComponentForm, ComponentPasses
from mezzotint.compiler.core.pipeline import CPU, Context
from mezzotint.compiler.errors import ConditionError, RecipeError
from mezzotint.passes.recipes.components import EXACT_PICTURE, EXACT_TEXT, static_passes
from mezzotint.runtime import __version__
from mezzotint.runtime.bundle.layout import CONTROLNET
from mezzotint.runtime.bundle.pipeline import (
    COMPONENT_MODEL,
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
from .options import CompileOptions
from .pipeline.card import pipeline_card
from .pipeline.controlnet import PipelineControl, pipeline_control
from .pipeline.copies import copy_texts, written_index
from .pipeline.schedulers import sampler_for, scheduler_config, write_scheduler
from .pipeline.source import PipelineSource, pipeline_source
from .pipeline.watch import (
    PipelineParts,
    batches_of,
    check_pipeline_class,
    drawn,
    load_parts,
    recorded,
)
from .prepared import prepare
from .progress import stage
from .prompts.calls import library, prompt_arguments, quiet_libraries
from .prompts.texts import DEFAULT_PROMPTS, PromptTexts, held_out_prompts, read_prompts

if TYPE_CHECKING:
    from mezzotint.runtime.bundle.bundle import Bundle

IMAGES_OF_VAE = 4  # whose latents the decoder is calibrated on
PAIR = 2  # drawn by one call


@dataclass(frozen=True)
class ComponentOptions:
    """How the networks beside the denoiser are compiled.

    `floor_db` is the fidelity below which an int8 component keeps further layers in float. `control_images` is a
    folder of images for a ControlNet to be calibrated on, or one file; None for line drawings.
    """

    form: ComponentForm = "float"
    floor_db: float = 30.0
    control_images: Path | None = None

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

    The denoiser becomes a bundle, as `compile_with` makes it, in its slot. Without conditions or prompts in the options
    it is calibrated on the prompts of the package. Text encoders and VAE become ONNX files in float or int8.
    Raises the errors of compiler/errors.py; a failure leaves no folder, and an existing output as it was.
    """
    wanted = components or ComponentOptions()
    target = Path(output)
    source = pipeline_source(folder)
    kind = check_pipeline_class(source)
    options = _with_prompts(_with_sampler(options or CompileOptions(), source))
    texts = _texts(options)
    check_target(target, force=options.output.force)
    with staged(target, force=options.output.force) as (out, work):
        inner = options
        control, exported = _control(source, wanted, options, work / "residuals" / COMPONENT_MODEL, threads), None
        if control is not None:
            inner = replace(inner, calibration=replace(inner.calibration, condition_network=control.network))
            prepare(source.path, work / "denoiser", inner, device)  # what it refuses needs no export
            (work / CONTROLNET).mkdir()
            with stage(progress, f"export {CONTROLNET}"):
                exported = control.export(work / CONTROLNET, threads)
        bundle = compile_with(source.path, work / "denoiser", inner, threads=threads, device=device, progress=progress)
        with stage(progress, "load the pipeline"), quiet_libraries():
            parts = load_parts(source, kind, None if control is None else control.images)
        with stage(progress, "draw for the components"):
            data, arguments, states = _data(parts, bundle, texts, options)
        entries: dict[str, ComponentEntry] = {}
        for slot, known in source.components.items():
            row = with_states(known, slot, states, str(source.path))
            for part in parts_of(slot, row):
                (work / part).mkdir(exist_ok=True)
                exact = EXACT_TEXT if row.kind == "text encoder" else EXACT_PICTURE
                passes = ComponentPasses(exact, static_passes, wanted.floor_db)
                context = Context(work / part, threads=threads, progress=progress)
                with stage(progress, f"compile {part}"):
                    entries[part] = compile_component(
                        parts.parts[slot],
                        row,
                        part,
                        data[part],
                        passes,
                        wanted.form,
                        out / part,
                        context,
                        exported if part == CONTROLNET else None,
                    )
                shutil.rmtree(work / part)
        scheduler = write_scheduler(bundle.schedule.config, bundle.deployment.sampler, out / "scheduler")
        for slot in source.copied:
            copy_texts(source.path / slot, out / slot)
        write_text(out / MODEL_INDEX, json.dumps(written_index(source, scheduler), indent=2) + "\n")
        shutil.move(bundle.path, out / source.denoiser)
        make_slot(out / source.denoiser)
        manifest = PipelineManifest(
            __version__, source.class_name, source.denoiser, entries, source.left_out, arguments
        )
        write_text(out / CARD, pipeline_card(manifest, bundle.manifest, source.path.name))
        seal_pipeline(out, manifest)
    for slot, reason in source.left_out.items():
        warnings.warn(f"the compiled pipeline has no {slot}: {reason}", CompileWarning, stacklevel=2)
    return open_pipeline(target, verify=False)


def _control(
    source: PipelineSource, wanted: ComponentOptions, options: CompileOptions, file: Path, threads: int | None
) -> PipelineControl | None:
    """Return a pipeline's ControlNet, None for one without. Raises ConditionError for images that nothing reads."""
    if source.has_controlnet:
        if wanted.control_images is None:
            warnings.warn(
                "the ControlNet is calibrated on line drawings; images of the kind that it reads: --control-images",
                CompileWarning,
                stacklevel=3,
            )
        return pipeline_control(source, wanted.control_images, options.roles.size, file, threads)
    if wanted.control_images is not None:
        raise ConditionError(
            f"a {source.class_name} has no ControlNet", where="--control-images", hint="leave the option out"
        )
    return None


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


def _with_prompts(options: CompileOptions) -> CompileOptions:
    """Return the options with the prompts of the package where neither prompts nor conditions were given."""
    calibration = options.calibration
    if calibration.prompts is not None or calibration.conditions is not None:
        return options
    return replace(options, calibration=replace(calibration, prompts=DEFAULT_PROMPTS))


def _texts(options: CompileOptions) -> PromptTexts:
    """Return the prompts that components are calibrated on: none that they are measured on. Raises ConditionError."""
    calibration, held_out = options.calibration, held_out_prompts()
    texts = read_prompts(calibration.prompts or DEFAULT_PROMPTS, calibration.negative)
    return replace(texts, prompts=tuple(p for p in texts.prompts if p not in held_out)).first(calibration.samples)


def _data(
    parts: PipelineParts, bundle: Bundle, texts: PromptTexts, options: CompileOptions
) -> tuple[dict[str, ComponentData], Mapping[str, Any], Mapping[str, tuple[int, ...]]]:
    """Return the data of each component by its folder, prompts and latents that the bundle draws; the arguments of
    the pipeline's call beside the prompts; and the hidden states that it reads of each text encoder."""
    size, held_out = options.roles.size, held_out_prompts()
    seen, others = (
        recorded(parts, some, texts.negative, bundle.deployment, size) for some in (texts.prompts, held_out)
    )
    found = {
        slot: ComponentData(
            seen.batches(slot),
            others.batches(slot),
            f"{seen.count(slot)} prompts, measured on {others.count(slot)} others",
        )
        for slot in seen.texts
    }
    denoiser, steps = stand_in(bundle), bundle.deployment.steps
    groups: list[list[dict[str, Any]]] = []
    for some, offset, other in (
        (texts.prompts[:IMAGES_OF_VAE], SeedOffset.COMPONENTS, False),
        (held_out[:PAIR], SeedOffset.COMPONENTS_HELD_OUT, True),
    ):
        generator = library("torch").Generator().manual_seed(offset.after(options.calibration.seed))
        pairs = [some[i : i + PAIR] for i in range(0, len(some), PAIR)]
        calls = [
            {
                **prompt_arguments(parts.kind, pair, texts.negative),
                **seen.options,
                **parts.image_arguments(len(pair), held_out=other),
            }
            for pair in pairs
        ]
        groups.append([drawn(parts, denoiser, call, steps, generator) for call in calls])
    words = f"latents of {len(texts.prompts[:IMAGES_OF_VAE])} images, measured on {PAIR} others"
    for part in groups[0][0]:
        own, unseen = ([batch for one in group for batch in batches_of(one[part])] for group in groups)
        found[part] = ComponentData(own, unseen, words)
    if parts.control is not None:
        said = f"calls for the {words}; {parts.control.words}"
        found[CONTROLNET] = replace(found[CONTROLNET], words=said)
    return found, seen.options, seen.states


def plan_pipeline(
    folder: str | Path, output: Path, options: CompileOptions, components: ComponentOptions, device: str = CPU
) -> dict[str, Any]:
    """Return what `compile_pipeline` would do, as plain data. Raises what it raises before anything is loaded."""
    source = pipeline_source(folder)
    options = _with_prompts(_with_sampler(options, source))
    plan = plan_compile(str(folder), output, options, device)
    rows = {
        part: f"{row.name}, {components.form}"
        for slot, row in source.components.items()
        for part in parts_of(slot, row)
    }
    return {**plan, "pipeline": source.class_name, "components": rows, "left out": dict(source.left_out)}
