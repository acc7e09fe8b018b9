"""The constants of a graph: small ones as numbers and tuples of the code, the others as tensors of the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import PassError
from ..graph.nodes import consumers, is_op, name_of, numpy_of

# What absent lists of convolutions and poolings mean: written out, they only make the code longer.
_NEUTRAL = {"pads": 0, "strides": 1, "dilations": 1}


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the contents of an initializer or of a Constant node, or None for a value that is computed."""
    return None if value.is_graph_input() else ir.convenience.get_const_tensor(value)


def literal_of(value: ir.Value) -> Any:
    """Return a constant as a number or a tuple where the code can show it: sizes, axes, and single numbers.

    None for the others, which the module holds as tensors.
    """
    tensor = constant_of(value)
    if tensor is None or len(tensor.shape) > 1:
        return None
    alone = len(tensor.shape) == 0
    if tensor.dtype == ir.DataType.INT64 and (alone or tensor.size <= 8 or _is_size(value)):
        return _plain(tensor)
    if tensor.dtype == ir.DataType.FLOAT and (alone or _is_size(value)):
        return _plain(tensor)
    return bool(tensor.numpy()) if tensor.dtype == ir.DataType.BOOL and alone else None


def _is_size(value: ir.Value) -> bool:
    """Return whether only sizes of parts and factors of a resize are read from a constant."""
    return all(is_op(node, "Split", "Resize") for node in consumers(value))


def _plain(tensor: ir.TensorProtocol) -> Any:
    array = tensor.numpy()
    return array.item() if array.ndim == 0 else tuple(array.tolist())


def parameter_of(value: ir.Value) -> torch.Tensor:
    """Return a constant as a tensor of its own memory. Raises PassError for a value that nothing computes."""
    tensor = constant_of(value)
    if tensor is None:
        raise PassError(f"nothing computes the value {name_of(value)!r}", hint="check the graph's order of nodes")
    array = numpy_of(value) if value.const_value is not None else tensor.numpy()
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except TypeError as error:
        raise PassError(
            f"torch has no type {tensor.dtype}", where=f"value {name_of(value)!r}", hint="train before packing"
        ) from error


def attributes_of(node: ir.Node) -> Mapping[str, Any]:
    """Return the attributes of a node as plain values, without those that only repeat what their absence means."""
    given = {name: _attribute(node, attribute) for name, attribute in node.attributes.items()}
    silent = {name for name, neutral in _NEUTRAL.items() if name in given and set(given[name]) <= {neutral}}
    if is_op(node, "Conv", "ConvTranspose"):
        silent.add("kernel_shape")  # the weight has it
    return {name: value for name, value in given.items() if name not in silent}


def _attribute(node: ir.Node, attribute: ir.Attr) -> Any:
    value = attribute.value
    if isinstance(value, float):
        return float(str(np.float32(value)))  # ONNX stores float32: 1e-05, not 9.999999747378752e-06
    if isinstance(value, ir.TensorProtocol) and value.size == 1:
        return value.numpy().reshape(-1)[0].item()
    if isinstance(value, (int, str)):
        return value
    if isinstance(value, (tuple, list)) and all(isinstance(part, (int, float)) for part in value):
        return tuple(value)
    raise PassError(
        f"the attribute {attribute.name!r} has a value that no function of the torch module takes",
        where=f"{node.op_type} {node.name!r}",
    )
