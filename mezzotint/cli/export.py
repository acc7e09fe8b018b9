"""`mezzotint export`: the float ONNX file that a compilation starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import shown
from .options import (
    ChannelAxis,
    ConditionsFile,
    ConfigFolder,
    Force,
    ImageChannels,
    InputRoles,
    Loras,
    ModelArgument,
    PredictionName,
    Quiet,
    Threads,
    TimestepUnitName,
    Variant,
)


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help=".onnx file to write.")],
    scheduler: Annotated[
        str | None, typer.Option(help="scheduler_config.json, its folder, or a name, as sd or cosine:60.")
    ] = None,
    conditions: ConditionsFile = None,
    size: Annotated[str | None, typer.Option(help="HxW, where the model leaves it open; or L, N, TxHxW.")] = None,
    input_: InputRoles = None,
    output_name: Annotated[
        str | None, typer.Option("--output-name", help="ONNX: epsilon=NAME, the output that predicts.")
    ] = None,
    prediction: PredictionName = None,
    timestep_unit: TimestepUnitName = None,
    channels: ImageChannels = None,
    channel_axis: ChannelAxis = None,
    lora: Loras = None,
    variant: Variant = None,
    config: ConfigFolder = None,
    threads: Threads = None,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write the float ONNX model that a compilation starts from, for comparisons and for other tools.

    The options about the model are those of `mezzotint compile`, and so are inputs and outputs of the file.
    """
    from ..api import export_model
    from ..io import settings
    from ..model_weights import parse_loras
    from ..text import console

    name, predicted = settings.parse_output(output_name, prediction, "--output-name")
    with shown(quiet=quiet) as report:
        export_model(
            model,
            output,
            scheduler=scheduler,
            conditions=conditions,
            inputs=settings.parse_roles(input_ or []),
            output_name=name,
            prediction=predicted,
            size=settings.parse_size(size),
            timestep_unit=settings.parse_unit(timestep_unit),
            channels=channels,
            channel_axis=channel_axis,
            loras=parse_loras(lora or []),
            variant=variant,
            config=config,
            threads=threads,
            force=force,
            progress=report,
        )
    console.print_line(f"wrote {output}")
