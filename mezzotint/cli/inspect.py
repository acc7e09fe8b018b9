"""`mezzotint inspect`: the contents of a bundle and how it was made, as tables, as JSON, or as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mezzotint.runtime import bounds

from ..progress import shown
from .options import All, Json, Quiet, number


def inspect(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    blocks: Annotated[
        bool, typer.Option("--blocks", help="Print the network's blocks instead: its units for training.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML page instead: one file that needs no network.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Page: the float .onnx that `mezzotint export` wrote, to compare with.")
    ] = None,
    pictures: Annotated[
        int, number(bounds.MOST_BATCH, "Page: number of images; 0 for none.", "-n", "--pictures", least=0)
    ] = 8,
    calls: Annotated[
        int,
        number(bounds.MOST_STEPS, "Page: network calls at which the layers' errors are measured; 0 for none.", least=0),
    ] = 2,
    profile: Annotated[
        bool, typer.Option("--profile/--no-profile", help="Page: measure the time of each node.")
    ] = True,
    seed: Annotated[
        int | None, number(bounds.LARGEST_SEED, "Page: seed of the noise; an unused one when left out.", least=0)
    ] = None,
    conditions: Annotated[Path | None, typer.Option(help="Page: .npz with the model's conditions.")] = None,
    unconditional: Annotated[
        Path | None, typer.Option(help="Page: the same of the empty prompt, for guidance.")
    ] = None,
    threads: Annotated[int, number(bounds.MOST_THREADS, "Page: threads of onnxruntime.")] = 2,
    all_: All = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Print a bundle's passes, quantizers, integer kernels, and the reason for each layer without one."""
    from mezzotint.runtime.bundle.bundle import open_bundle
    from mezzotint.runtime.errors import InputError

    from ..io.networks import with_checked_networks
    from ..text.console import print_json

    page_only = {"reference": reference, "seed": seed, "conditions": conditions, "unconditional": unconditional}
    if html is None and (flags := [f"--{name}" for name, value in page_only.items() if value is not None]):
        raise InputError(f"{flags[0]} is for the page", hint="add the file to write: --html FILE")
    if blocks and html is not None:
        raise InputError("--blocks is a table, and --html a page", hint="give one of them")
    opened = open_bundle(bundle)
    if blocks:
        from ..inspect.block_table import block_rows, print_blocks

        rows = block_rows(with_checked_networks(opened))
        if json:
            print_json({"bundle": str(opened.path), "blocks": rows})
        else:
            print_blocks(rows)
        return
    if html is not None:
        from ..inspect.measure import PageOptions
        from ..inspect.page import write_page
        from ..io.images import check_place
        from ..io.settings import load_condition_files
        from ..text import console

        check_place(html)
        with_checked_networks(opened)
        rows = load_condition_files(conditions, unconditional)
        options = PageOptions(reference, pictures, calls, profile, rows[0], rows[1], seed, threads)
        with shown(quiet=quiet or json) as report:
            write_page(opened, html, options, report)
        if not json:
            console.print_line(f"wrote {html}")
            return
    from ..text.report import inspection, print_inspection

    if json:
        print_json(inspection(opened))
    else:
        print_inspection(opened, everything=all_)
