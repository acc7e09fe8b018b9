"""`mezzotint card`: the bundle's README.md, with measurements from after the compilation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json


def card(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    eval_: Annotated[Path | None, typer.Option("--eval", help="The output of `mezzotint eval --json`.")] = None,
    bench: Annotated[Path | None, typer.Option(help="The output of `mezzotint bench --json` on this machine.")] = None,
    license: Annotated[str | None, typer.Option(help="The model's licence, such as apache-2.0.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="The float model on the Hugging Face hub, as OWNER/NAME.")
    ] = None,
    json: Json = False,
) -> None:
    """Write the model card again. The card is a part of the bundle: the bundle's digest changes with it."""
    from mezzotint.compiler.bundle.card import CARD
    from mezzotint.runtime.bundle.bundle import open_bundle

    from ..recard import rewrite_card
    from ..text import console

    before = open_bundle(bundle, verify=False).manifest.digest
    rewritten = rewrite_card(bundle, evaluation=eval_, bench=bench, license=license, base_model=base_model)
    after = rewritten.manifest.digest
    summary = {
        "card": str(bundle / CARD),
        "measured": ", ".join(rewritten.manifest.measured) or "nothing",
        "digest": after,
        "digest before": before if before != after else "the same: nothing changed",
    }
    console.print_json({**summary, "digest before": before}) if json else console.print_pairs("model card", summary)
