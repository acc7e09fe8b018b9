"""Islands: which layers play a role, on the tiny model and on graphs of a few nodes; names by pattern."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from mezzotint.compiler.core import pipeline
from mezzotint.compiler.core.islands import ROLES, Islands
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.ops import layers
from mezzotint.passes.choose_scales import ChooseScales
from mezzotint.passes.fold_time import FoldTime
from mezzotint.passes.freeze_time import FreezeTime
from mezzotint.passes.insert_qdq import InsertQdq
from mezzotint.passes.lower_norms import LowerNorms
from mezzotint.passes.normalize import Normalize
from mezzotint.passes.observe import Observe
from tests.helpers.tiny import program_of, tiny_program

EXACT: dict[str, tuple[Pass, ...]] = {
    "imported": (Normalize(),),
    "frozen": (Normalize(), FreezeTime(), FoldTime()),
    "lowered": (Normalize(), FreezeTime(), FoldTime(), LowerNorms()),
}


def chosen(program: Program, *islands: str) -> set[str]:
    """The layers that stay in float."""
    every = list(layers(program.graph))
    in_float = Islands(program, every, islands, "test")
    return {layer.name for layer in every if in_float.reason(layer) is not None}


WEIGHTS: dict[str, tuple[int, ...]] = {
    "w": (4, 4, 3, 3),
    "p": (4, 4, 1, 1),
    "wide": (4, 8, 3, 3),
    "tall": (8, 4, 3, 3),
    "v": (4,),
    "patch": (4, 4, 2, 2),
    "square": (4, 4),
    "rows16": (4, 16),
}


def graph_of(body: str, inputs: str = "") -> Program:
    """Float [batch, 4, 8, 8] from `sample` to `epsilon`; 3x3 weights `w`, 1x1 weights `p`, vectors `v`."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[batch,4,8,8] sample, int64[batch] timestep{inputs}) => (float[batch,4,8,8] epsilon)
    <float half = {{0.5}}, int64[4] to_map = {{-1, 1, 1, 1}}, int64[2] sides = {{2, 3}}, int64[1] last_axis = {{3}},
     int64[3] tokens = {{0, 4, 16}}, int64[4] small = {{0, 16, 4, 4}}, float[4,4,3,3] w, float[4,4,1,1] p,
     float[4,8,3,3] wide, float[8,4,3,3] tall, float[4] v, float[4,4,2,2] patch, float[4,4] square, float[4,16] rows16>
    {{ {body} }}""")
    named = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, shape in WEIGHTS.items():
        value = named.get(name)
        if value is not None:
            value.const_value = ir.tensor(np.full(shape, 0.5, np.float32), name=name)
            model.graph.register_initializer(value)
    return program_of(infer_shapes(model), shape=(4, 8, 8))


PAD = "<pads = [1, 1, 1, 1]>"
FIRST = f"[a] a = Conv {PAD} (sample, w)"
LAST = f"[z] epsilon = Conv {PAD} (end, w)"


@pytest.mark.parametrize("stage", EXACT)
@pytest.mark.parametrize(
    ("role", "names"),
    [
        ("first", {"conv_in"}),
        ("second", {"b1_conv1"}),
        ("penultimate", {"b2_conv2", "shortcut"}),
        ("last", {"conv_out"}),
        ("attention", {"scores", "mix"}),
    ],
)
def test_roles_of_the_tiny_model(context: Context, stage: str, role: str, names: set[str]) -> None:
    """The same ones, however far the exact passes have come."""
    assert chosen(pipeline.run_passes(tiny_program(), EXACT[stage], context), role) == names


SECOND = {
    "activations": ("g = Sigmoid (a) b = Mul (a, g) [s] c = Conv {PAD} (b, w)", {"s"}),
    "a norm": ("b = InstanceNormalization (a, v, v) [s] c = Conv {PAD} (b, w)", {"s"}),
    "two": ("[s] b = Conv {PAD} (a, w) [t] d = Conv (a, p) c = Add (b, d)", {"s", "t"}),
    "another layer between": ("[s] b = Conv {PAD} (a, w) [t] c = Conv (b, p)", {"s"}),
    "the sum with itself": ("b = Add (a, a) [s] c = Conv {PAD} (b, w)", {"s"}),
    "a join with the sample": ("b = Add (a, sample) [s] c = Conv {PAD} (b, w)", set[str]()),
    "a join with a layer": (
        "[t] d = Conv {PAD} (a, w) b = Concat <axis = 1> (a, d) [s] c = Conv {PAD} (b, wide)",
        {"t"},
    ),
}


@pytest.mark.parametrize("case", SECOND)
def test_second_stops_where_something_else_comes_in(case: str) -> None:
    middle, names = SECOND[case]
    program = graph_of(f"{FIRST} {middle.replace('{PAD}', PAD)} end = Relu (c) {LAST}")
    assert (chosen(program, "first"), chosen(program, "second")) == ({"a"}, names)


PENULTIMATE = {
    "a branch and its shortcut": ("[b] b = Conv {PAD} (a, w) [s] c = Conv (a, p) end = Add (b, c)", {"b", "s"}),
    "through a norm": (
        "[b] b = Conv {PAD} (a, w) [s] c = Conv (a, p) d = Add (b, c) n = InstanceNormalization (d, v, v) "
        "g = Sigmoid (n) end = Mul (n, g)",
        {"b", "s"},
    ),
    "one alone": ("[b] b = Conv {PAD} (a, w) end = Relu (b)", {"b"}),
    "one addition only": (
        "[b] b = Conv {PAD} (a, w) [s] c = Conv (a, p) d = Add (b, c) [e] e = Conv {PAD} (d, w) end = Add (d, e)",
        {"e"},
    ),
    "no concatenation": (
        "[b] b = Conv {PAD} (a, w) [s] c = Conv (a, p) d = Concat <axis = 1> (b, c) [e] end = Conv {PAD} (d, wide)",
        {"e"},
    ),
}


@pytest.mark.parametrize("case", PENULTIMATE)
def test_penultimate_goes_through_one_addition(case: str) -> None:
    middle, names = PENULTIMATE[case]
    program = graph_of(f"{FIRST} {middle.replace('{PAD}', PAD)} {LAST}")
    assert chosen(program, "last") == {"z"}
    assert chosen(program, "penultimate") == names


def test_first_and_last_are_seen_through_movers() -> None:
    program = graph_of(f"""x = Transpose <perm = [0, 1, 3, 2]> (sample) [a] a = Conv {PAD} (x, w) b = Relu (a)
    [z] z = Conv {PAD} (b, w) epsilon = Transpose <perm = [0, 1, 3, 2]> (z)""")
    assert (chosen(program, "first"), chosen(program, "last")) == ({"a"}, {"z"})
    assert (chosen(program, "second"), chosen(program, "penultimate")) == ({"z"}, {"a"})


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (("b1_*",), {"b1_conv1", "b1_conv2"}),
        (("b?_conv2",), {"b1_conv2", "b2_conv2"}),
        (("down", "up"), {"down", "up"}),
        (("q", "attention"), {"q", "scores", "mix"}),
        ((), set[str]()),
    ],
)
def test_names_by_pattern(tiny: Program, context: Context, patterns: tuple[str, ...], names: set[str]) -> None:
    program = pipeline.run_passes(tiny, EXACT["lowered"], context)
    assert chosen(program, *patterns) == names


def test_the_reason_says_what_was_asked_for(tiny: Program, context: Context) -> None:
    program = pipeline.run_passes(tiny, EXACT["lowered"], context)
    found = {layer.name: layer for layer in layers(program.graph)}
    islands = Islands(program, list(found.values()), (*ROLES, "b1_*"), "test")
    assert islands.reason(found["b1_conv1"]) == f"island 'second': {ROLES['second']}"
    assert islands.reason(found["b1_conv2"]) == "island 'b1_*'"
    assert islands.reason(found["down"]) is None


@pytest.mark.parametrize("pattern", ["seconds", "conv_in?", "nothing*", ""])
def test_a_pattern_that_matches_nothing(tiny: Program, context: Context, pattern: str) -> None:
    program = pipeline.run_passes(tiny, EXACT["lowered"], context)
    with pytest.raises(RecipeError, match="matches no layer") as caught:
        chosen(program, "first", pattern)
    assert caught.value.where == "test"
    hint = str(caught.value.hint)
    assert all(role in hint for role in ROLES)
    assert all(layer.name in hint for layer in list(layers(program.graph))[:4])


def test_roles_that_no_layer_has_are_known() -> None:
    program = graph_of(f"end = Relu (sample) {LAST}")
    assert chosen(program, "attention", "second") == set()
    assert Islands(program, list(layers(program.graph)), ("attention", "first", "z"), "test").unmatched == (
        "attention",
    )


TIME = "n = Cast <to = 1> (timestep) t = Reshape (n, to_map)"
C = f"Conv {PAD}"
WHOLE = {
    "preconditioning": (
        f"{TIME} x = Mul (sample, half) [a] a = {C} (x, w) b = Add (a, t) [s] c = {C} (b, w) d = Relu (c) "
        f"[p] e = {C} (d, w) f = Sigmoid (e) [z] F = {C} (f, w) g = Mul (F, half) h = Mul (sample, half) "
        "epsilon = Add (g, h)",
        ("a", "s", "p", "z"),
    ),
    "a norm first": (
        f"x = InstanceNormalization (sample, v, v) [a] a = {C} (x, w) b = LeakyRelu (a) [s] c = {C} (b, w) "
        f"[p] d = {C} (c, w) e = Relu (d) [z] epsilon = {C} (e, w)",
        ("a", "s", "p", "z"),
    ),
    "a decomposed norm": (
        "m = ReduceMean <keepdims = 1> (sample, sides) x = Sub (sample, m) y = Mul (x, x) "
        f"r = ReduceMean <keepdims = 1> (y, sides) q = Add (r, half) k = Sqrt (q) u = Div (x, k) [a] a = {C} (u, w) "
        f"[s] b = {C} (a, w) [p] c = {C} (b, w) [z] epsilon = {C} (c, w)",
        ("a", "s", "p", "z"),
    ),
    "a shortcut beside the first": (
        f"x = InstanceNormalization (sample, v, v) [a] a = {C} (x, w) [one] o = Conv (sample, p) j = Add (a, o) "
        f"[s] c = {C} (j, w) [p] d = {C} (c, w) [z] epsilon = {C} (d, w)",
        ("a one", "s", "p", "z"),
    ),
    "channels of a condition": (
        f"[embed] hint = {C} (extra, w) x = Concat <axis = 1> (sample, hint) [a] a = {C} (x, wide) "
        f"[s] b = {C} (a, w) [p] c = {C} (b, w) [z] epsilon = {C} (c, w)",
        ("a", "s", "p", "z"),
    ),
    "a transformer": (
        f"{TIME} [a] patches = Conv <strides = [2, 2], kernel_shape = [2, 2]> (sample, patch) "
        "r = Reshape (patches, tokens) k = Transpose <perm = [0, 2, 1]> (r) m = LayerNormalization (k, v) "
        "o = Squeeze (t, last_axis) n1 = Mul (m, o) n2 = Add (n1, o) [s] l1 = MatMul (n2, square) g1 = Sigmoid (l1) "
        "[f] l2 = MatMul (g1, square) stream = Add (k, l2) n3 = LayerNormalization (stream, v) "
        "[p] l3 = MatMul (n3, square) stream2 = Add (stream, l3) n4 = LayerNormalization (stream2, v) "
        "n5 = Mul (n4, o) [z] l4 = MatMul (n5, rows16) "
        "back = Transpose <perm = [0, 2, 1]> (l4) blocks = Reshape (back, small) "
        "epsilon = DepthToSpace <blocksize = 2> (blocks)",
        ("a", "s", "p", "z"),
    ),
    "a variance beside": (
        f"[a] a = {C} (sample, w) [s] b = {C} (a, w) [p] c = {C} (b, w) [z] both = {C} (c, tall) "
        "epsilon, variance = Split <axis = 1, num_outputs = 2> (both)",
        ("a", "s", "p", "z"),
    ),
    "a sum of two at the end": (
        f"[a] a = {C} (sample, w) [s] b = {C} (a, w) c = Relu (b) [p] d = {C} (c, w) [z] e = {C} "
        "(d, w) [y] f = Conv (d, p) h = Add (e, f) epsilon = Tanh (h)",
        ("a", "s", "p", "y z"),
    ),
    "a transposed convolution at both ends": (
        f"up = ConvTranspose {PAD} (sample, w) [s] b = {C} (up, w) epsilon = ConvTranspose {PAD} (b, w)",
        ("", "", "", ""),
    ),
}


@pytest.mark.parametrize("case", WHOLE)
def test_roles_are_found_behind_what_brings_in_no_other_feature_map(case: str) -> None:
    body, names = WHOLE[case]
    program = graph_of(body, ", float[batch,4,8,8] extra" if "extra" in body else "")
    found = [" ".join(sorted(chosen(program, role))) for role in ("first", "second", "penultimate", "last")]
    assert found == list(names)


def test_a_role_that_no_layer_has_is_a_warning(context: Context) -> None:
    program = graph_of(WHOLE["a norm first"][0])
    plan = (Normalize(), Observe(), ChooseScales())
    after = pipeline.run_passes(program, [*plan, InsertQdq(islands=("first", "attention"))], context)
    (warning,) = after.warnings
    assert warning.startswith("insert_qdq: no layer has the role 'attention'; name the layers")
    assert pipeline.run_passes(program, [*plan, InsertQdq(islands=("first", "last"))], context).warnings == ()
