"""The command `recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json


def recipes(
    name: Annotated[str | None, typer.Argument(help="A recipe (printed as YAML) or a pass (its options).")] = None,
    json: Json = False,
) -> None:
    """List the named recipes, print one as YAML, or print a pass with its options."""
    from ..text.report_recipes import print_recipes

    print_recipes(name, as_json=json)
