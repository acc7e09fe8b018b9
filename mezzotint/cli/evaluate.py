"""`mezzotint eval`: a bundle compared with its float model, in pairs of images from the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.runtime import bounds

from ..progress import shown
from .options import (
    ConditionsFile,
    Json,
    NoiseSeed,
    PrecisionOfFloats,
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
        Path | None,
        typer.Option("-o", "--output", help="Folder that keeps the images, so that a stopped run can be resumed."),
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
    threads: Threads = None,
    provider: Provider = "cpu",
    provider_option: ProviderOptions = None,
    precision: PrecisionOfFloats = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare a bundle's images with those of the float model, with confidence intervals, and the cost of a call."""
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..evaluate.options import EvaluationOptions
    from ..evaluate.report import OTHER_WEIGHTS, print_evaluation
    from ..evaluate.run import PAGE_FILE, evaluate_with
    from ..io.networks import with_checked_networks
    from ..io.settings import load_condition_files, parse_engine
    from ..text import console

    engine = parse_engine(provider, provider_option, precision)
    rows, unconditional_rows = load_condition_files(conditions, unconditional)
    options = EvaluationOptions(
        pictures, seed, batch, rows, unconditional_rows, features, correction, speed, resamples=resamples
    )
    with shown(quiet=quiet or json) as report:
        evaluation = evaluate_with(
            with_checked_networks(open_bundle(bundle)).on(engine),
            reference,
            options,
            output=output,
            threads=threads,
            progress=report,
        )
    if json:
        if not evaluation.reference["same_weights"]:
            console.print_warning(OTHER_WEIGHTS)
        console.print_json(evaluation.to_json())
        return
    print_evaluation(evaluation)
    if output is not None:
        console.print_line(f"page: {output / PAGE_FILE}")
