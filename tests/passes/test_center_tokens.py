"""center_tokens: loud tokens of a prompt leave the range of the others, and the function stays.

The last test plants outliers that users know into a small network without changing what it computes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from mezzotint import Bundle, compile_model
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, numpy_of
from mezzotint.passes.center_tokens import CenterTokens
from tests.helpers.tiny import program_of

LOUD, CHANNEL = 75.0, 50.0
BAR = 25.0  # dB


def network(tokens: int | str = 4) -> ir.Model:
    """Two layers read the prompt, and something else does."""
    w, v = (", ".join(f"{x:.3f}" for x in np.random.default_rng(i).standard_normal(9)) for i in (0, 1))
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
    g (float[batch,3,2,2] sample, int64[batch] timestep, float[batch,{tokens},3] prompt) => (float[batch,3,2,2] epsilon)
    <float[3,3] w = {{{w}}}, float[3,3] v = {{{v}}}, float[3] b = {{1, 2, 3}}, int64[1] along = {{1}},
     int64[2] sides = {{2, 3}}>
    {{ keys = MatMul (prompt, w) plain = MatMul (prompt, v) values = Add (plain, b) both = Add (keys, values)
       all = Add (both, prompt) mean = ReduceMean <keepdims = 0> (all, along) wide = Unsqueeze (mean, sides)
       epsilon = Add (sample, wide) }}"""
    return infer_shapes(ir.from_onnx_text(text))


def prompts(loud: float, token: int = 0) -> np.ndarray[Any, Any]:
    rows = np.random.default_rng(2).standard_normal((6, 4, 3)).astype(np.float32)
    rows[:, token] *= np.float32(loud)
    return rows


def scaled(context: Context, rows: np.ndarray[Any, Any], tokens: int | str = 4, **more: Any) -> tuple[Program, Program]:
    program = program_of(network(tokens), shape=(3, 2, 2), conditions=("prompt",))
    context = replace(context, conditions={"prompt": rows}, **more)
    return program, pipeline.run_passes(program, [CenterTokens()], context)


def outputs(program: Program, context: Context, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = np.random.default_rng(3).standard_normal((2, 3, 2, 2)).astype(np.float32)
    with Executor(program.model, context.folder, threads=1) as executor:
        found: np.ndarray[Any, Any] = executor.call(program.signature, x, 10, {"prompt": rows[:2]})["epsilon"]
    return found


@pytest.mark.parametrize("token", [0, 2])
def test_a_token_that_is_always_the_same_becomes_a_constant(context: Context, token: int) -> None:
    rows = prompts(60.0, token)
    rows[:, token] = rows[0, token]
    before, after = scaled(context, rows)
    means = numpy_of(after.graph.initializers["prompt_means"])
    np.testing.assert_array_equal(means[0, token], rows[0, token])
    assert not np.delete(means[0], token, axis=0).any()
    found = counts(after.graph)
    assert (found["Sub"], found["Mul"]) == (1, 0) and found["Add"] == counts(before.graph)["Add"] + 2
    assert "1 loud tokens of prompt taken out of the range of 2 layers" in after.history[-1].note
    for other in (rows, prompts(60.0, 1), prompts(1.0)):  # also for prompts that begin otherwise
        np.testing.assert_allclose(
            outputs(after, context, other), outputs(before, context, other), rtol=0, atol=1e-5 * np.abs(other).max()
        )


def test_a_loud_token_that_varies_has_a_factor_besides(context: Context) -> None:
    rows = prompts(60.0)
    before, after = scaled(context, rows)
    factors = numpy_of(after.graph.initializers["prompt_factors"]).reshape(-1)
    assert factors[0] in (32, 64, 128) and factors[1:].tolist() == [1, 1, 1] and counts(after.graph)["Mul"] == 3
    np.testing.assert_allclose(outputs(after, context, rows), outputs(before, context, rows), rtol=0, atol=1e-3)


@pytest.mark.parametrize("token", [0, 2])
def test_prompts_of_an_open_length(context: Context, token: int) -> None:
    """The function stays at every length, also at one that ends in front of the loud token."""
    rows = prompts(60.0, token)
    before, after = scaled(context, rows, "tokens")
    tables = [numpy_of(after.graph.initializers[f"prompt_{name}"]) for name in ("means", "factors")]
    assert [table.shape[1] for table in tables] == [token + 2] * 2
    assert not tables[0][0, -1].any() and tables[1].reshape(-1)[[token, -1]].tolist() in ([64, 1], [32, 1])
    for tokens in (1, 3, 4, 7):
        other = np.resize(rows, (2, tokens, 3))
        np.testing.assert_allclose(outputs(after, context, other), outputs(before, context, other), rtol=0, atol=1e-3)


@pytest.mark.parametrize("rows", [prompts(1.0), 0 * prompts(1.0)], ids=["even", "0"])
def test_others_stay(context: Context, rows: np.ndarray[Any, Any]) -> None:
    before, after = scaled(context, rows)
    assert counts(after.graph) == counts(before.graph) and "no token is louder" in after.history[-1].note


def test_the_empty_prompt_counts_too(context: Context) -> None:
    _, after = scaled(context, prompts(1.0), unconditional={"prompt": prompts(60.0)[:1]})
    assert "1 loud tokens" in after.history[-1].note


def test_a_ratio_that_scales_everything_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"center_tokens\.ratio is 1"):
        CenterTokens(ratio=1.0)


