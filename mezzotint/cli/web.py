"""`mezzotint web`: a folder for a static web server, which samples a bundle in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.runtime import bounds

from .options import ConditionsFile, Force, Json, UnconditionalFile, number


def web(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    float_: Annotated[
        Path | None, typer.Option("--float", help="The float .onnx that `mezzotint export` wrote, to sample beside.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="The sampler; the bundle's own when left out.")] = None,
    steps: Annotated[
        list[int] | None,
        number(bounds.MOST_STEPS, "Steps to choose from; may be repeated. The bundle's own.", "--steps"),
    ] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's eta, from 0 to 1.")] = None,
    correction: Annotated[
        bool | None,
        typer.Option(
            "--correction/--no-correction", help="Undo quantization noise; when left out, where the tables are valid."
        ),
    ] = None,
    seed: Annotated[int, number(bounds.LARGEST_SEED, "The seed that the page begins with.", least=0)] = 0,
    n: Annotated[
        int | None, number(bounds.MOST_BATCH, "The number of images that it begins with, at most 64; 4.", "-n")
    ] = None,
    conditions: ConditionsFile = None,
    unconditional: UnconditionalFile = None,
    onnxruntime_web: Annotated[
        Path | None,
        typer.Option("--onnxruntime-web", help="Folder with the npm package onnxruntime-web; npm is asked otherwise."),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write a page that samples the bundle in a browser: a folder for any static web server, without a network."""
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..io.networks import with_checked_networks
    from ..io.settings import load_condition_files
    from ..text import console
    from ..web.page import WebOptions, write_web

    opened = with_checked_networks(open_bundle(bundle))
    rows, without = load_condition_files(conditions, unconditional)
    options = WebOptions(float_, sampler, steps or (), eta, correction, seed, n, rows, without)
    manifest = write_web(opened, output, options, runtime=onnxruntime_web, force=force)
    if json:
        console.print_json({"folder": str(output), **manifest})
        return
    console.print_line(f"wrote {output}")
    console.print_line(f"serve it:  python -m http.server -d {output}")
