"""`mezzotint debug`: which layers cost a bundle the most fidelity, and what would help."""

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


def debug(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    reference: Reference,
    pictures: Annotated[int, number(bounds.MOST_BATCH, "Images in the trajectory.", "-n", "--pictures")] = 1,
    calls: Annotated[
        int | None,
        number(bounds.MOST_STEPS, "Network calls to measure: the worst, and others; all when left out."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Layers to print; --json contains all of them.")] = 20,
    seed: NoiseSeed = None,
    conditions: ConditionsFile = None,
    unconditional: UnconditionalFile = None,
    threads: Threads = None,
    cluster: ClusterName = None,
    provider: Provider = "cpu",
    provider_option: ProviderOptions = None,
    precision: PrecisionOfFloats = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Rank the quantized layers by the error that they cause at the output, with the remedy for each."""
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..debug.diagnose import diagnose
    from ..debug.tables import print_diagnosis
    from ..io.networks import with_checked_networks
    from ..io.settings import load_condition_files, parse_engine
    from ..text import console

    engine = parse_engine(provider, provider_option, precision)
    rows, unconditional_rows = load_condition_files(conditions, unconditional)
    with shown(quiet=quiet or json) as report:
        diagnosis = diagnose(
            with_checked_networks(open_bundle(bundle)).on(engine),
            reference,
            pictures,
            calls=calls,
            seed=seed,
            conditions=rows,
            unconditional=unconditional_rows,
            threads=threads,
            cluster=cluster,
            progress=report,
        )
    console.print_json(diagnosis.to_json()) if json else print_diagnosis(diagnosis, top)
