"""remove_channels: smaller layers, the same function where the channels did not matter, near it where they did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.nodes import numpy_of
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.remove_channels import RemoveChannels
from tests.conftest import Check
from tests.helpers.tiny import program_of

HIDDEN = 24
MODEL = f"""<ir_version: 10, opset_import: ["" : 21]>
denoiser (float[batch,2,4,4] sample, int64[batch] timestep) => (float[batch,2,4,4] epsilon)
<float[8,2,3,3] first_w, float[{HIDDEN},8,1,1] up_w, float[{HIDDEN}] up_b, float[8,{HIDDEN},3,3] down_w,
 float[8,8] token_w, float[2,8,3,3] last_w, int64[3] flat = {{0, 8, 16}}, int64[4] image = {{0, 8, 4, 4}}>
{{
    [first] first = Conv <pads = [1, 1, 1, 1]> (sample, first_w)
    [up] up = Conv (first, up_w, up_b)
    gate = Sigmoid (up)
    active = Mul (up, gate)
    [down] down = Conv <pads = [1, 1, 1, 1]> (active, down_w)
    tokens = Reshape (down, flat)
    turned = Transpose <perm = [0, 2, 1]> (tokens)
    [token] mixed = MatMul (turned, token_w)
    back = Transpose <perm = [0, 2, 1]> (mixed)
    whole = Reshape (back, image)
    [last] epsilon = Conv <pads = [1, 1, 1, 1]> (whole, last_w)
}}"""


def program(context: Context) -> Program:
    model = ir.from_onnx_text(MODEL)
    rng = np.random.default_rng(0)
    for node in list(model.graph):
        for value in node.inputs:
            if value is not None and value.const_value is None and (value.name or "").endswith(("_w", "_b")):
                array = rng.standard_normal(value.shape.numpy()).astype(np.float32) * 0.3  # type: ignore[union-attr]
                value.const_value = ir.tensor(array, name=value.name)
                model.graph.register_initializer(value)
    return pipeline.run_passes(program_of(model, shape=(2, 4, 4), num_train=6, steps=3), [Normalize()], context)


def outputs(each: Program, context: Context) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    x = np.random.default_rng(7).standard_normal((4, 2, 4, 4)).astype(np.float32)
    with Executor(each.model, context.folder, threads=1) as executor:
        return np.asarray(executor.call(each.signature, x, 2)["epsilon"])


def test_channels_that_nothing_reads_go_and_nothing_changes(check_golden: Check) -> None:
    after = check_golden(RemoveChannels(share=0.5, multiple=2), "unread")
    assert after.history[-1].note.startswith("2 of 4 channels of 1 sites removed; squared error of the outputs 0.00%")
    assert "Conv" not in after.refused and any(
        "no layer reads" in text or "island" in text for text in after.refused.values()
    )


def test_the_others_make_up_for_them(context: Context) -> None:
    before = program(context)
    after = pipeline.run_passes(before, [RemoveChannels(share=1 / 3, multiple=4, calls=3)], context)
    shapes = {
        name: value.const_value.shape.numpy() for name, value in after.graph.initializers.items() if value.const_value
    }
    assert (shapes["up_w"], shapes["up_b"], shapes["down_w"]) == ((16, 8, 1, 1), (16,), (8, 16, 3, 3))
    assert "mixes or moves" in after.refused["down"] and "island" in after.refused["token"] + after.refused["first"]
    kept = [
        int(np.flatnonzero(numpy_of(before.graph.initializers["up_b"]) == b)[0])
        for b in numpy_of(after.graph.initializers["up_b"])
    ]
    plain = after.model.clone()
    cut = np.ascontiguousarray(numpy_of(before.graph.initializers["down_w"])[:, kept])
    plain.graph.initializers["down_w"].const_value = ir.tensor(cut, name="down_w")
    want = outputs(before, context)
    errors = [np.sum((outputs(p, context) - want) ** 2) for p in (after, after.with_model(plain))]
    assert errors[0] < 0.5 * errors[1] and errors[0] < 0.3 * np.sum(want**2)


@pytest.mark.parametrize(("option", "value"), [("share", 1.0), ("share", 0.0), ("multiple", 0), ("damp", float("nan"))])
def test_options_that_mean_nothing(option: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"remove_channels.{option} is"):
        RemoveChannels(**{option: value})  # type: ignore[arg-type]
