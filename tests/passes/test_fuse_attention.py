"""fuse_attention: each way in which exporters write an attention, what stays, and what a small network gains."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from mezzotint import compile_model
from mezzotint.compiler.audit.fusion import LayerCounts, audit_fusion
from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.pipeline import Context
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.attention import attention_of
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.nodes import counts, is_op
from mezzotint.passes.fold_scales import FoldScales
from mezzotint.passes.fuse_attention import FuseAttention
from mezzotint.passes.recipes.catalog import RECIPES
from mezzotint.runtime.bundle.bundle import MODEL, Bundle
from mezzotint.runtime.compare import sqnr_db
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.session import Denoiser
from tests.helpers.models import SMALL, Compiled, prompts
from tests.helpers.tiny import program_of

FUSED = "com.microsoft.MultiHeadAttention"
# An attention of 2 heads of width 4 over the 16 pixels of 8 channels; {moves} bring the keys to [batch, 2, 4, 16].
SPLIT = """queries = Reshape <allowzero: int = 0> (rows, apart) q = Transpose <perm = [0, 2, 1, 3]> (queries)
    keys = Reshape (other, apart) values = Reshape (rows, apart) v = Transpose <perm = [0, 2, 1, 3]> (values)"""
DIRECT = "k = Transpose <perm = [0, 2, 3, 1]> (keys)"
THREE_DIMENSIONAL = """first = Transpose <perm = [0, 2, 1, 3]> (keys) flat = Reshape (first, merged)
    turned = Transpose <perm = [0, 2, 1]> (flat) k4 = Reshape (turned, parted) k = Mul (k4, half)"""
OUT = "scores = MatMul (q, k) {scaled} made = MatMul (weights, v) joined = Transpose <perm = [0, 2, 1, 3]> (made)"
PLAIN = "weights = Softmax <axis = -1> (scores)"
SCALED = "smaller = Mul (scores, half) less = Div (smaller, two) weights = Softmax <axis = 3> (less)"
MASKED = "seen = Add (scores, mask) weights = Softmax <axis = -1> (seen)"
OVER_QUERIES = "weights = Softmax <axis = 2> (scores)"
NORMED = "loud = Mul (keys, loudness) k = Transpose <perm = [0, 2, 3, 1]> (loud)"  # as a norm or rotary embedding does
LAST = """outer = Transpose <perm = [3, 1, 2, 0]> (keys) rotated = Mul (outer, scalars)
    k = Transpose <perm = [3, 2, 0, 1]> (rotated)"""
HEADS_AFTER_WIDTH = "wrong = Transpose <perm = [0, 3, 2, 1]> (keys) k = Reshape (wrong, parted)"  # some other keys
GUARD = """seen = Add (scores, bias) bare = Softmax <axis = -1> (seen) empty = IsNaN (bare)
    weights = Where (empty, zero, bare)"""
HIDDEN = f"bias = Where (visible, zero, lowest) {GUARD}"
INFINITE = f"number = Cast <to = 1> (visible) bias = Log (number) {GUARD}"
BY_HEAD = "seen = Add (by_head, scores) weights = Softmax <axis = -1> (seen)"
OF_BOTH = "bias = Mul (known, asked) seen = Add (scores, bias) weights = Softmax <axis = -1> (seen)"


def _some(count: int) -> str:
    return ", ".join(str(n % 5 - 2) for n in range(count))


def network(keys: str, scaled: str, other: str = "more") -> ir.Model:
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,8,4,4] sample, int64[batch] timestep) => (float[batch,8,4,4] epsilon)
    <int64[3] flattened = {{0, 8, 16}}, int64[4] apart = {{0, 16, 2, 4}}, int64[3] merged = {{-1, 16, 4}},
     int64[4] parted = {{-1, 2, 4, 16}}, int64[3] whole = {{0, 16, 8}}, int64[4] images = {{0, 8, 4, 4}},
     float half = {{0.5}}, float two = {{2.0}}, float zero = {{0.0}}, float lowest = {{-3e38}},
     float[16] mask = {{{", ".join(["0"] * 8 + ["-3"] * 8)}}},
     bool[1,1,1,16] visible = {{{", ".join(["1"] * 5 + ["0"] * 11)}}}, float[1,2,1,16] by_head = {{{_some(32)}}},
     float[1,1,1,16] known = {{{_some(16)}}}, float[1,2,16,1] asked = {{{_some(32)}}},
     float[1,1,2,4] loudness = {{{_some(8)}}}, float[4,1,1,1] scalars = {{{_some(4)}}}>
    {{ pixels = Reshape (sample, flattened) rows = Transpose <perm = [0, 2, 1]> (pixels) more = Mul (rows, two)
       {SPLIT.replace("other", other)} {keys} {OUT.format(scaled=scaled)} out = Reshape (joined, whole)
       back = Transpose <perm = [0, 2, 1]> (out) epsilon = Reshape (back, images) }}"""
    return infer_shapes(ir.from_onnx_text(text))


