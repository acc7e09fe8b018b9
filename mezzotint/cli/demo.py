"""The `demo` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import shown
from .options import Json, Quiet, Threads


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path("out/demo"),
    threads: Threads = 2,
    force: Annotated[bool, typer.Option("--force/--no-force", help="Replace an earlier demo.")] = True,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compile the embedded digits model to W8A8 and sample 64 digits from both models with the same noise."""
    from ..demo import demo_rows, run_demo
    from ..text import console

    with shown(quiet=quiet or json) as report:
        summary = run_demo(output, threads=threads, force=force, progress=report)
    if json:
        console.print_json(summary)
        return
    console.print_pairs("digits, W8A8", demo_rows(summary))
    console.print_line(f"images:   {output / 'digits.png'}")
    console.print_line(f"bundle:   {output / 'bundle'}")
