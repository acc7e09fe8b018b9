"""`mezzotint mix`: several bundles of one network combined into one that uses a precision for each call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.runtime import bounds

from ..progress import shown
from .options import (
    ClusterName,
    ConditionsFile,
    Force,
    Json,
    NoiseSeed,
    Quiet,
    Reference,
    Threads,
    UnconditionalFile,
    number,
)


def mix(
    bundles: Annotated[list[str], typer.Argument(help="Bundle folders, or NAME=FOLDER to name a precision.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Bundle folder to write.")],
    reference: Reference,
    budget: Annotated[
        float | None,
        typer.Option(help="Mean cost of a call relative to the most expensive; PTQD's rule when left out."),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="Bound the errors relative to the `schedule`'s noise, or in the `picture`.")
    ] = "schedule",
    relax: Annotated[
        float | None, typer.Option(help="Give this last fraction of the calls to the most precise.")
    ] = None,
    relax_first: Annotated[bool, typer.Option("--relax-first", help="Let --relax mean the first fraction.")] = False,
    cost: Annotated[
        list[str] | None, typer.Option("--cost", help="NAME=NUMBER for each precision; measured when left out.")
    ] = None,
    pictures: Annotated[int, number(bounds.MOST_BATCH, "Images on which errors are measured.", "-n", "--pictures")] = 8,
    batch: Annotated[int, number(bounds.MOST_BATCH, "Images in one call.")] = 8,
    seed: NoiseSeed = None,
    conditions: ConditionsFile = None,
    unconditional: UnconditionalFile = None,
    threads: Threads = None,
    cluster: ClusterName = None,
    force: Force = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Mix bundles of one network into one that chooses a precision at each network call."""
    from ..io.settings import load_condition_files, parse_bundles, parse_costs
    from ..mix.mix import mix_bundles
    from ..text import console
    from ..text.report_mix import mix_rows, mix_summary, print_precisions

    rows, unconditional_rows = load_condition_files(conditions, unconditional)
    with shown(quiet=quiet or json) as report:
        mixed = mix_bundles(
            parse_bundles(bundles),
            output,
            reference=reference,
            budget=budget,
            rule=rule,
            relax=relax,
            relax_first=relax_first,
            costs=parse_costs(cost or []) or None,
            pictures=pictures,
            batch=batch,
            seed=seed,
            conditions=rows,
            unconditional=unconditional_rows,
            threads=threads,
            cluster=cluster,
            force=force,
            progress=report,
        )
    summary = mix_summary(mixed)
    if json:
        console.print_json(summary)
        return
    console.print_pairs(f"mixed {len(bundles)} bundles", mix_rows(summary))
    print_precisions(mixed)
