"""What `compile` and `sample` do with whole pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mezzotint.runtime.errors import InputError

from ..progress import shown

if TYPE_CHECKING:
    from mezzotint.runtime.engine import Engine

    from ..options import CompileOptions

Components = Annotated[
    str | None,
    typer.Option(help="A pipeline's text encoders and VAE: float (usual), int8, or none: the denoiser alone."),
]
PromptText = Annotated[str | None, typer.Option("--prompt", help="Of a compiled pipeline: draw images of this text.")]
NegativeText = Annotated[str | None, typer.Option("--negative", help="With --prompt: what guidance leads away from.")]
PreviewFile = Annotated[
    Path | None, typer.Option("--preview", help="With --prompt: a .png that shows the image while it is denoised.")
]
ControlFolder = Annotated[
    Path | None, typer.Option(help="Of a pipeline with a ControlNet: a folder of images for it to be calibrated on.")
]
ControlFile = Annotated[
    Path | None, typer.Option("--control-image", help="With --prompt: the image that the pipeline's ControlNet reads.")
]
ControlScale = Annotated[
    float | None, typer.Option("--control-scale", help="With --prompt: the weight of the ControlNet; 1.")
]
NONE = "none"
_NO_CONDITIONS = "leave it out: the pipeline's own encoders make the conditions of a prompt"


def wants_whole(model: str, components: str | None, control_images: Path | None) -> bool:
    """Return whether a whole pipeline is to be compiled. Raises InputError for components of anything else."""
    from ..pipeline.source import is_whole_pipeline

    whole = components != NONE and is_whole_pipeline(model)
    if control_images is not None and not whole:
        raise InputError(
            "control images are for a whole pipeline with a ControlNet", where="--control-images", hint="leave it out"
        )
    if components == NONE:
        return False
    if components is not None and not whole:
        raise InputError(
            "only the folder of a pipeline has components: text encoders or a VAE beside its denoiser",
            where="--components",
            hint="leave it out",
        )
    return whole


def compile_whole(
    model: str,
    output: Path,
    options: CompileOptions,
    form: str | None,
    control_images: Path | None,
    *,
    dry_run: bool,
    threads: int | None,
    device: str,
    quiet: bool,
    json: bool,
) -> None:
    """Compile a pipeline and print what became of it, or with `dry_run` what would."""
    from ..pipeline.card import COMPONENT_COLUMNS, component_rows
    from ..text import console
    from ..whole import ComponentOptions, compile_pipeline, plan_pipeline

    components = ComponentOptions(form or "float", control_images=control_images)  # type: ignore[arg-type]
    if dry_run:
        plan = plan_pipeline(model, output, options, components, device)
        console.print_json(plan) if json else console.print_pairs("would compile", plan)
        return
    from ..text.report import compile_rows, compile_summary

    with shown(quiet=quiet or json) as report:
        made = compile_pipeline(model, output, options, components, threads=threads, device=device, progress=report)
    summary = compile_summary(made.bundle)
    if json:
        entries = {name: entry.to_json() for name, entry in made.manifest.components.items()}
        console.print_json({"pipeline": str(made.path), "denoiser": summary, "components": entries})
        return
    console.print_pairs(f"compiled {model}", compile_rows(made.bundle, summary))
    console.print_table("components", COMPONENT_COLUMNS, component_rows(made.manifest))
    console.print_line(f"pipeline: {made.path}")


def sample_prompts(
    folder: Path,
    output: Path,
    prompt: str,
    negative: str | None,
    *,
    n: int | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    correction: bool | None,
    preview: Path | None,
    control_image: Path | None,
    control_scale: float | None,
    threads: int | None,
    engine: Engine,
    refused: dict[str, Any],
    quiet: bool,
    json: bool,
) -> None:
    """Draw images of a prompt. `refused` are options that only a bundle's own sampling has, None where left out."""
    from ..prompt_images import PromptOptions, draw_prompt
    from ..text import console

    for name, value in refused.items():
        if value is not None:
            raise InputError(f"{name} is for the samples of a bundle", where=name, hint=_NO_CONDITIONS)
    scale = 1.0 if control_scale is None else control_scale
    plan = (steps, guidance, seed, correction)
    options = PromptOptions(prompt, negative or "", n or 1, *plan, preview, control_image, scale)
    with shown(quiet=quiet or json) as report:
        summary = draw_prompt(folder, output, options, threads=threads, engine=engine, progress=report)
    console.print_json(summary) if json else console.print_pairs("sampled", summary)