def denoiser(file: Path, *, outliers: bool, residual: float = 0.0) -> Path:
    """Write two blocks of cross-attention and GEGLU over tokens `[B, 32, 8]`.

    With outliers it computes the same for the prompts of `spoken(outliers=True)`: layers divide by what was multiplied.
    A `residual` is added to one channel of what all blocks add to, which is another network.
    """
    rng = np.random.default_rng(4)
    width, wide = 32, 64
    direction = loud_direction()

    def normal(*shape: int) -> np.ndarray[Any, Any]:
        return np.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), np.float32)

    tensors: dict[str, np.ndarray[Any, Any]] = {
        "w_in": normal(8, width),
        "b_in": normal(width),
        "w_out": normal(width, 8),
        "w_time": normal(1, width),
        "g": np.ones(width, np.float32),
        "root": np.array(width**-0.5, np.float32),
        "along": np.array([1]),
    }
    tensors["b_in"][3] += residual
    blocks = ""
    for i in range(2):
        made = {name: normal(width, width) for name in ("q", "k", "v", "o")} | {"o": 3 * normal(width, width)}
        made |= {"up": normal(width, 2 * wide), "bias": normal(2 * wide), "down": normal(wide, width)}
        if outliers:
            made["up"][:, 0] *= CHANNEL
            made["bias"][0] *= CHANNEL
            made["down"][0] /= CHANNEL
            for name in ("k", "v"):
                made[name] -= (1 - 1 / LOUD) * np.outer(direction, direction @ made[name])
        tensors |= {f"{name}{i}": array.astype(np.float32) for name, array in made.items()}
        blocks += f"""
        n{i} = LayerNormalization (h{i}, g) queries{i} = MatMul (n{i}, q{i})
        keys{i} = MatMul (prompt, k{i}) turned{i} = Transpose <perm = [0, 2, 1]> (keys{i})
        values{i} = MatMul (prompt, v{i})
        scores{i} = MatMul (queries{i}, turned{i}) even{i} = Mul (scores{i}, root) shares{i} = Softmax (even{i})
        mixed{i} = MatMul (shares{i}, values{i}) attended{i} = MatMul (mixed{i}, o{i}) m{i} = Add (h{i}, attended{i})
        l{i} = LayerNormalization (m{i}, g) plain{i} = MatMul (l{i}, up{i}) both{i} = Add (plain{i}, bias{i})
        hidden{i}, gate{i} = Split <axis = -1, num_outputs = 2> (both{i}) open{i} = Gelu (gate{i})
        gated{i} = Mul (hidden{i}, open{i}) low{i} = MatMul (gated{i}, down{i}) h{i + 1} = Add (m{i}, low{i})"""
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
    g (float[batch,32,8] sample, float[batch] timestep, float[batch,16,32] prompt) => (float[batch,32,8] epsilon)
    {{ column = Unsqueeze (timestep, along) wave = Cos (column) time = MatMul (wave, w_time)
       later = Unsqueeze (time, along) first = MatMul (sample, w_in) start = Add (first, b_in) h0 = Add (start, later)
       {blocks}
       end = LayerNormalization (h2, g) epsilon = MatMul (end, w_out) }}""")
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in tensors.items())
    onnx.save(model, file)
    return file


def loud_direction() -> np.ndarray[Any, Any]:
    loud = np.random.default_rng(9).standard_normal(32)
    return np.asarray(loud / np.linalg.norm(loud), np.float64)


def spoken(*, outliers: bool) -> np.ndarray[Any, Any]:
    """Return 16 prompts whose first token is the same, and 75 times as large with outliers."""
    rows = np.random.default_rng(5).standard_normal((16, 16, 32))
    rows[:, 0] = np.sqrt(32) * loud_direction() * (LOUD if outliers else 1)
    return rows.astype(np.float32)


def worst(bundle: Bundle) -> float:
    """Return the SQNR of the prediction in dB at the worst group of timesteps."""
    acceptance = bundle.manifest.acceptance
    assert acceptance is not None and bundle.manifest.kernels.integer >= 2 * bundle.manifest.kernels.floating
    return min(group.sqnr_db for group in acceptance.groups if group.sqnr_db is not None)


OPTIONS: dict[str, Any] = {
    "scheduler": "ddpm-linear",
    "steps": 4,
    "threads": 1,
    "calibration_samples": 16,
    "acceptance_seconds": 1,
    "channel_axis": -1,
}


def test_a_loud_channel_of_the_residual_stream(tmp_path: Path) -> None:
    """One channel of all tokens has 50, where others have 1, as in Flux and Stable Diffusion 3."""
    file = denoiser(tmp_path / "m.onnx", outliers=False, residual=CHANNEL)
    options = {**OPTIONS, "conditions": {"prompt": spoken(outliers=False)}}
    found = {r: worst(compile_model(file, tmp_path / r, recipe=r, **options)) for r in ("w8a8", "w8a8-steps")}
    assert found["w8a8-steps"] > BAR, found


def test_outliers_that_users_know(tmp_path: Path) -> None:
    """A first token 75 times as large as the others, and a channel of each GEGLU 50 times as large."""
    found = {}
    for name, outliers, recipe, settings in (
        ("without", False, "w8a8-steps", {}),
        ("both", True, "w8a8-steps", {}),
        ("token", True, "w8a8-steps", {"center_tokens.ratio": 1e9, "choose_scales.levels": 0}),
        ("channel", True, "w8a8-steps", {"smooth_scales.gain": 1e9}),
    ):
        options = {**OPTIONS, "conditions": {"prompt": spoken(outliers=outliers)}}
        file = denoiser(tmp_path / f"{name}.onnx", outliers=outliers)
        found[name] = worst(compile_model(file, tmp_path / name, recipe=recipe, settings=settings, **options))
    assert found["both"] > max(BAR, found["without"] - 1.5), found
    assert found["token"] < found["both"] - 5 and found["channel"] < found["both"] - 3, found
