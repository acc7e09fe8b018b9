"""Which layers decide the content of an image: cross-attention and feed-forward, however they are spelt."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.bits.content import content_layers
from mezzotint.compiler.graph.constant_folding import infer_shapes
from tests.helpers.tiny import program_of

ERF = "{0}_e = Erf ({0}) {0}_f = Add ({0}_e, one) {0}_act = Mul ({0}, {0}_f)"
TANH = "{0}_q = Mul ({0}, {0}) {0}_s = Add ({0}, {0}_q) {0}_t = Tanh ({0}_s) {0}_act = Mul ({0}, {0}_t)"
SILU = "{0}_g = Sigmoid ({0}) {0}_act = Mul ({0}, {0}_g)"
GATED = "{0}_v, {0}_w = Split <axis = 2, num_outputs = 2> ({0}) {0}_g = Gelu ({0}_w) {0}_act = Mul ({0}_v, {0}_g)"


def attention(name: str, queries: str, source: str) -> str:
    return f"""
    [{name}_q] {name}_qv = MatMul ({queries}, w_q)
    [{name}_k] {name}_kv = MatMul ({source}, w_k)
    [{name}_v] {name}_raw = MatMul ({source}, w_v)
    {name}_vv = Add ({name}_raw, b)
    {name}_turned = Transpose <perm = [0, 2, 1]> ({name}_kv)
    [{name}_scores] {name}_s = MatMul ({name}_qv, {name}_turned)
    {name}_scaled = Mul ({name}_s, one)
    {name}_p = Softmax <axis = -1> ({name}_scaled)
    [{name}_mix] {name}_m = MatMul ({name}_p, {name}_vv)
    [{name}_out] {name}_o = MatMul ({name}_m, w_o)
    {name} = Add ({queries}, {name}_o)
    """


def block(activation: str, wide: int) -> ir.Model:
    """Tokens, self-attention, cross-attention, feed-forward, each behind a residual addition; a time embedding too."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,1,8,4] sample, int64[batch] timestep, float[batch,3,4] words) => (float[batch,1,8,4] epsilon)
    <float one = {{1.0}}, float[4] b, float[4,4] w_q, float[4,4] w_k, float[4,4] w_v, float[4,4] w_o, float[4,4] w_i,
     float[4,{wide}] w_1, float[4,4] w_2, int64[2] four, int64[1] axis = {{1}}, int64[1] last = {{1}}>
    {{
    number = Cast <to = 1> (timestep)
    column = Unsqueeze (number, last)
    row = Expand (column, four)
    [time_1] emb = MatMul (row, w_i)
    emb_a = Sigmoid (emb)
    [time_2] shift = MatMul (emb_a, w_i)
    shift_row = Unsqueeze (shift, last)
    tokens = Squeeze (sample, axis)
    [proj_in] start = MatMul (tokens, w_i)
    timed = Add (start, shift_row)
    {attention("own", "timed", "timed")}
    {attention("cross", "own", "words")}
    mean = ReduceMean <keepdims = 1> (cross, axis)
    centred = Sub (cross, mean)
    [ff_1] hidden = MatMul (centred, w_1)
    {activation.format("hidden")}
    [ff_2] wide = MatMul (hidden_act, w_2)
    added = Add (wide, cross)
    end_mean = ReduceMean <keepdims = 1> (added, axis)
    end_centred = Sub (added, end_mean)
    end_gate = Sigmoid (end_centred)
    [proj_out] out = MatMul (end_gate, w_o)
    epsilon = Unsqueeze (out, axis)
    }}""")
    rng = np.random.default_rng(0)
    missing = {v.name: v for node in model.graph for v in node.inputs if v is not None and v.producer() is None}
    given = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
    sizes = {"b": (4,), "w_1": (4, wide)}
    for name, value in missing.items():
        if name not in given:
            array = np.array([1, 4]) if name == "four" else rng.standard_normal(sizes.get(str(name), (4, 4)))
            value.const_value = ir.tensor(array if name == "four" else array.astype(np.float32), name=name)
            model.graph.register_initializer(value)
    return infer_shapes(model)


@pytest.mark.parametrize(("activation", "wide"), [(ERF, 4), (TANH, 4), (SILU, 4), (GATED, 8)])
def test_cross_attention_and_feed_forward(activation: str, wide: int) -> None:
    """Not self-attention, nor the projections around them, nor the time embedding's two layers."""
    program = program_of(block(activation, wide), shape=(1, 8, 4), conditions=("words",))
    found = content_layers(program)
    assert found == {*(f"cross_{part}" for part in ("q", "k", "v", "scores", "mix", "out")), "ff_1", "ff_2"}


def test_without_a_condition_attention_is_all_quality() -> None:
    model = block(ERF, 4)
    words = next(v for v in model.graph.inputs if v.name == "words")
    for node in list(model.graph):
        if node.name in ("cross_k", "cross_v"):
            node.replace_input_with(0, next(n for n in model.graph if n.name == "own_out").outputs[0])
    model.graph.inputs.remove(words)
    assert content_layers(program_of(model, shape=(1, 8, 4))) == {"ff_1", "ff_2"}
