"""Constant folding (onnxscript) and shape inference (onnx)."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir
from onnxscript.optimizer import fold_constants as _fold
from onnxscript.version_converter import convert_version

from . import weight_store as store
from .nodes import is_op, name_of

GROUP_NORM_OPSETS = range(18, 21)
FOLDED_INPUT_BYTES = 1 << 20
FOLDED_OUTPUT_BYTES = 1 << 20


def upgrade_group_norms(model: ir.Model) -> ir.Model:
    """Convert a model to opset 21 when its GroupNormalizations take one scale per group, which is a deprecated form."""
    epsilons = {
        name_of(n.outputs[0]): n.attributes.get("epsilon") for n in model.graph if is_op(n, "GroupNormalization")
    }
    if epsilons and model.opset_imports.get("", 0) in GROUP_NORM_OPSETS:
        convert_version(model, 21)
        for node in model.graph:
            epsilon = epsilons.get(name_of(node.outputs[0])) if is_op(node, "GroupNormalization") else None
            if epsilon is not None:  # the converter of onnxscript 0.7 drops it
                node.attributes.add(epsilon)
    return model


def fold_constants(model: ir.Model) -> ir.Model:
    """Compute the nodes that read constants only, up to a megabyte. Weights are not touched."""
    logger = logging.getLogger("onnxscript.optimizer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        _fold(
            model,
            input_size_limit=FOLDED_INPUT_BYTES,
            output_size_limit=FOLDED_OUTPUT_BYTES,
            onnx_shape_inference=False,
        )
    finally:
        logger.setLevel(level)
    return model


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


def _as_known(known: ir.Shape, inferred: ir.Shape | None) -> bool:
    """Return whether the known shape has an integer in every place where the inferred one has."""
    if inferred is None or len(known) != len(inferred):
        return True
    return all(isinstance(k, int) or not isinstance(i, int) for k, i in zip(known, inferred, strict=True))
