"""Golden pairs: a pass's test is two small graphs in ONNX text, before and after, compared as whole text."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnx_ir as ir

FOLDER = Path(__file__).resolve().parents[1] / "passes" / "golden"


def to_text(model: ir.Model) -> str:
    """ONNX text with the values of initializers, one declaration a line; reading it back gives the same text."""
    proto = ir.to_proto(model)
    constants = {tensor.name for tensor in proto.graph.initializer}
    described = [info for info in proto.graph.value_info if info.name not in constants]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(described)
    head, brace, body = onnx.printer.to_text(proto).partition("\n{")
    lines = re.sub(r", (?=\w+(?:\[[^]]*\])? [\"\w])", ",\n    ", head) + brace + body
    return "\n".join(line.rstrip() for line in lines.splitlines()) + "\n"


def before(pass_name: str, case: str) -> ir.Model:
    """The graph in `<pass>/<case>.before.txt`. What is wrong with it, the pipeline finds: it runs and checks it."""
    return ir.from_onnx_text((FOLDER / pass_name / f"{case}.before.txt").read_text())


def compare(pass_name: str, case: str, after: ir.Model, *, update: bool) -> None:
    """Assert that a graph is the one in `<pass>/<case>.after.txt`, or, with `update`, make it so."""
    file = FOLDER / pass_name / f"{case}.after.txt"
    got = to_text(after)
    assert to_text(ir.from_onnx_text(got)) == got
    if update:
        file.write_text(got)
    assert file.exists(), f"there is no {file.name} yet: run pytest --update-golden and review it"
    assert got == file.read_text(), f"{file.name} differs: pytest --update-golden rewrites it; review it like code"


def cases(pass_name: str) -> list[str]:
    """The cases of a pass that are on disk."""
    return sorted(f.name.removesuffix(".before.txt") for f in (FOLDER / pass_name).glob("*.before.txt"))
