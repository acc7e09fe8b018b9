"""Files that are no plain float graph of ONNX: quantized, optimized for an engine, or drawing random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ..errors import ModelError
from ..graph.nodes import DEFAULT_DOMAINS, is_op

_ENGINES = {
    "com.microsoft": "onnxruntime",
    "com.microsoft.nchwc": "onnxruntime",
    "com.microsoft.experimental": "onnxruntime",
    "com.ms.internal.nhwc": "onnxruntime",
    "com.ms.internal.nhwc.com.microsoft": "onnxruntime",
    "org.openvinotoolkit": "OpenVINO",
    "trt.plugins": "TensorRT",
    "ai.onnx.contrib": "onnxruntime-extensions",
}
_QUANTIZED_PREFIXES = ("QLinear", "Quantize", "Dequantize", "DynamicQuantize", "QAttention", "QGemm", "QMoE")
_QUANTIZED = frozenset(
    {"MatMulInteger", "ConvInteger", "ConvTransposeInteger", "MatMulIntegerToFloat", "MatMulNBits", "MatMulBnb4"}
    | {"QEmbedLayerNormalization", "QOrderedMatMul", "GatherBlockQuantized", "NhwcMaxPool", "QuantizeWithOrder"}
)
_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
)


def check_plain(model: ir.Model, where: str) -> None:
    """Raise ModelError, naming the first node, for a model that is quantized, optimized for an engine, or random.

    A domain whose functions the file itself defines is none of these.
    """
    for node in _nodes(model):
        called = f"node {node.name or node.outputs[0].name!r} is a {node.op_type}"
        if node.op_type in _QUANTIZED or node.op_type.startswith(_QUANTIZED_PREFIXES):
            raise ModelError(
                f"the model is quantized already: node {node.name!r} is a {node.op_type}",
                where=where,
                hint="compile the float model it was made from",
            )
        if node.domain in _ENGINES:
            raise ModelError(
                f"the file was optimized for {_ENGINES[node.domain]}: {called} of {node.domain}",
                where=where,
                hint="compile the file from before that, or export it again without the engine's optimizations",
            )
        if node.domain not in DEFAULT_DOMAINS:
            raise ModelError(
                f"{called} of the domain {node.domain!r}, which is not ONNX's own and which the file does not define",
                where=where,
                hint="export the model with operations of ONNX only",
            )
        if node.op_type in _RANDOM or _is_training(node):
            raise ModelError(
                f"the model draws random numbers inside, so that no two calls agree: {called}",
                where=where,
                hint="export it in eval mode, with its noise as an input",
            )


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Yield all nodes, those in functions and subgraphs too, but not the calls of functions."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            if node.op_identifier() not in model.functions:
                yield node


def _is_training(node: ir.Node) -> bool:
    """Return whether a node is a Dropout that drops."""
    if not is_op(node, "Dropout") or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    ratio = node.inputs[1]
    if ratio is not None and ratio.const_value is not None and not np.any(ratio.const_value.numpy()):
        return False
    training = node.inputs[2].const_value
    return training is not None and bool(np.any(training.numpy()))
