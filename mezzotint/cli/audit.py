"""`mezzotint audit`: which quantized groups run on integer kernels, and what keeps the others from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads


def audit(
    model: Annotated[Path, typer.Argument(help="Bundle folder, or any .onnx file.")],
    all_: Annotated[bool, typer.Option("--all", help="Also list what does run on integers.")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 when a quantized group is not on an integer kernel.")
    ] = False,
    threads: Threads = None,
    json: Json = False,
) -> None:
    """What onnxruntime made of each quantized group of a model: its kernel, or the rule against it and what helps."""
    from ..text import console
    from .audit_tables import audits, print_audit, to_json

    found = audits(model, threads=threads)
    console.print_json(to_json(model, found)) if json else print_audit(found, everything=all_)
    if strict and any(fusion.failed for fusion in found.values()):
        raise typer.Exit(1)
