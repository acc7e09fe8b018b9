"""The graph that onnxruntime builds of a model, and the operations that multiply matrices on integers or in float.

The public option `optimized_model_filepath` makes a session save its graph, with large constants in a second file. Both
files are read and removed.
"""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import onnx_ir as ir

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import open_session

from ..errors import OutputError

INTEGER_KERNELS = frozenset(
    {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"}
)
FLOAT_KERNELS = frozenset({"Conv", "FusedConv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm", "FusedGemm"})


def built_graph(model: Path, folder: Path, *, threads: int | None = None) -> ir.Graph:
    """Return the graph of a session for a model file. `folder` holds it for a moment; its constants cannot be read.

    Raises InputError for a model that onnxruntime refuses, OutputError where it cannot write.
    """
    built = folder / f"built-{uuid4().hex}.onnx"
    try:
        _build(model, built, threads)
        return ir.load(built).graph
    finally:
        built.unlink(missing_ok=True)
        built.with_name(f"{built.name}.data").unlink(missing_ok=True)


def _build(model: Path, built: Path, threads: int | None) -> None:
    try:
        open_session(model, threads=threads, optimized=built)
    except InputError as error:
        open_session(model, threads=threads)  # raises again if the model is the cause
        raise OutputError(
            "onnxruntime cannot write the graph that it built: the disk is full, or the folder is gone",
            where=str(built.parent),
            hint="free some space or choose another folder",
        ) from error
