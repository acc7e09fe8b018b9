"""`mezzotint eval`: a bundle compared with its float model, in pairs of images from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.runtime import bounds

from ..progress import shown
from .options import (
    ClusterName,
    ConditionsFile,
    Json,
    NegativePrompt,
    NoiseSeed,
    PrecisionOfFloats,
    PromptsFile,
    Provider,
    ProviderOptions,
    Quiet,
    Reference,
    Threads,
    UnconditionalFile,
    number,
)


def evaluate(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    reference: Reference,
    pictures: Annotated[int, number(bounds.MOST_SAMPLES, "Pairs of images.", "-n", "--pictures")] = 64,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="Folder or URL that keeps the images, so that a stopped run goes on."),
    ] = None,
    seed: NoiseSeed = None,
    batch: Annotated[int, number(bounds.MOST_BATCH, "Images in one call.")] = 16,
    features: Annotated[
        str | None, typer.Option(help="digits, inception, none, FILE.onnx, or package.module:attribute (torch).")
    ] = None,
    correction: Annotated[
        bool | None,
        typer.Option(
            "--correction/--no-correction", help="Undo quantization noise; when left out, where the tables are valid."
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Also measure time and memory of a call.")] = True,
    resamples: Annotated[
        int,
        number(bounds.MOST_RESAMPLES, "Resamples of the bootstrap; fewer for the Frechet distance.", least=2),
    ] = 1000,
    conditions: ConditionsFile = None,
    unconditional: UnconditionalFile = None,
    prompts: PromptsFile = None,
    negative: NegativePrompt = None,
    pipeline: Annotated[
        Path | None, typer.Option(help="The pipeline's folder, whose encoders make the conditions of --prompts.")
    ] = None,
    threads: Threads = None,
    cluster: ClusterName = None,
    provider: Provider = "cpu",
    provider_option: ProviderOptions = None,
    precision: PrecisionOfFloats = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare a bundle's images with those of the float model, with confidence intervals, and the cost of a call."""
    from mezzotint.compiler.errors import ConditionError
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..evaluate.options import EvaluationOptions
    from ..evaluate.report import OTHER_WEIGHTS, print_evaluation
    from ..evaluate.run import PAGE_FILE, evaluate_with
    from ..io.networks import with_checked_networks
    from ..io.settings import load_condition_files, parse_engine
    from ..options import check_prompt_options
    from ..prompts.rows import bundle_rows
    from ..text import console

    engine = parse_engine(provider, provider_option, precision)
    check_prompt_options(prompts, negative, conditions, unconditional)
    rows, unconditional_rows = load_condition_files(conditions, unconditional)
    with shown(quiet=quiet or json) as report:
        opened = with_checked_networks(open_bundle(bundle)).on(engine)
        if prompts is not None:
            if pipeline is None:
                raise ConditionError(
                    "prompts need the encoders of a pipeline", where="--prompts", hint="give --pipeline FOLDER"
                )
            encoded = bundle_rows(opened, pipeline, prompts, negative, pictures, report)
            rows, unconditional_rows = dict(encoded.conditions), dict(encoded.unconditional)
        options = EvaluationOptions(
            pictures, seed, batch, rows, unconditional_rows, features, correction, speed, resamples=resamples
        )
        evaluation = evaluate_with(
            opened,
            reference,
            options,
            output=output,
            threads=threads,
            cluster=cluster,
            progress=report,
        )
    if json:
        if not evaluation.reference["same_weights"]:
            console.print_warning(OTHER_WEIGHTS)
        console.print_json(evaluation.to_json())
        return
    print_evaluation(evaluation)
    if output is not None:
        console.print_line(f"page: {output.rstrip('/')}/{PAGE_FILE}")
