"""Which input is the sample and which the timestep: inferred where it is clear, said where it is not."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mezzotint.compiler.errors import ModelError, SignatureError
from mezzotint.compiler.frontend.roles import infer_signature

FLOAT, HALF, INT64, BOOL = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64, ir.DataType.BOOL
IMAGE = ("B", 1, 8, 8)


def graph(*inputs: tuple[str, ir.DataType, tuple[int | str, ...]], outputs: tuple[str, ...] = ("y",)) -> ir.Graph:
    """An empty graph with this interface; every output is an image."""
    values = [ir.Value(name=n, type=ir.TensorType(d), shape=ir.Shape(s)) for n, d, s in inputs]
    made = [ir.Value(name=n, type=ir.TensorType(FLOAT), shape=ir.Shape(IMAGE)) for n in outputs]
    return ir.Graph(values, made, nodes=[])


X = ("x", FLOAT, IMAGE)
T = ("t", INT64, ("B",))


@pytest.mark.parametrize(
    "timestep", [("t", INT64, ()), ("t", INT64, (1,)), ("t", FLOAT, ("B",)), ("nameless", INT64, ("B",))]
)
def test_roles_follow_from_ranks_and_types(timestep: tuple[str, ir.DataType, tuple[int | str, ...]]) -> None:
    found = infer_signature(graph(timestep, X))

    assert (found.sample, found.timestep, found.output, found.conditions) == ("x", timestep[0], "y", ())


def test_names_decide_between_inputs_that_look_alike() -> None:
    inputs = (
        ("mask", FLOAT, IMAGE),
        ("Sample", FLOAT, IMAGE),
        ("guidance", FLOAT, ("B",)),
        ("timestep", FLOAT, ("B",)),
    )

    found = infer_signature(graph(*inputs))

    assert (found.sample, found.timestep, found.conditions) == ("Sample", "timestep", ("mask", "guidance"))


def test_the_user_has_the_last_word() -> None:
    inputs = (X, ("other", FLOAT, IMAGE), T, ("k", INT64, ("B",)))

    found = infer_signature(
        graph(*inputs, outputs=("y", "z")),
        inputs={"sample": "other", "timestep": "k"},
        output="z",
        prediction="v_prediction",
    )

    assert (found.sample, found.timestep, found.output, found.prediction) == ("other", "k", "z", "v_prediction")
    assert found.conditions == ("x", "t")


@pytest.mark.parametrize(
    ("inputs", "role"),
    [
        ((X,), "timestep"),
        ((X, ("c", FLOAT, ("B", 6))), "timestep"),
        ((X, ("a", INT64, ("B",)), ("b", INT64, ("B",))), "timestep"),
        ((X, ("class_label", INT64, ("B",))), "timestep"),
        ((X, ("flag", BOOL, ("B",))), "timestep"),
        ((T,), "sample"),
        ((T, ("a", FLOAT, IMAGE), ("b", FLOAT, IMAGE)), "sample"),
        ((T, ("image", INT64, IMAGE)), "sample"),
    ],
)
def test_what_cannot_be_told_is_refused(
    inputs: tuple[tuple[str, ir.DataType, tuple[int | str, ...]], ...], role: str
) -> None:
    with pytest.raises(SignatureError, match=f"recognised as the {role}") as caught:
        infer_signature(graph(*inputs), where="m.onnx")

    assert f"--input {role}=NAME" in (caught.value.hint or "")
    assert "m.onnx" in (caught.value.where or "")
    assert all(name in (caught.value.where or "") for name, *_ in inputs), "the inputs there are"


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"sample": "nothing"}, "no input is called 'nothing'"),
        ({"smaple": "x"}, "unknown input role 'smaple'"),
        ({"timestep": "x"}, "'x' cannot be the timestep"),
        ({"sample": "x", "timestep": "x"}, "'x' cannot be the timestep"),
        ({"sample": "k"}, "'k' cannot be the sample"),
    ],
)
def test_a_wrong_role_is_refused(said: dict[str, str], complaint: str) -> None:
    with pytest.raises(SignatureError, match=complaint) as caught:
        infer_signature(graph(X, T, ("k", INT64, ("B",))), inputs=said)

    assert caught.value.hint


def test_several_outputs_need_a_word() -> None:
    with pytest.raises(SignatureError, match="several outputs: y, z") as caught:
        infer_signature(graph(X, T, outputs=("y", "z")))
    with pytest.raises(SignatureError, match="no output is called 'w'"):
        infer_signature(graph(X, T, outputs=("y", "z")), output="w")

    assert "--output" in (caught.value.hint or "")


def test_a_half_precision_sample_is_refused() -> None:
    with pytest.raises(ModelError, match="FLOAT16, not float32") as caught:
        infer_signature(graph(("x", HALF, IMAGE), T))

    assert "float32" in (caught.value.hint or "")
