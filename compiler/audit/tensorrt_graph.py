"""TensorRT's rules about the rest of a graph: versions, operations, and where quantizers belong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir

from ..graph.nodes import DEFAULT_DOMAINS, consumers, is_constant, is_op, name_of
from .facts import quantizer_grid
from .groups import MATRICES, is_known, node_label, origin_of
from .tensorrt_violation import Fault, Violation, fault

OPSETS = range(9, 25)
"""What the importer of TensorRT 10.15 reads. Its successor reads 25, too."""
NOT_READ = frozenset(
    {"AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad"}
    | {
        "Col2Im",
        "Compress",
        "ConcatFromSequence",
        "ConvInteger",
        "DFT",
        "Det",
        "DynamicQuantizeLinear",
        "MatMulInteger",
    }
    | {"MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional"}
    | {"OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch", "SequenceAt"}
    | {"SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength", "SequenceMap"}
    | {"SoftmaxCrossEntropyLoss", "SplitToSequence", "StringNormalizer", "TfIdfVectorizer", "Unique"}
)
"""Operations of ONNX that the importer does not have."""
_LOW = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def opsets(graph: ir.Graph) -> Iterator[Violation]:
    """Yield a violation where the version of the standard operations is not read."""
    version = next((v for domain, v in graph.opset_imports.items() if domain in DEFAULT_DOMAINS), None)
    if version is None or version not in OPSETS:
        yield Violation(
            "",
            "",
            "opset",
            f"the file has opset {version}, and the importer reads {OPSETS.start} to {OPSETS.stop - 1}",
            "export the model again, or convert it with onnx.version_converter",
        )


def foreign_operations(nodes: Iterable[ir.Node]) -> Iterator[Fault]:
    """Yield the operations that the importer does not have."""
    for node in nodes:
        if node.domain not in DEFAULT_DOMAINS:
            yield fault(
                node,
                "foreign-operation",
                f"{node.domain}.{node.op_type} is no operation of ONNX",
                "write it with standard operations: compile with --target tensorrt",
            )
        elif node.op_type in NOT_READ:
            yield fault(
                node,
                "unread-operation",
                f"the importer does not have {node.op_type}",
                "write a float operation between DequantizeLinear and QuantizeLinear: compile with --target tensorrt",
            )


def integer_operations(nodes: Iterable[ir.Node]) -> Iterator[Fault]:
    """Yield operations between a quantizer and its dequantizer: quantized types exist next to a quantizer only."""
    for node in nodes:
        if is_op(node, *_QUANTIZERS, "Constant") or node.domain not in DEFAULT_DOMAINS or node.op_type in NOT_READ:
            continue
        for value in node.inputs:
            if value is not None and _is_low(value):
                yield fault(
                    node,
                    "integer-operation",
                    f"it reads {name_of(value)!r}, which has 8 bits or fewer: only DequantizeLinear reads such values",
                    "move it in front of QuantizeLinear or behind DequantizeLinear; store a constant in a wider type",
                )
                break


def _is_low(value: ir.Value) -> bool:
    maker = value.producer()
    if maker is not None and is_op(maker, "QuantizeLinear"):
        return True
    dtype = value.const_value.dtype if is_constant(value) and value.const_value is not None else value.dtype
    return dtype in _LOW


def placements(nodes: Iterable[ir.Node]) -> Iterator[Fault]:
    """Yield sums and concatenations whose quantizers keep a kernel from computing them."""
    for node in nodes:
        if is_op(node, "Add"):
            yield from _residual(node)
        elif is_op(node, "Concat"):
            yield from _concat(node)


def _residual(node: ir.Node) -> Iterator[Fault]:
    """A layer computes the sum behind it, if its own branch has no quantizer in between.

    If all readers quantize the sum, the other branch must come quantized: else its float output has no reader.
    """
    inputs = [v for v in node.inputs if v is not None]
    if len(inputs) != 2 or any(is_known(v) for v in inputs):
        return
    origins = [origin_of(v) for v in inputs]
    for origin in origins:
        dequantizer = origin.dequantizer
        stored = None if dequantizer is None else dequantizer.inputs[0]
        quantizer = None if stored is None else stored.producer()
        layer = quantizer.inputs[0].producer() if quantizer is not None and quantizer.inputs[0] is not None else None
        if quantizer is not None and is_op(quantizer, "QuantizeLinear") and _is_quantized_layer(layer):
            yield fault(
                node,
                "quantized-branch",
                f"a quantizer lies between it and {node_label(layer) if layer else ''!r}, which could compute the sum",
                "take that quantizer away: quantize the other input of the sum, if any",
                "placement",
            )
            return
    direct = [origin for origin in origins if _is_quantized_layer(origin.value.producer())]
    others = [origin for origin in origins if origin not in direct]
    readers = [] if node.outputs[0].is_graph_output() else consumers(node.outputs[0])
    quantized = bool(readers) and all(is_op(reader, "QuantizeLinear") for reader in readers)
    if len(direct) == 1 and quantized and others[0].dequantizer is None:
        x = name_of(others[0].value)
        yield fault(
            node,
            "float-residual",
            f"its sum is quantized, and its input {x!r} is float, so that the layer in front writes float",
            f"put QuantizeLinear and DequantizeLinear on {x!r}",
            "placement",
        )


def _is_quantized_layer(node: ir.Node | None) -> bool:
    return (
        node is not None
        and is_op(node, *MATRICES)
        and all(v is not None and origin_of(v).dequantizer is not None for v in node.inputs[:2])
    )


def _concat(node: ir.Node) -> Iterator[Fault]:
    parts = [(v, origin_of(v).dequantizer) for v in node.inputs if v is not None]
    quantized = [part for _, part in parts if part is not None]
    if not quantized:
        return
    loose = next((v for v, part in parts if part is None), None)
    grids = {quantizer_grid(part) for part in quantized}
    if loose is None and len(grids) == 1:
        return
    what = f"{name_of(loose)!r} is float" if loose is not None else f"its parts have {len(grids)} scales"
    yield fault(
        node,
        "concat-scales",
        f"it concatenates quantized values, and {what}: each part is converted",
        "give all parts one scale, or quantize the concatenation behind it, or split the layer that reads it",
        "placement",
    )
