"""The command line. A command imports its libraries when it runs, which keeps --help fast."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.runtime import bounds
from mezzotint.runtime.errors import InputError
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
    CommandGroup,
    ConditionsFile,
    ConfigFolder,
    Force,
    ImageChannels,
    InputRoles,
    Json,
    Loras,
    ModelArgument,
    NegativePrompt,
    PrecisionOfFloats,
    PredictionName,
    PromptsFile,
    Provider,
    ProviderOptions,
    Quiet,
    Threads,
    TimestepUnitName,
    UnconditionalFile,
    Variant,
    number,
)
from .panels import GroupedCommand
from .pipelines import Components, NegativeText, PreviewFile, PromptText, compile_whole, sample_prompts, wants_whole
from .recipes import recipes
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
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps statistics and trained blocks for later compilations.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="For the card: the model's licence, such as apache-2.0.")] = None,
    components: Components = None,
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
            calibration_samples, calibration_batch, conditions, unconditional, seed, cache, prompts, negative
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
        OutputOptions(dump_passes, license=license, force=force),
        AcceptanceOptions(min_sqnr, strict, acceptance_seconds),
        WeightOptions(parse_loras(lora or []), variant, config),
    )
    if wants_whole(model, components):
        said = {"quiet": quiet, "json": json}
        compile_whole(model, bundle, options, components, dry_run=dry_run, threads=threads, device=device, **said)
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


@app.command()
def sample(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[Path, typer.Option("-o", "--output", help=".png grid, or .npy array.")],
    n: Annotated[int | None, number(bounds.MOST_SAMPLES, "Number of images; 16, or 1 of a prompt.", "-n")] = None,
    prompt: PromptText = None,
    negative: NegativeText = None,
    preview: PreviewFile = None,
    sampler: Annotated[str | None, typer.Option(help="The sampler; the bundle's own when left out.")] = None,
    steps: Annotated[int | None, number(bounds.MOST_STEPS, "Steps; the bundle's own when left out.")] = None,
    eta: Annotated[float | None, typer.Option(help="DDIM's eta, from 0 to 1.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Scale of guidance; the bundle's own when left out.")] = None,
    seed: Annotated[int, number(bounds.LARGEST_SEED, "Seed of all noise.", least=0)] = 0,
    batch: Annotated[int | None, number(bounds.MOST_BATCH, "Images in one call; 16.")] = None,
    correction: Annotated[
        bool | None,
        typer.Option(
            "--correction/--no-correction", help="Undo quantization noise; when left out, where the tables are valid."
        ),
    ] = None,
    conditions: ConditionsFile = None,
    unconditional: UnconditionalFile = None,
    shard_size: Annotated[int | None, number(bounds.MOST_SAMPLES, "Folder: images in one shard; 256.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Folder: npz (float32) or png; npz.")] = None,
    shards: Annotated[str | None, typer.Option(help="Folder: only these shards, as 3 or 3:8 (3 to 7).")] = None,
    threads: Threads = None,
    provider: Provider = "cpu",
    provider_option: ProviderOptions = None,
    precision: PrecisionOfFloats = None,
    force: Annotated[bool, typer.Option("--force", help="Folder: draw existing shards again.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Sample images with a bundle. A folder gets shards; the same command resumes a run that was stopped."""
    from mezzotint.runtime.bundle.bundle import open_bundle
    from mezzotint.runtime.sampling.options import SamplingOptions

    from ..io.networks import with_checked_networks
    from ..io.settings import load_condition_files, parse_engine
    from ..shards.draw import check_output, sample_rows, sample_to_path
    from ..shards.shards import IMAGES_PER_SHARD, ShardOptions
    from ..text import console

    check_output(output, shard_size=shard_size, format=format_, shards=shards)
    engine = parse_engine(provider, provider_option, precision)
    if prompt is not None:
        refused = {"--sampler": sampler, "--eta": eta, "--batch": batch, "--conditions": conditions}
        refused |= {"--unconditional": unconditional, "--format": format_, "--shards": shards}
        choices: dict[str, Any] = {"n": n, "steps": steps, "guidance": guidance, "seed": seed, "correction": correction}
        said: dict[str, Any] = {"quiet": quiet, "json": json, "preview": preview}
        sample_prompts(
            bundle, output, prompt, negative, threads=threads, engine=engine, refused=refused, **choices, **said
        )
        return
    for name, value in (("--negative", negative), ("--preview", preview)):
        if value is not None:
            raise InputError(f"{name} belongs to a prompt", where=name, hint="add --prompt TEXT")
    opened = with_checked_networks(open_bundle(bundle)).on(engine)
    rows, unconditional_rows = load_condition_files(conditions, unconditional)
    options = SamplingOptions(
        sampler=sampler,
        steps=steps,
        eta=eta,
        guidance=guidance,
        seed=seed,
        batch=batch or 16,
        correction=correction,
        conditions=rows,
        unconditional=unconditional_rows,
    )
    shard_options = ShardOptions(shard_size or IMAGES_PER_SHARD, format_ or "npz", force=force)
    with shown(quiet=quiet or json) as report:
        summary = sample_to_path(
            opened, output, n or 16, options, shard_options, shards=shards, threads=threads, progress=report
        )
    console.print_json(summary) if json else console.print_pairs("sampled", sample_rows(summary))


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
