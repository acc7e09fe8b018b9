"""The blocks of networks that torch exported, with the names of their modules and without."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mezzotint.compiler.frontend.from_torch import import_folder
from mezzotint.compiler.graph.blocks import find_blocks
from mezzotint.compiler.graph.scopes import name_by_module
from mezzotint.io.sources import DIGITS
from mezzotint.runtime.sampling.deployment import Deployment
from tests.helpers.tiny import short_schedule


def without_names(model: ir.Model) -> dict[ir.Node, str]:
    """Remove the names of all nodes, and return them."""
    names = {node: node.name or "" for node in model.graph}
    for node in model.graph:
        node.name = None
    return names


def test_digits(tmp_path: Path) -> None:
    """The same layers are together with and without names."""
    schedule = short_schedule()
    deployment = Deployment.of(schedule, "ddim", 4)
    program = import_folder(DIGITS / "unet", tmp_path, schedule=schedule, deployment=deployment, name="digits")
    blocks = find_blocks(program.model, program.signature.sample)
    together = {block.name for block in blocks if len(block.layers) > 1}
    resnets = {"mid_block/resnets.0", "mid_block/resnets.1", *(f"down_blocks.{i}/resnets.0" for i in range(3))}
    resnets |= {f"up_blocks.{i}/resnets.{j}" for i in range(3) for j in range(2)}
    attentions = {"down_blocks.2/attentions.0", "mid_block/attentions.0"}
    assert together == resnets | attentions | {f"up_blocks.0/attentions.{i}" for i in range(2)}
    alone = {block.name for block in blocks if len(block.layers) == 1}
    assert {"conv_in/Conv", "conv_out/Conv", "up_blocks.1/upsamplers.0/conv/Conv"} <= alone
    names = without_names(program.model)
    again = find_blocks(program.model, program.signature.sample)
    layers = [{names[n] for n in block.nodes if n.op_type in ("Conv", "Gemm", "MatMul")} for block in again]
    assert layers == [set(block.layers) for block in blocks]


def test_a_transformer(dit: Path) -> None:
    """By names a block is a transformer block; by dominators its attention and its feed-forward layers are two."""
    model = ir.load(dit)
    name_by_module(model.graph)
    blocks = find_blocks(model)
    (first, second) = (block for block in blocks if len(block.layers) > 1)
    assert (first.name, second.name) == ("transformer_blocks.0", "transformer_blocks.1")
    assert len(first.layers) == len(second.layers) == 11
    names = without_names(model)
    parts = [b for b in find_blocks(model) if len(b.layers) > 1]
    assert [len(part.layers) for part in parts] == [6, 2, 6, 2]
    for block, halves in ((first, parts[:2]), (second, parts[2:])):
        assert {names[n] for half in halves for n in half.nodes if n.op_type == "MatMul"} <= set(block.layers)
