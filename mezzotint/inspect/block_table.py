"""`mezzotint inspect BUNDLE --blocks`: the blocks of a bundle's network, which training takes one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mezzotint.runtime.bundle.bundle import Bundle

from ..text import console


def block_rows(bundle: Bundle) -> list[dict[str, Any]]:
    """Return the blocks of the bundle's network as plain data, in the order of execution."""
    from mezzotint.compiler.graph.blocks import find_blocks
    from mezzotint.compiler.graph.model_file import read_model
    from mezzotint.compiler.graph.residuals import plain_value

    return [
        {
            "name": block.name,
            "layers": list(block.layers),
            "parameters": block.parameters,
            "inputs": list(dict.fromkeys(plain_value(value).name or "" for value in block.activations)),
        }
        for block in find_blocks(read_model(bundle.model_path), bundle.manifest.signature.sample)
    ]


def print_blocks(rows: Sequence[dict[str, Any]]) -> None:
    """Print the blocks as a table."""
    console.print_table(
        f"{len(rows)} blocks",
        ("block", "layers", "parameters", "inputs"),
        [(r["name"], str(len(r["layers"])), f"{r['parameters']:,}", ", ".join(r["inputs"])) for r in rows],
    )
