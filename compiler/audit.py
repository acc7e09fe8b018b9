"""Which layers onnxruntime really runs on integer kernels, read from the graph that it built."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import onnx_ir as ir

from ..runtime.errors import InputError
from ..runtime.session import open_session
from .errors import OutputError
from .ops import Layer

INTEGER_KERNELS = frozenset(
    {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"}
)
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"})
# What onnxruntime appends to the name of a node that it rewrites.
_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|/MatMulAddFusion|_transpose)+$")


@dataclass(frozen=True)
class Audit:
    """Kernels by operation, and for each layer the kernel that runs it ("" when no node of the built graph bears its
    name)."""

    operations: Mapping[str, int]
    layers: Mapping[str, str]

    @property
    def integer(self) -> int:
        return sum(n for op, n in self.operations.items() if op.rpartition(".")[2] in INTEGER_KERNELS)

    @property
    def floating(self) -> int:
        return sum(n for op, n in self.operations.items() if op.rpartition(".")[2] in FLOAT_KERNELS)

    def to_json(self, islands: Mapping[str, str]) -> dict[str, Any]:
        """`islands` says why a layer is in float on purpose; a layer that only onnxruntime left in float says so."""
        rows = {}
        for name, kernel in self.layers.items():
            row: dict[str, Any] = {"kernel": kernel or "unknown", "integer": kernel in INTEGER_KERNELS}
            if not row["integer"]:
                row["why"] = islands.get(name, "onnxruntime did not fuse it")
            rows[name] = row
        for name, why in islands.items():  # what multiplies matrices but is no layer: it could not be quantized at all
            rows.setdefault(name, {"kernel": "float", "integer": False, "why": why})
        return {
            "integer": self.integer,
            "float": self.floating,
            "operations": dict(sorted(self.operations.items())),
            "layers": rows,
        }


def audit(model: Path, layers: list[Layer], folder: Path, *, threads: int | None = None) -> Audit:
    """Build a session for a model file, and look at the graph that came out (the files are removed again)."""
    built = folder / f"built-{uuid4().hex}.onnx"
    try:
        _build(model, built, threads)
        graph = ir.load(built).graph
    finally:
        built.unlink(missing_ok=True)
        built.with_name(f"{built.name}.data").unlink(missing_ok=True)
    kernels = {
        _SUFFIX.sub("", node.name or ""): node.op_type
        for node in graph
        if node.op_type in INTEGER_KERNELS | FLOAT_KERNELS
    }
    made = {_SUFFIX.sub("", out.name or ""): k for node in graph if (k := node.op_type) for out in node.outputs}
    found = {}
    for layer in layers:
        kernel = (
            kernels.get(layer.name) or made.get(layer.node.outputs[0].name or "") or made.get(layer.output.name or "")
        )
        found[layer.name] = kernel if kernel in INTEGER_KERNELS | FLOAT_KERNELS else ""
    operations = Counter(n.op_type if n.domain in ("", "ai.onnx") else f"{n.domain}.{n.op_type}" for n in graph)
    return Audit(dict(operations), found)


def _build(model: Path, built: Path, threads: int | None) -> None:
    """onnxruntime writes the graph that it built. Raises InputError for a model that it refuses, else OutputError."""
    try:
        open_session(model, threads=threads, optimized=built)
    except InputError as error:
        open_session(model, threads=threads)  # raises again if the model is the trouble
        raise OutputError(
            "onnxruntime cannot write the graph that it built: the disk is full, or the folder is gone",
            where=str(built.parent),
            hint="free some space or choose another folder",
        ) from error
