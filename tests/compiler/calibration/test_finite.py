"""A float model that fails or computes no numbers is refused before any pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mezzotint import compile_model
from mezzotint.compiler.errors import ModelError
from tests.helpers.models import SMALL, hand_written, write


def above(limit: float) -> onnx.ModelProto:
    """A denoiser that adds sqrt(limit - t) times 0: NaN at timesteps above the limit."""
    model = hand_written(time_dtype=TensorProto.FLOAT)
    graph = model.graph
    next(n for n in graph.node if n.output[0] == "y").output[0] = "y_before"
    for name, value in (
        ("limit", np.float32(limit)),
        ("none", np.float32(0)),
        ("image_shape", np.array([-1, 1, 1, 1])),
    ):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    graph.node.extend(
        [
            helper.make_node("Sub", ["limit", "t"], ["left"]),
            helper.make_node("Sqrt", ["left"], ["root"]),
            helper.make_node("Mul", ["root", "none"], ["zero"]),
            helper.make_node("Reshape", ["zero", "image_shape"], ["zeros"]),
            helper.make_node("Add", ["y_before", "zeros"], ["y"]),
        ]
    )
    return model


@pytest.mark.parametrize("recipe", ["w8a8", "float"])
def test_the_first_timestep_without_numbers_is_named(tmp_path: Path, recipe: str) -> None:
    timesteps = [750, 500, 250, 0]
    for limit in (400, 600):
        source = write(above(limit), tmp_path / f"{limit}.onnx")
        worst = next(t for t in timesteps if t > limit)
        with pytest.raises(ModelError, match=f"NaN or infinite values at timestep {worst}") as caught:
            compile_model(source, tmp_path / "b", recipe=recipe, **SMALL)
        assert caught.value.where == "output y" and caught.value.hint
        assert not list(tmp_path.glob("*.failed")) and not (tmp_path / "b").exists()
    compile_model(write(above(1000), tmp_path / "fine.onnx"), tmp_path / "b", recipe=recipe, **SMALL)
