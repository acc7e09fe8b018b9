"""`mezzotint audit`: the quantized groups that run on integer kernels, and the rules against the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, Threads


def audit(
    model: Annotated[Path, typer.Argument(help="Bundle folder, or any .onnx file.")],
    all_: Annotated[
        bool, typer.Option("--all", help="Also list the nodes that run on integer kernels, and all that break a rule.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 1 if a quantized group is not on an integer kernel.")
    ] = False,
    provider: Annotated[
        str,
        typer.Option(
            help="cpu (onnxruntime) and openvino: what they built. tensorrt and nv_tensorrt_rtx: checked against rules."
        ),
    ] = "cpu",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Print the kernel that an engine built for each quantized group, or the rule against it and the fix."""
    from ..text import console
    from .audit_tables import audits, print_audits, target_note, to_json

    found = audits(model, provider, threads=threads)
    console.print_json(to_json(model, provider, found)) if json else print_audits(found, everything=all_)
    if note := target_note(model, provider):
        console.print_warning(note)
    if strict and any(result.failed for result in found.values()):
        raise typer.Exit(1)
