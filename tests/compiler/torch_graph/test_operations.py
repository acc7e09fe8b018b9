"""Each operation of the table computes what onnxruntime computes, and its gradients are those of finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.errors import PassError
from mezzotint.compiler.graph.nodes import MICROSOFT
from mezzotint.compiler.torch_graph.convert import to_torch
from mezzotint.compiler.torch_graph.operations import MICROSOFT_OPERATIONS, TORCH_OPERATIONS

Array = np.ndarray[Any, Any]
Case = tuple[str, list[Array | None], dict[str, Any]]
OPSET = 21
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def apart(*shape: int) -> Array:
    """Values that lie apart, so that no maximum and no kink changes within a finite difference."""
    return (RNG.permutation(int(np.prod(shape))).reshape(shape) * 0.1 - 0.55).astype(np.float32)


def positive(*shape: int) -> Array:
    return RNG.uniform(0.5, 2, shape).astype(np.float32)


def ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


def each(operations: str, given: list[Array | None], **attributes: Any) -> list[Case]:
    return [(operation, given, attributes) for operation in operations.split()]


X, ROW, IMAGE = normal(2, 3, 5), normal(3, 5), normal(2, 4, 5, 6)
SAME = {"auto_pad": "SAME_UPPER", "strides": [2, 2]}
POOL = {"kernel_shape": [2, 3], "pads": [1, 0, 0, 1], "strides": [2, 1]}
TURNED = {"dilations": [2, 1], "pads": [1, 0, 2, 1], "strides": [1, 2]}
RESIZE = {"coordinate_transformation_mode": "half_pixel"}
FACTORS = np.array([1, 1, 1.6, 0.5], np.float32)
TWICE = np.array([1, 1, 2, 3], np.float32)

# Floats are inputs of the graph, whose gradients are checked; integers and the arrays of CONSTANT places are constants.
CASES: list[Case] = [
    *each("Add Sub Mul Max Min Sum", [X, ROW]),
    *each("Neg Sin Cos Tanh Erf Exp Sigmoid Softplus Mish Identity", [X]),
    *each("Abs Relu LeakyRelu Elu HardSwish HardSigmoid", [apart(2, 3, 2)]),
    *each("Sqrt Log Reciprocal", [positive(2, 3)]),
    ("Div", [X, positive(3, 5)], {}),
    ("MultiHeadAttention", [normal(2, 3, 8), normal(2, 4, 8), normal(2, 4, 8)], {"num_heads": 2, "scale": 0.7}),
    ("Pow", [positive(2, 3), positive(3)], {}),
    ("ThresholdedRelu", [np.array([[-2, 0.1], [0.3, 3]], np.float32)], {"alpha": 0.2}),
    ("ThresholdedRelu", [np.array([[-2, 0.5], [1.5, 3]], np.float32)], {}),
    ("PRelu", [apart(2, 3, 2), positive(3, 1)], {}),
    ("Gelu", [X], {}),
    ("Gelu", [X], {"approximate": "tanh"}),
    ("Clip", [apart(3, 4), np.array(-0.31, np.float32), np.array(0.38, np.float32)], {}),
    ("Where", [np.array([True, False, True])[:, None], X, ROW], {}),
    ("Conv", [IMAGE, normal(6, 2, 3, 2), normal(6)], {"group": 2, **TURNED}),
    ("Conv", [IMAGE, normal(3, 4, 3, 2)], SAME),
    ("Conv", [X, normal(2, 3, 2), normal(2)], {"pads": [1, 1]}),
    ("ConvTranspose", [IMAGE, normal(4, 3, 3, 2), normal(3)], {"strides": [2, 1], "pads": [1, 0, 0, 1]}),
    ("ConvTranspose", [IMAGE, normal(4, 1, 2, 2)], {"group": 2, "strides": [2, 2], "output_padding": [1, 0]}),
    ("Gemm", [normal(4, 3), normal(4, 5), normal(5)], {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("Gemm", [normal(3, 4), normal(5, 4)], {"transB": 1}),
    ("MatMul", [X, normal(2, 5, 4)], {}),
    ("Einsum", [normal(2, 3), normal(2, 4, 3)], {"equation": "bi,bji->bj"}),
    ("LayerNormalization", [X, positive(5), normal(5)], {"axis": -1, "epsilon": 1e-3}),
    ("LayerNormalization", [X, positive(3, 5)], {"axis": 1}),
    ("GroupNormalization", [IMAGE, positive(4), normal(4)], {"num_groups": 2}),
    ("InstanceNormalization", [IMAGE, positive(4), normal(4)], {"epsilon": 1e-3}),
    ("BatchNormalization", [IMAGE, positive(4), normal(4), normal(4), positive(4)], {}),
    ("Softmax", [X], {"axis": 1}),
    ("LogSoftmax", [X], {}),
    *each("ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd", [apart(2, 3, 4), ints(-1, 0)], keepdims=0),
    *each("ReduceSumSquare ReduceL1 ReduceL2", [X, ints(1)]),
    ("ReduceSum", [X], {}),
    ("GlobalAveragePool", [IMAGE], {}),
    ("MaxPool", [apart(1, 2, 5, 6)], POOL),
    ("AveragePool", [IMAGE], POOL),
    ("AveragePool", [IMAGE], {**POOL, "count_include_pad": 1}),
    *(("Resize", [IMAGE, None, TWICE], {"mode": mode, **RESIZE}) for mode in ("nearest", "linear", "cubic")),
    *(("Resize", [IMAGE, None, FACTORS], {"mode": mode, **RESIZE}) for mode in ("linear", "cubic")),
    ("Resize", [IMAGE, None, TWICE], {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}),
    (
        "Resize",
        [IMAGE, None, None, ints(2, 4, 8, 3)],
        {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
    ),
    ("Reshape", [X, ints(0, -1, 1)], {}),
    ("Flatten", [IMAGE], {"axis": 2}),
    ("Squeeze", [normal(2, 1, 3, 1), ints(1, -1)], {}),
    ("Unsqueeze", [X, ints(0, -1)], {}),
    ("Transpose", [X], {"perm": [2, 0, 1]}),
    ("Transpose", [X], {}),
    ("Concat", [X, normal(2, 1, 5)], {"axis": 1}),
    ("Split", [X, ints(2, 1)], {"axis": 1}),
    ("Split", [X], {"axis": -1, "num_outputs": 2}),
    ("Slice", [X, ints(-4, 0), ints(99, -1), ints(2, 1), ints(2, 1)], {}),
    ("Slice", [X, ints(-1), ints(-99), ints(1), ints(-2)], {}),
    ("Gather", [X, ints(2, -1)], {"axis": 1}),
    ("GatherElements", [ROW, ints(0, 2, -1, 1, 1).reshape(1, 5)], {}),
    ("Expand", [normal(3, 1), ints(2, 1, 4)], {}),
    ("Tile", [ROW, ints(2, 3)], {}),
    ("Trilu", [X], {"upper": 0}),
    *(
        case
        for mode in ("constant", "reflect", "edge", "wrap")
        for case in each("Pad", [X, ints(0, 1, 2, 0, 2, 1)], mode=mode)
    ),
    ("DepthToSpace", [normal(1, 8, 2, 3)], {"blocksize": 2, "mode": "CRD"}),
    ("DepthToSpace", [normal(1, 8, 2, 3)], {"blocksize": 2}),
    ("SpaceToDepth", [normal(1, 2, 4, 6)], {"blocksize": 2}),
]
# Operations without a gradient, or whose result is a size.
EXACT: list[Case] = [
    *each("Sign Floor Ceil Round Shape Size", [X]),
    *each("Equal Greater GreaterOrEqual Less LessOrEqual", [X, ROW]),
    *each("And Or", [X[0] > 0, ROW > 0]),
    ("Not", [X > 0], {}),
    ("Cast", [X], {"to": int(ir.DataType.INT64)}),
    ("CastLike", [X, ints(1)], {}),
    ("Mod", [ints(-7, 7, 5), ints(3, -3, 2)], {}),
    ("Div", [ints(-7, 7, 5), ints(3, 3, 2)], {}),
    ("Range", [np.array(1), np.array(9), np.array(3)], {}),
    ("ConstantOfShape", [ints(2, 3)], {"value": ir.tensor(np.array([2], np.int64))}),
    ("DequantizeLinear", [np.array([[1, -3], [7, 5]], np.int8), positive(2), np.array([1, -1], np.int8)], {"axis": 0}),
]
PARTS = {"Split": 2}


def model_of(op: str, given: list[Array | None], attributes: dict[str, Any]) -> ir.Model:
    """A graph of one node. Floats of two and more dimensions are inputs, and those of one that a layer reads."""
    values: list[ir.Value | None] = []
    for i, array in enumerate(given):
        if array is None:
            values.append(None)
            continue
        tensor = ir.tensor(array, name=f"in{i}")
        free = (
            array.ndim > 1 if i == 0 else array.dtype == np.float32 and op not in ("Resize", "DequantizeLinear", "Clip")
        )
        values.append(
            ir.Value(
                name=f"in{i}",
                shape=ir.Shape(array.shape),
                type=ir.TensorType(tensor.dtype),
                const_value=None if free else tensor,
            )
        )
    domain = MICROSOFT if op in MICROSOFT_OPERATIONS else ""
    node = ir.node(op, values, attributes, domain=domain, num_outputs=PARTS.get(op, 1), name=f"the_{op}")
    for i, out in enumerate(node.outputs):
        out.name = f"out{i}"
    graph = ir.Graph(
        [v for v in values if v is not None and v.const_value is None],
        node.outputs,
        nodes=[node],
        initializers=[v for v in values if v is not None and v.const_value is not None],
        opset_imports={"": OPSET, MICROSOFT: 1},
        name="one",
    )
    return ir.Model(graph, ir_version=10)


def compare(op: str, given: list[Array | None], attributes: dict[str, Any], folder: Path) -> tuple[Any, list[Array]]:
    model = model_of(op, given, attributes)
    inputs = {value.name or "": given[int((value.name or "")[2:])] for value in model.graph.inputs}
    with Executor(model, folder, threads=1, level="none") as executor:
        wanted = list(executor.run({name: array for name, array in inputs.items() if array is not None}).values())
    graph = to_torch(model)
    arrays = [array for array in inputs.values() if array is not None]
    results = graph.module(*map(torch.from_numpy, arrays))
    for result, reference in zip(results, wanted, strict=True):
        assert result.numpy().dtype == reference.dtype
        np.testing.assert_allclose(result.numpy(), reference, rtol=1e-5, atol=1e-5 * max(1, np.abs(reference).max()))
    return graph.module, arrays


@pytest.mark.parametrize(("op", "given", "attributes"), CASES, ids=[f"{case[0]}{i}" for i, case in enumerate(CASES)])
def test_values_and_gradients(op: str, given: list[Array | None], attributes: dict[str, Any], tmp_path: Path) -> None:
    module, arrays = compare(op, given, attributes, tmp_path)
    free = [
        torch.from_numpy(array).double() if array.dtype == np.float32 else torch.from_numpy(array) for array in arrays
    ]
    free = [tensor.requires_grad_(tensor.is_floating_point()) for tensor in free]
    assert torch.autograd.gradcheck(module.double(), free, fast_mode=True)


@pytest.mark.parametrize(("op", "given", "attributes"), EXACT, ids=[case[0] for case in EXACT])
def test_values(op: str, given: list[Array | None], attributes: dict[str, Any], tmp_path: Path) -> None:
    compare(op, given, attributes, tmp_path)


def test_rounding_passes_gradients_on() -> None:
    x = torch.tensor([-1.5, 0.2, 2.5], requires_grad=True)
    rounded = TORCH_OPERATIONS["Round"](x)
    assert rounded.tolist() == [-2, 0, 2]
    rounded.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * rounded.detach())


def test_operations_of_later_opsets() -> None:
    """The oldest onnxruntime that is supported does not have them."""
    x, scale = torch.from_numpy(X).double().requires_grad_(), torch.from_numpy(positive(5)).double().requires_grad_()
    normal = TORCH_OPERATIONS["RMSNormalization"]
    torch.testing.assert_close(normal(x, scale), torch.nn.functional.rms_norm(x, (5,), scale, eps=1e-5))
    torch.testing.assert_close(TORCH_OPERATIONS["Swish"](x), torch.nn.functional.silu(x))
    assert torch.autograd.gradcheck(normal, (x, scale))


def test_every_operation_is_compared() -> None:
    known = TORCH_OPERATIONS.keys() | MICROSOFT_OPERATIONS.keys()
    assert known - {case[0] for case in (*CASES, *EXACT)} == {"RMSNormalization", "Swish"}


def test_unknown_operations_and_attributes_are_refused() -> None:
    with pytest.raises(PassError, match="Hardmax") as unknown:
        to_torch(model_of("Hardmax", [X], {}))
    assert unknown.value.where == "Hardmax 'the_Hardmax'"
    with pytest.raises(PassError, match="antialias 1"):
        to_torch(model_of("Resize", [IMAGE, None, TWICE], {"antialias": 1}))
    with pytest.raises(PassError, match="does not fit"):
        to_torch(model_of("Softmax", [X], {"temperature": 1.0}))
