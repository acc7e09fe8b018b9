"""The axis of a sample's channels, and its sizes: read in the graph, or said by the user."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
import pytest

from mezzotint.compiler.errors import ModelError, SignatureError
from mezzotint.compiler.frontend.roles import infer_signature
from mezzotint.compiler.frontend.sample_shape import image_sides, settle_channel_axis, settle_sample_shape
from mezzotint.runtime.signature import Signature, no_image

SIGNATURE = Signature("x", "t", "y")
BODIES = {
    "a convolution": ("c = Conv (x, w3)", 1),
    "a convolution of two dimensions": ("r = Unsqueeze (x, two)\n c = Conv (r, w4)", 1),
    "a linear layer": ("c = MatMul (x, w2)", 2),
    "a linear layer behind a transpose": ("r = Transpose <perm = [0, 2, 1]> (x)\n c = MatMul (r, w2)", 1),
    "a convolution behind a transpose": ("r = Transpose <perm = [0, 2, 1]> (x)\n c = Conv (r, w3)", 2),
    "a norm, then a convolution of tokens": ("r = LayerNormalization (x, w1)\n c = Conv (r, w3)", 2),
    "an embedding added": ("r = Add (x, place)\n s = Mul (r, place)\n c = MatMul (s, w2)", 2),
}
CONSTANTS: dict[str, list[float] | list[int]] = {
    "w3": [0.0],
    "w4": [0.0],
    "w2": [0.0],
    "w1": [0.0],
    "place": [0.0],
    "two": [2],
}


def graph(body: str, sample: str = "B, 8, 8") -> ir.Graph:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 18]>
        net (float[{sample}] x, int64[B] t) => (float[{sample}] y)
        <float[8, 8, 1] w3, float[8, 8, 1, 1] w4, float[8, 8] w2, float[8] w1,
         float[8] place, int64[1] two> {{
            {body}
            y = Identity (c)
        }}"""
    )
    made = ir.from_proto(model).graph
    for value in {v for node in made for v in node.inputs if v is not None and v.name in CONSTANTS}:
        value.const_value = ir.tensor(CONSTANTS[str(value.name)], name=value.name)
    return made


@pytest.mark.parametrize(("body", "axis"), BODIES.values(), ids=BODIES)
def test_the_first_layer_says_the_axis(body: str, axis: int) -> None:
    found = settle_channel_axis(graph(body), SIGNATURE, None, "net")

    assert found.channel_axis == axis
    assert settle_channel_axis(graph(body), SIGNATURE, 3 - axis, "net").channel_axis == 3 - axis, "the user's word"
    assert settle_channel_axis(graph(body), SIGNATURE, -1, "net").channel_axis == 2


def test_a_graph_without_layers_is_decided_by_its_sizes() -> None:
    body = "c = Softmax (x)"

    assert settle_channel_axis(graph(body, "B, N, 8"), SIGNATURE, None, "net").channel_axis == 2
    assert settle_channel_axis(graph(body, "B, 8, L"), SIGNATURE, None, "net").channel_axis == 1
    with pytest.raises(SignatureError, match="may be") as caught:
        settle_channel_axis(graph(body), SIGNATURE, None, "net")
    assert "--channel-axis" in (caught.value.hint or "")
    with pytest.raises(SignatureError, match="axis 3 of the sample"):
        settle_channel_axis(graph(body), SIGNATURE, 3, "net")
    for sample in ("B, 3, 8, 8", "B, 3, T, 8, 8", "B, 3"):
        assert settle_channel_axis(graph(body, sample), SIGNATURE, None, "net").channel_axis == 1


@pytest.mark.parametrize(
    ("sample", "axis", "size", "shape"),
    [
        ("B, 3, H, W", 1, (16,), (3, 16, 16)),
        ("B, 3, 8, 8", 1, (8,), (3, 8, 8)),
        ("B, 3, H, 8", 1, (4, 8), (3, 4, 8)),
        ("B, H, W, 3", 3, (4, 6), (4, 6, 3)),
        ("B, 2, L", 1, (100,), (2, 100)),
        ("B, N, 6", 2, (7,), (7, 6)),
        ("B, 4, T, H, W", 1, (2, 8, 6), (4, 2, 8, 6)),
        ("B, 4, T, 8, 6", 1, (2,), (4, 2, 8, 6)),
        ("B, 4, 2, 8, 6", 1, None, (4, 2, 8, 6)),
        ("B, 5", 1, None, (5,)),
    ],
)
def test_sizes_fill_what_the_graph_leaves_open(
    sample: str, axis: int, size: tuple[int, ...] | None, shape: tuple[int, ...]
) -> None:
    signature = Signature("x", "t", "y", channel_axis=axis)
    found = settle_sample_shape(graph("c = Softmax (x)", sample), signature, size, "net")

    assert found == shape
    assert (signature.channels(found), len(signature.sides(found))) == (shape[axis - 1], len(shape) - 1)


@pytest.mark.parametrize(
    ("sample", "size", "words"),
    [
        ("B, 3, H, W", None, "--size HxW"),
        ("B, 2, L", None, "--size N"),
        ("B, 4, T, H, W", (8, 8), "--size NxNxN"),
        ("B, C, 8, 8", (8, 8), "the number of channels must be in the graph"),
        ("B, 3, 8, 8", (8, 6), "drop --size"),
        ("B, 2, 64", (32,), "drop --size"),
        ("B, 2, 64", (32, 2), "drop --size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sample: str, size: tuple[int, ...] | None, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        settle_sample_shape(graph("c = Softmax (x)", sample), SIGNATURE, size, "net")

    assert words in (caught.value.hint or "")


def test_the_rank_of_the_prediction_decides_between_inputs() -> None:
    """A rank-4 mask beside tokens, and a rank-3 prompt beside an image, are conditions."""

    def values(**shapes: tuple[int | str, ...]) -> list[ir.Value]:
        float32 = ir.TensorType(ir.DataType.FLOAT)
        return [ir.Value(name=name, type=float32, shape=ir.Shape(shape)) for name, shape in shapes.items()]

    tokens, image, time = ("B", 16, 8), ("B", 4, 8, 8), ("B",)
    for shapes, output, wanted in (
        ({"hidden_states": tokens, "mask": image, "t": time}, tokens, "hidden_states"),
        ({"hidden_states": tokens, "mask": image, "t": time}, image, "mask"),
        ({"video": ("B", 4, 2, 8, 8), "first": image, "t": time}, ("B", 4, 2, 8, 8), "video"),
    ):
        made = ir.Graph(values(**shapes), values(y=output), nodes=[])
        assert infer_signature(made).sample == wanted
    unsaid = ir.Graph(values(hidden_states=tokens, mask=image, t=time), [ir.Value(name="y")], nodes=[])
    assert infer_signature(unsaid).sample == "mask", "an image, where the prediction has no shape"


def test_images_are_told_from_other_samples() -> None:
    assert no_image((3, 8, 8)) is None and no_image((1, 8, 8)) is None
    assert "latents" in str(no_image((4, 8, 8)))
    assert "2x64 are not images" in str(no_image((2, 64)))
    assert (image_sides(None), image_sides((8,)), image_sides((8, 6))) == (None, (8, 8), (8, 6))
    with pytest.raises(ModelError, match="not 2x8x8"):
        image_sides((2, 8, 8))
