"""The command line. A command imports its libraries when it runs, which keeps --help fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.runtime import bounds
from mezzotint.runtime.targets import TARGETS

from ..options import (
    RECIPE,
    AcceptanceOptions,
    CalibrationOptions,
    CompileOptions,
    DeploymentOptions,
    ImportRoles,
    OutputOptions,
    RecipeOptions,
    WeightOptions,
)
from ..progress import shown
from .audit import audit
from .bench import bench
from .card import card
from .debug import debug
from .demo import demo
from .diff import diff
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .inspect import inspect
from .interchange import overlay, overrides
from .mix import mix
from .options import (
    SAMPLER_NAMES,
    ChannelAxis,
    ClusterName,
    CommandGroup,
    ConfigFolder,
    Force,
    ImageChannels,
    InputRoles,
    Json,
    Loras,
    ModelArgument,
    NegativePrompt,
    PredictionName,
    PromptsFile,
    Quiet,
    Threads,
    TimestepUnitName,
    Variant,
    number,
)
from .panels import GroupedCommand
from .pipelines import Components, ControlFolder, compile_whole, wants_whole
from .recipes import recipes
from .sample import sample
from .web import web

app = typer.Typer(
    name="mezzotint",
    cls=CommandGroup,
    help="A quantizing graph compiler for diffusion models.",
    epilog="Add --debug to any command for a traceback. Mezzotint sends no data over the network.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(demo)


@app.command("compile", cls=GroupedCommand)
def compile_(
    model: ModelArgument,
    bundle: Annotated[Path, typer.Option("-o", "--bundle", help="Bundle folder to write.")],
    recipe: Annotated[
        str | None,
        typer.Option(help=f"A named recipe or a YAML file; see `mezzotint recipes`. Usually {RECIPE}."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help=f"The engine that the graph is for: {', '.join(TARGETS)}; else the recipe's own.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="pass.option=value; may be repeated.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="scheduler_config.json, its folder, or a name, as sd or cosine:60.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help=f"The deployed sampler: {SAMPLER_NAMES}.")] = None,
    steps: Annotated[int, number(bounds.MOST_STEPS, "Steps of the deployed sampler.")] = 50,
    eta: Annotated[float, typer.Option(help="DDIM's eta, from 0 to 1.")] = 0.0,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance; 1 is no guidance.")] = 1.0,
    calibration_samples: Annotated[int, number(bounds.MOST_CALIBRATION_SAMPLES, "Images to calibrate on.")] = 32,
    calibration_batch: Annotated[int, number(bounds.MOST_BATCH, "Images in one calibration call.")] = 8,
    conditions: Annotated[str | None, typer.Option(help=".npz with the model's conditions, or `random`.")] = None,
    unconditional: Annotated[str | None, typer.Option(help="The same of the empty prompt, for guidance.")] = None,
    prompts: PromptsFile = None,
    negative: NegativePrompt = None,
    seed: Annotated[int, number(bounds.LARGEST_SEED, "Seed of the calibration noise.", least=0)] = 0,
    threads: Threads = None,
    cluster: ClusterName = None,
    device: Annotated[
        str, typer.Option(help="Where passes train: cpu, cuda or cuda:N. All else runs on the CPU.")
    ] = "cpu",
    input_: InputRoles = None,
    output: Annotated[
        str | None, typer.Option("--output", "--output-name", help="ONNX: epsilon=NAME, the output that predicts.")
    ] = None,
    prediction: PredictionName = None,
    timestep_unit: TimestepUnitName = None,
    size: Annotated[
        str | None, typer.Option(help="HxW for calibration, where the model leaves it open; or L, N, TxHxW.")
    ] = None,
    channels: ImageChannels = None,
    channel_axis: ChannelAxis = None,
    lora: Loras = None,
    variant: Variant = None,
    config: ConfigFolder = None,
    dump_passes: Annotated[
        bool, typer.Option("--dump-passes", help="Also write each pass's ONNX model, and its torch code if it trains.")
    ] = False,
    export: Annotated[Path | None, typer.Option(help="Also write the float model to this .onnx file.")] = None,
    cache: Annotated[
        str | None, typer.Option(help="Folder or URL that keeps statistics and trained blocks for later compilations.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the card: the model's licence, such as apache-2.0.")] = None,
    components: Components = None,
    control_images: ControlFolder = None,
    min_sqnr: Annotated[
        float, typer.Option(help="Warn where a group of timesteps has a lower SQNR of the prediction, in dB.")
    ] = 15.0,
    strict: Annotated[bool, typer.Option("--strict", help="Make that warning an error.")] = False,
    acceptance_seconds: Annotated[
        float, typer.Option(help="About how long the finished file may be run beside the float model.")
    ] = 120.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the options and print the plan, without running the model.")
    ] = False,
    force: Force = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compile a denoiser into a bundle, or a pipeline's folder into one with all of its networks."""
    from ..io import settings
    from ..model_weights import parse_loras
    from ..text import console

    output_name, predicted = settings.parse_output(output, prediction)
    _warn_of_untested_onnxruntime()
    options = CompileOptions(
        RecipeOptions(recipe, settings.parse_settings(set_ or []), target),
        DeploymentOptions(sampler, steps, eta, guidance, scheduler),
        CalibrationOptions(
            *(calibration_samples, calibration_batch, conditions, unconditional, seed, cache, prompts, negative),
            cluster=cluster,
        ),
        ImportRoles(
            settings.parse_roles(input_ or []),
            output_name,
            predicted,
            settings.parse_size(size),
            settings.parse_unit(timestep_unit),
            channels,
            channel_axis,
        ),
        OutputOptions(dump_passes, export, license, force),
        AcceptanceOptions(min_sqnr, strict, acceptance_seconds),
        WeightOptions(parse_loras(lora or []), variant, config),
    )
    if wants_whole(model, components, control_images):
        said = {"quiet": quiet, "json": json, "dry_run": dry_run}
        compile_whole(model, bundle, options, components, control_images, threads=threads, device=device, **said)
        return
    if dry_run:
        from ..dry_run import plan_compile

        plan = plan_compile(model, bundle, options, device)
        console.print_json(plan) if json else console.print_pairs("would compile", plan)
        return
    from ..api import compile_with
    from ..text.report import compile_rows, compile_summary

    with shown(quiet=quiet or json) as report:
        compiled = compile_with(model, bundle, options, threads=threads, device=device, progress=report)
    summary = compile_summary(compiled)
    console.print_json(summary) if json else console.print_pairs(f"compiled {model}", compile_rows(compiled, summary))
    acceptance = compiled.manifest.acceptance
    measured_here = not compiled.manifest.measured_in  # another engine has its own speed
    if acceptance is not None and acceptance.slower and measured_here and not json:
        console.print_warning(f"the compiled file is not faster than the float model: {acceptance.speed_text()}")


app.command()(export)
app.command()(sample)
app.command()(mix)
app.command()(inspect)
app.command()(audit)
app.command()(diff)
app.command()(debug)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(card)
app.command()(web)
app.command()(overlay)
app.command()(overrides)
app.command()(recipes)
app.command()(doctor)


def _warn_of_untested_onnxruntime() -> None:
    from ..doctor import untested_onnxruntime
    from ..text.console import print_warning

    if warning := untested_onnxruntime():
        print_warning(warning)


def _version(value: bool) -> None:
    if value:
        from mezzotint.runtime import __version__

        typer.echo(f"mezzotint {__version__}")
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
