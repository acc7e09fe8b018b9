"""`mezzotint sample`: images of a bundle, or of a prompt by a whole pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from mezzotint.runtime import bounds
from mezzotint.runtime.errors import InputError

from ..progress import shown
from .options import (
    ClusterName,
    ConditionsFile,
    Json,
    PrecisionOfFloats,
    Provider,
    ProviderOptions,
    Quiet,
    Threads,
    UnconditionalFile,
    number,
)
from .pipelines import ControlFile, ControlScale, NegativeText, PreviewFile, PromptText, sample_prompts


def sample(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    output: Annotated[str, typer.Option("-o", "--output", help=".png grid, .npy array, folder or URL: s3://...")],
    n: Annotated[int | None, number(bounds.MOST_SAMPLES, "Number of images; 16, or 1 of a prompt.", "-n")] = None,
    prompt: PromptText = None,
    negative: NegativeText = None,
    preview: PreviewFile = None,
    control_image: ControlFile = None,
    control_scale: ControlScale = None,
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
    cluster: ClusterName = None,
    provider: Provider = "cpu",
    provider_option: ProviderOptions = None,
    precision: PrecisionOfFloats = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Folder: draw one batch, and print what the run will take and cost.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Folder: draw existing shards again.")] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Sample images with a bundle. A folder gets shards; the same command resumes a run that was stopped."""
    from mezzotint.runtime.bundle.bundle import open_bundle
    from mezzotint.runtime.sampling.options import SamplingOptions

    from ..io.networks import with_checked_networks
    from ..io.objects import is_url
    from ..io.settings import load_condition_files, parse_engine
    from ..shards.draw import FILES, check_output, sample_rows, sample_to_path
    from ..shards.predict import predict_run
    from ..shards.shards import IMAGES_PER_SHARD, ShardOptions, parse_shards
    from ..text import console

    place = output if is_url(output) else Path(output)
    check_output(place, shard_size=shard_size, format=format_, shards=shards, cluster=cluster)
    engine = parse_engine(provider, provider_option, precision)
    if prompt is not None:
        if isinstance(place, str):
            raise InputError("images of a prompt are written to a local path", where=place, hint="give a path")
        refused = {"--sampler": sampler, "--eta": eta, "--batch": batch, "--conditions": conditions}
        refused |= {"--unconditional": unconditional, "--format": format_, "--shards": shards}
        refused |= {"--cluster": cluster, "--dry-run": dry_run or None}
        choices: dict[str, Any] = {"n": n, "steps": steps, "guidance": guidance, "seed": seed, "correction": correction}
        said: dict[str, Any] = {"quiet": quiet, "json": json, "preview": preview}
        said |= {"control_image": control_image, "control_scale": control_scale}
        sample_prompts(
            bundle, place, prompt, negative, threads=threads, engine=engine, refused=refused, **choices, **said
        )
        return
    prompted = {"--negative": negative, "--preview": preview, "--control-image": control_image}
    for name, value in {**prompted, "--control-scale": control_scale}.items():
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
    if dry_run:
        if isinstance(place, Path) and place.suffix in FILES:
            raise InputError("--dry-run is for folders", where=str(place), hint="leave --dry-run out")
        if shards is not None:
            shard_options = replace(shard_options, shards=parse_shards(shards, n or 16, shard_options.shard_size))
        plan = predict_run(opened, place, n or 16, options, shard_options, threads=threads, cluster=cluster)
        console.print_json(plan) if json else console.print_pairs("would sample", plan)
        return
    with shown(quiet=quiet or json) as report:
        where: dict[str, Any] = {"threads": threads, "cluster": cluster}
        summary = sample_to_path(
            opened, place, n or 16, options, shard_options, shards=shards, progress=report, **where
        )
    console.print_json(summary) if json else console.print_pairs("sampled", sample_rows(summary))
