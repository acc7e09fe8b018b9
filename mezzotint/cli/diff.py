"""`mezzotint diff`: the differences between two bundles, or between two passes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import All, Json


def diff(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    other: Annotated[Path | None, typer.Argument(help="Another bundle folder, to compare with.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="A pass of the bundle, by number or name.")] = None,
    to: Annotated[str | None, typer.Option("--to", help="The pass to compare it with.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write an HTML page.")] = None,
    all_: All = False,
    json: Json = False,
) -> None:
    """Compare two bundles, or the graphs after two passes of one bundle (--from, --to)."""
    from mezzotint.runtime.bundle.bundle import open_bundle
    from mezzotint.runtime.errors import InputError

    from ..diff import compare_bundles, compare_passes
    from ..text import console
    from ..text.report import MOST_ROWS

    one = open_bundle(bundle)
    if other is not None and from_ is None and to is None:
        difference = compare_bundles(one, open_bundle(other))
    elif other is None and from_ is not None and to is not None:
        difference = compare_passes(one, from_, to)
    else:
        raise InputError(
            "it is not clear what to compare", hint="give two bundles, or one with --from PASS and --to PASS"
        )
    if html is not None:
        from ..inspect import html as pages
        from ..io.files import replacing

        sections = [pages.table_section(t.title, t.columns, t.rows) for t in difference.tables.values()]
        if difference.text:
            sections.append(pages.diff_section("graphs as text", difference.text))
        with replacing(html) as part:
            part.write_text(pages.document(difference.title, sections), encoding="utf-8", newline="\n")
    if json:
        console.print_json(difference.to_json())
        return
    console.print_line(difference.title)
    for table in difference.tables.values():
        if table.rows:
            console.print_table(table.title, table.columns, table.rows, most=None if all_ else MOST_ROWS)
        else:
            console.print_line(f"{table.title}: no difference")