@pytest.mark.parametrize(
    ("keys", "scaled", "scale"),
    [(DIRECT, PLAIN, 1.0), (DIRECT, SCALED, 0.25), (THREE_DIMENSIONAL, PLAIN, 0.5), (THREE_DIMENSIONAL, SCALED, 0.125)],
)
def test_each_form_becomes_one_operation(context: Context, keys: str, scaled: str, scale: float) -> None:
    """The pipeline runs the graph before and after the pass, and refuses another function."""
    after = pipeline.run_passes(program_of(network(keys, scaled), shape=(8, 4, 4)), [FuseAttention(tokens=16)], context)
    found = counts(after.graph)
    assert found[FUSED] == 1 and not found["Softmax"] and not found["MatMul"]
    node = next(node for node in after.graph if node.op_type == "MultiHeadAttention")
    assert node.attributes["num_heads"].as_int() == 2 and node.attributes["scale"].as_float() == pytest.approx(scale)
    assert [value.name for value in node.inputs if value is not None] == ["rows", "more", "rows"]


@pytest.mark.parametrize(
    ("keys", "scaled"),
    [
        (NORMED, PLAIN),
        (LAST, SCALED),
        (HEADS_AFTER_WIDTH, PLAIN),
        *((DIRECT, bias) for bias in (HIDDEN, BY_HEAD, OF_BOTH)),
        (THREE_DIMENSIONAL, OF_BOTH),
    ],
)
def test_heads_behind_other_operations_and_masks(context: Context, keys: str, scaled: str) -> None:
    """What stands between the split into heads and the product stays in front of the operation."""
    after = pipeline.run_passes(program_of(network(keys, scaled), shape=(8, 4, 4)), [FuseAttention(tokens=16)], context)
    found = counts(after.graph)
    assert found[FUSED] == 1 and not found["Softmax"] and not found["MatMul"]


@pytest.mark.parametrize("scaled", [MASKED, OVER_QUERIES, INFINITE])
def test_other_softmaxes_stay(context: Context, scaled: str) -> None:
    """A guard of the softmax acts where a mask is minus infinity for all keys."""
    model = network(DIRECT, scaled)
    after = pipeline.run_passes(program_of(model, shape=(8, 4, 4)), [FuseAttention(tokens=1)], context)
    assert FUSED not in counts(after.graph) and counts(after.graph)["Softmax"] == 1
    assert attention_of(next(node for node in model.graph if is_op(node, "Softmax"))) is None


@pytest.mark.parametrize(("keys", "moved"), [(THREE_DIMENSIONAL, True), (DIRECT, False), (LAST, False)])
def test_keys_of_an_attention_that_stays_are_moved_once(context: Context, keys: str, moved: bool) -> None:
    """The factor behind the moves stays a Mul here: no layer makes these keys."""
    program = program_of(network(keys, PLAIN), shape=(8, 4, 4))
    after = pipeline.run_passes(program, [FoldScales()], context)
    assert ("1 keys moved once" in after.history[-1].note) == moved
    assert counts(after.graph)["Transpose"] == counts(program.graph)["Transpose"] - moved
    assert counts(after.graph)["Mul"] == counts(program.graph)["Mul"]


def test_few_tokens_and_other_targets_keep_the_products(context: Context) -> None:
    program = program_of(network(DIRECT, PLAIN), shape=(8, 4, 4))
    for step in (FuseAttention(tokens=17), FuseAttention(tokens=None)):
        assert FUSED not in counts(pipeline.run_passes(program, [step], context).graph)
    for target, tokens in (("onnxruntime", 1024), ("openvino", None), ("tensorrt", None), ("portable", None)):
        steps = RECIPES["w8a8"].for_target(target).passes  # type: ignore[arg-type]
        assert [step.tokens for step in steps if isinstance(step, FuseAttention)] == [tokens]
    with pytest.raises(RecipeError, match="tokens is 0"):
        FuseAttention(tokens=0)


def test_a_network_with_prompts_runs_and_is_counted(conditional: Compiled, tmp_path: Path) -> None:
    """Self and cross attention of a diffusers network: its open height and width are measured by a call."""
    given = {"encoder_hidden_states": prompts(2)}

    def compiled(tokens: int) -> tuple[Bundle, LayerCounts]:
        bundle = compile_model(
            conditional.exported,
            tmp_path / str(tokens),
            recipe="w8a8",
            conditions=given,
            size=conditional.bundle.sample_shape[1:],
            settings={"fuse_attention.tokens": tokens},
            **{**SMALL, "steps": 2, "calibration_samples": 1},
        )
        return bundle, audit_fusion(bundle.path / MODEL, tmp_path, threads=1).layers

    (_, plain), (bundle, few) = compiled(4096), compiled(16)
    fused = counts(ir.load(bundle.path / MODEL).graph)[FUSED]
    note = next(record.note for record in bundle.manifest.history if record.name == "fuse_attention")
    assert fused > 0 and note.startswith(f"{fused} of ")
    assert few == (plain.integer - 2 * fused, plain.floating + 2 * fused)
    t, x = bundle.deployment.timesteps[0], initial_noise(0, (2, *bundle.sample_shape))
    exact = Denoiser(conditional.exported, bundle.signature, threads=1)(x, t, **given)
    assert sqnr_db(exact, bundle.denoiser(threads=1)(x, t, **given)) > 20
