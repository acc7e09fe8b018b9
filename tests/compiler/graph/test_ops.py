"""Which nodes are layers, with which bias, axis and output."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.ops import Layer, float_reason, is_mover, layers
from tests.helpers.tiny import ATTENTIONS, CONVS, LINEARS, TIME_LAYERS, tiny_model

CONSTANTS = """float[2,2,1,1] conv_w = {1, 2, 3, 4}, float[2] bias = {1, 2}, float[4,4] square =
    {1, 0, 0, 2, 0, 1, 3, 0, 0, -1, 1, 0, -4, 0, 0, 1}, float[4] row = {1, 2, 3, 4}, float[1,4] wide_row = {1, 2, 3, 4},
    int64[2] rows = {-1, 4}, float[4] factors = {1, 1, 2, 2}"""


def model_of(body: str) -> ir.Model:
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,2,4,4] sample, int64[batch] timestep, float[4,4] given) => (float[batch,2,4,4] epsilon)
    <{CONSTANTS}> {{ {body} }}""")
    return infer_shapes(model)


def only(body: str) -> Layer:
    found = list(layers(model_of(body).graph))
    assert len(found) == 1
    return found[0]


def facts(layer: Layer) -> tuple[str, list[str | None], str | None, int | None, str | None, str | None]:
    """(kind, activations, weight, axis, bias, output)"""
    names = [None if v is None else v.name for v in (layer.weight, layer.bias)]
    return layer.kind, [v.name for v in layer.activations], names[0], layer.weight_axis, names[1], layer.output.name


def check(body: str, expected: tuple[str, list[str], str | None, int | None, str | None, str]) -> None:
    layer = only(body)
    assert facts(layer) == expected
    assert layer.output_quantized == (layer.kind == "conv")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("epsilon = Conv (sample, conv_w)", ("conv", ["sample"], "conv_w", 0, None, "epsilon")),
        ("epsilon = Conv (sample, conv_w, bias)", ("conv", ["sample"], "conv_w", 0, "bias", "epsilon")),
        ("epsilon = MatMul (sample, square)", ("linear", ["sample"], "square", 1, None, "epsilon")),
        ("y = MatMul (sample, square) epsilon = Add (y, row)", ("linear", ["sample"], "square", 1, "row", "epsilon")),
        ("y = MatMul (sample, square) epsilon = Add (row, y)", ("linear", ["sample"], "square", 1, "row", "epsilon")),
        ("y = MatMul (sample, square) epsilon = Add (wide_row, y)", ("linear", ["sample"], "square", 1, None, "y")),
        ("y = MatMul (sample, square) epsilon = Add (sample, y)", ("linear", ["sample"], "square", 1, None, "y")),
        (
            "y = MatMul (sample, square) z = Add (y, row) epsilon = Mul (z, y)",
            ("linear", ["sample"], "square", 1, None, "y"),
        ),
        ("epsilon = MatMul (sample, sample)", ("attention", ["sample", "sample"], None, None, None, "epsilon")),
        (
            "flat = Reshape (sample, rows) epsilon = Gemm (flat, square, row)",
            ("linear", ["flat"], "square", 1, "row", "epsilon"),
        ),
        (
            "flat = Reshape (sample, rows) epsilon = Gemm <transB = 1, alpha = 1.0> (flat, square)",
            ("linear", ["flat"], "square", 0, None, "epsilon"),
        ),
    ],
)
def test_layers(body: str, expected: tuple[str, list[str], str | None, int | None, str | None, str]) -> None:
    check(body, expected)


def test_another_axis_is_seen() -> None:
    with pytest.raises(AssertionError):
        check("epsilon = MatMul (sample, square)", ("linear", ["sample"], "square", 0, None, "epsilon"))


@pytest.mark.parametrize(
    "body",
    [
        "flat = Reshape (sample, rows) epsilon = Gemm <alpha = 0.5> (flat, square)",
        "flat = Reshape (sample, rows) epsilon = Gemm <transA = 1> (flat, square)",
        "flat = Reshape (sample, rows) epsilon = Gemm (flat, given)",
        "w = Sigmoid (conv_w) epsilon = Conv (sample, w)",
        "b = Sigmoid (bias) epsilon = Conv (sample, conv_w, b)",
        "epsilon = MatMul (square, sample)",
    ],
)
def test_what_no_integer_kernel_can_do_is_no_layer_and_has_a_reason(body: str) -> None:
    graph = model_of(body).graph
    assert not list(layers(graph))
    assert [bool(float_reason(n)) for n in graph].count(True) == 1


def test_integer_matmuls_are_left_alone() -> None:
    assert not list(layers(model_of("whole = Cast <to = 7> (sample) epsilon = MatMul (whole, whole)").graph))


def test_transposed_convolutions_have_a_reason() -> None:
    graph = model_of("epsilon = ConvTranspose (sample, conv_w)").graph
    assert "transposed" in str(float_reason(graph[0]))


@pytest.mark.parametrize(
    ("body", "moves"),
    [
        ("epsilon = Transpose (sample)", True),
        ("epsilon = Reshape (sample, rows)", True),
        ("epsilon = Resize (sample, , factors)", True),
        ('epsilon = Resize <mode = "nearest"> (sample, , factors)', True),
        ('epsilon = Resize <mode = "linear"> (sample, , factors)', False),
        ('epsilon = Resize <mode = "cubic"> (sample, , factors)', False),
        ("epsilon = Sigmoid (sample)", False),
        ("epsilon = Concat <axis = 1> (sample, sample)", False),
    ],
)
def test_data_movers(body: str, moves: bool) -> None:
    assert is_mover(model_of(body).graph[0]) == moves


def test_the_tiny_denoiser() -> None:
    kinds = [layer.kind for layer in layers(infer_shapes(tiny_model()).graph)]
    assert kinds.count("conv") == CONVS + 2
    assert kinds.count("linear") == LINEARS + TIME_LAYERS
    assert kinds.count("attention") == ATTENTIONS
