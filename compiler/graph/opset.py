"""Opsets: an older file is raised to the opset that the passes write for (onnx's converter)."""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnxscript.version_converter import convert_version

from . import weight_store as store
from .nodes import is_op, name_of

RAISED = 18  # LayerNormalization is of opset 17; since 18 the axes of a reduction are an input
GROUP_NORM_OPSETS = range(18, 21)


def raise_opset(model: ir.Model) -> tuple[ir.Model, str]:
    """Return a model of opset 18 or later, and a note for the history: empty where nothing had to change.

    Functions must be inlined. Names, notes, known shapes and stored weights are kept. A model that the converter does
    not know how to convert is returned as it is, and the note says why.
    """
    opset = model.graph.opset_imports.get("", 0)
    if opset >= RAISED:
        return model, ""
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(store.bare(model)), RAISED)
        raised = ir.from_proto(proto)
    except (RuntimeError, ValueError, TypeError) as error:  # what the converter's C++ raises has no base of its own
        reason = " ".join(str(error).split())[:200]
        return model, f"opset {opset} stays, because onnx cannot convert the model: {reason}"
    _restore(raised, model)
    return raised, f"opset {opset} raised to {RAISED}"


def _restore(raised: ir.Model, model: ir.Model) -> None:
    """Give a converted model what the converter drops or never saw: weights, notes, and the shapes of values."""
    graph = raised.graph
    count = len(model.graph.inputs)
    for value in list(graph.inputs)[count:]:
        value.const_value = model.graph.initializers[name_of(value)].const_value
        graph.register_initializer(value)
    del graph.inputs[count:]
    old = {name_of(value): value for node in model.graph for value in node.outputs}
    for node in graph:
        before = old.get(name_of(node.outputs[0]))
        producer = None if before is None else before.producer()
        if producer is not None and producer.op_type == node.op_type:
            node.name = producer.name
            node.metadata_props.update(producer.metadata_props)
        for value in node.outputs:
            if (known := old.get(name_of(value))) is not None:
                value.type = value.type or known.type
                value.shape = value.shape or known.shape
    for value, known in zip(graph.outputs, model.graph.outputs, strict=True):
        value.type, value.shape = known.type, known.shape
    raised.ir_version = model.ir_version


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
