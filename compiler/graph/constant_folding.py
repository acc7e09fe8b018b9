"""Constant folding and shape inference, by the libraries that do them best."""

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
    """Convert to opset 21 where GroupNormalization takes a scale per group: that form is deprecated, not valid."""
    epsilons = {
        name_of(n.outputs[0]): n.attributes.get("epsilon") for n in model.graph if is_op(n, "GroupNormalization")
    }
    if epsilons and model.opset_imports.get("", 0) in GROUP_NORM_OPSETS:
        convert_version(model, 21)
        for node in model.graph:
            epsilon = epsilons.get(name_of(node.outputs[0])) if is_op(node, "GroupNormalization") else None
            if epsilon is not None:  # the converter of onnxscript 0.7 forgets it
                node.attributes.add(epsilon)
    return model


def fold_constants(model: ir.Model) -> ir.Model:
    """Compute what only constants feed, up to a megabyte; weights stay where they are."""
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
    """Fill in shapes and types by ONNX's shape inference; what was known before stays."""
    bare = store.bare(model)  # inference wants everything in one buffer
    for node in bare.graph:
        if is_op(node, "GroupNormalization"):  # ONNX infers nothing for it nor behind it; its output is like its input
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
            found = ir.serde.deserialize_value_info_proto(info, None)
            value.type = value.type or found.type
            if value.shape is None or not _as_known(value.shape, found.shape):
                value.shape = found.shape
    return model


def _as_known(have: ir.Shape, found: ir.Shape | None) -> bool:
    """Whether the known shape has no fewer integers than the inferred one."""
    if found is None or len(have) != len(found):
        return True
    return all(isinstance(h, int) or not isinstance(f, int) for h, f in zip(have, found, strict=True))
