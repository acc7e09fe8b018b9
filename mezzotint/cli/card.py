"""`mezzotint card`: the bundle's README.md, with what was measured after the compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json


def card(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    eval_: Annotated[Path | None, typer.Option("--eval", help="What `mezzotint eval --json` printed.")] = None,
    bench: Annotated[Path | None, typer.Option(help="What `mezzotint bench --json` printed, on this machine.")] = None,
    license: Annotated[str | None, typer.Option(help="The model's licence, such as apache-2.0.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The float model on the hub, as OWNER/NAME.")] = None,
    json: Json = False,
) -> None:
    """Write the model card anew. It is a part of the bundle, which is sealed again: its digest changes with it."""
    from mezzotint.compiler.bundle.card import CARD
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..recard import rewrite_card
    from ..text import console

    before = open_bundle(bundle, verify=False).manifest["digest"]
    made = rewrite_card(bundle, evaluation=eval_, bench=bench, license=license, base_model=base_model)
    after = made.manifest["digest"]
    summary = {
        "card": str(bundle / CARD),
        "measured": ", ".join(made.manifest.get("measured", {})) or "nothing",
        "digest": after,
        "digest before": before if before != after else "the same: nothing changed",
    }
    console.print_json({**summary, "digest before": before}) if json else console.print_pairs("model card", summary)
