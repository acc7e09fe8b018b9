"""The blocks of a transformer that torch exported, with the names of its modules and without."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mezzotint.compiler.graph.blocks import find_blocks
from mezzotint.compiler.graph.scopes import name_by_module


def test_a_transformer(dit: Path) -> None:
    """By names a block is a transformer block; by dominators its attention and its feed-forward layers are two."""
    model = ir.load(dit)
    name_by_module(model.graph)
    blocks = find_blocks(model)
    (first, second) = (block for block in blocks if len(block.layers) > 1)
    assert (first.name, second.name) == ("transformer_blocks.0", "transformer_blocks.1")
    assert len(first.layers) == len(second.layers) == 11
    names = {node: node.name or "" for node in model.graph}
    for node in model.graph:
        node.name = None
    parts = [b for b in find_blocks(model) if len(b.layers) > 1]
    assert [len(part.layers) for part in parts] == [6, 2, 6, 2]
    for block, halves in ((first, parts[:2]), (second, parts[2:])):
        assert {names[n] for half in halves for n in half.nodes if n.op_type == "MatMul"} <= set(block.layers)
