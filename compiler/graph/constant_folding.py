"""Constant folding (onnxscript), shape inference (onnx), and the constant shapes that follow from it."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.optimizer import fold_constants as _fold

from . import weight_store as store
from .nodes import Builder, Names, is_constant, is_op, name_of

FOLDED_INPUT_BYTES = 1 << 20
FOLDED_OUTPUT_BYTES = 1 << 20


def fold_constants(model: ir.Model) -> ir.Model:
    """Compute the nodes that read constants only, up to a megabyte. Weights are not touched.

    onnxscript keeps ConstantOfShape, which is smaller than its result. One that ScatterND fills is folded, too: it is a
    weight that the model writes into zeros, such as the fixed kernels of UNet1DModel's resampling.
    """
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        _fold(
            model,
            input_size_limit=FOLDED_INPUT_BYTES,
            output_size_limit=FOLDED_OUTPUT_BYTES,
            onnx_shape_inference=False,
            should_fold=lambda node: _is_filled(node) or None,
        )
    finally:
        logger.setLevel(level)
    return model


def _is_filled(node: ir.Node) -> bool:
    """Return whether a node makes the zeros that ScatterND writes constants into."""
    if not is_op(node, "ConstantOfShape"):
        return False
    readers = [use.node for use in node.outputs[0].uses()]
    return bool(readers) and all(is_op(reader, "ScatterND") for reader in readers)


def infer_shapes(model: ir.Model) -> ir.Model:
    """Fill in missing shapes and types by ONNX's shape inference. Known ones stay."""
    bare = store.bare(model)  # inference wants everything in one buffer
    for node in bare.graph:
        if is_op(node, "GroupNormalization"):  # ONNX infers nothing for it nor behind it; it keeps shape and type
            node.op_type = "Identity"
            node.attributes.clear()
            node.resize_inputs(1)
    proto = ir.to_proto(bare)
    inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    known = {info.name: info for info in inferred.graph.value_info}
    for node in model.graph:
        for value in node.outputs:
            info = known.get(name_of(value))
            if info is None or not info.type.HasField("tensor_type"):
                continue
            inferred_value = ir.serde.deserialize_value_info_proto(info, None)
            value.type = value.type or inferred_value.type
            if value.shape is None or not _as_known(value.shape, inferred_value.shape):
                value.shape = inferred_value.shape
    return model


def fix_reshapes(graph: ir.Graph) -> None:
    """Give each Reshape to a computed shape a constant one, where all sizes but one are known."""
    names = Names(graph)
    for node in graph:
        if not is_op(node, "Reshape") or is_constant(node.inputs[1]) or node.outputs[0].shape is None:
            continue
        x, shape = node.inputs[0], list(node.outputs[0].shape)
        if sum(not isinstance(size, int) for size in shape) > 1 or 0 in shape or x is None:
            continue
        same = [*zip(shape, x.shape or (), strict=False)]
        sizes = [
            size if isinstance(size, int) else 0 if i < len(same) and _equal(*same[i]) else -1
            for i, size in enumerate(shape)
        ]
        node.attributes.pop("allowzero", None)
        build = Builder(graph, names, node)
        node.replace_input_with(1, build.constant(f"{name_of(node.outputs[0])}_shape", np.array(sizes, np.int64)))


def _equal(size: int | ir.SymbolicDim, other: int | ir.SymbolicDim) -> bool:
    named = isinstance(size, ir.SymbolicDim) and isinstance(other, ir.SymbolicDim) and size.value is not None
    return named and size == other


def _as_known(known: ir.Shape, inferred: ir.Shape | None) -> bool:
    """Return whether the known shape has an integer in every place where the inferred one has."""
    if inferred is None or len(known) != len(inferred):
        return True
    return all(isinstance(k, int) or not isinstance(i, int) for k, i in zip(known, inferred, strict=True))
