"""What depends on the timestep only: taint analysis over graphs, not over names."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mezzotint.compiler.graph.constant_folding import infer_shapes
from mezzotint.compiler.graph.topology import on_the_way, time_branch
from tests.helpers.tiny import SIGNATURE, tiny_model

HEAD = """<ir_version: 10, opset_import: ["" : 21]>
g (float[batch,2,4,4] sample, int64[batch] timestep, int64[batch] label) => (float[batch,2,4,4] epsilon)"""


def branch(body: str, constants: str = "float one = {1}, int64[3] axes = {1, 2, 3}") -> tuple[set[str], set[str]]:
    """Names of the branch's values and of its frontier."""
    model = infer_shapes(ir.from_onnx_text(f"{HEAD} <{constants}> {{ {body} }}"))
    found = time_branch(model.graph, SIGNATURE)
    return {v.name or "" for v in found.values}, {v.name or "" for v in found.frontier}


def test_the_tiny_denoiser() -> None:
    found = time_branch(infer_shapes(tiny_model()).graph, SIGNATURE)
    assert {v.name for v in found.frontier} == {"b1_tc", "b2_tc"}
    names = {v.name for v in found.values}
    assert {"number", "waves", "time", "b1_t", "b2_tc"} <= names
    assert not names & {"start", "b1_c1t", "epsilon"}


def test_what_reads_the_sample_is_foreign() -> None:
    values, frontier = branch("""
        number = Cast <to = 1> (timestep)
        double = Add (number, one)
        mixed = Add (sample, double)
        epsilon = Mul (mixed, double)""")
    assert (values, frontier) == ({"number", "double"}, {"double"})


def test_a_class_is_foreign_too() -> None:
    values, frontier = branch("""
        number = Cast <to = 1> (timestep)
        class = Cast <to = 1> (label)
        both = Add (number, class)
        epsilon = Mul (sample, both)""")
    assert (values, frontier) == ({"number"}, {"number"})


def test_sizes_are_neither_timely_nor_foreign() -> None:
    values, frontier = branch("""
        sizes = Shape (sample)
        steps = Shape (timestep)
        number = Cast <to = 1> (timestep)
        ones = Expand (one, sizes)
        column = Unsqueeze (number, axes)
        full = Expand (column, sizes)
        counted = Cast <to = 1> (steps)
        a = Add (full, ones)
        b = Add (sample, a)
        epsilon = Add (b, counted)""")
    assert (values, frontier) == ({"number", "column", "full", "a"}, {"a"})


def test_what_has_the_open_size_of_the_sample_is_left_to_run() -> None:
    text = f"""{HEAD.replace("4,4]", "height,width]")} <int64[3] axes = {{1, 2, 3}}>
    {{
        number = Cast <to = 1> (timestep)
        column = Unsqueeze (number, axes)
        sizes = Shape (sample)
        full = Expand (column, sizes)
        epsilon = Add (sample, full)
    }}"""
    found = time_branch(infer_shapes(ir.from_onnx_text(text)).graph, SIGNATURE)
    assert [v.name for v in found.frontier] == ["column"]


def test_a_value_that_leaves_the_graph_is_on_the_frontier() -> None:
    text = HEAD.replace("=> (", "=> (float[batch] number, ")
    model = ir.from_onnx_text(f"{text} {{ number = Cast <to = 1> (timestep) epsilon = Identity (sample) }}")
    found = time_branch(infer_shapes(model).graph, SIGNATURE)
    assert [v.name for v in found.frontier] == ["number"]


def test_a_timestep_that_nobody_reads() -> None:
    assert branch("epsilon = Add (sample, one)") == (set(), set())


def test_names_play_no_role() -> None:
    values, frontier = branch("""
        time_embedding = Sigmoid (sample)
        pixels = Cast <to = 1> (timestep)
        epsilon = Mul (time_embedding, pixels)""")
    assert (values, frontier) == ({"pixels"}, {"pixels"})


def test_what_a_subgraph_reads_counts() -> None:
    """Which branch of an If is taken depends on the timestep; what it computes, on the sample."""
    values, frontier = branch(
        """
        early = Cast <to = 9> (first)
        chosen = If (early) <
            then_branch = a () => (float[batch,2,4,4] then_out) { then_out = Sigmoid (sample) },
            else_branch = b () => (float[batch,2,4,4] else_out) { else_out = Identity (sample) }>
        epsilon = Add (chosen, one)""".replace("early =", "first = ReduceMax <keepdims = 0> (timestep) early =")
    )
    assert (values, frontier) == ({"first", "early"}, {"early"})


def check_frontier(expected: set[str], body: str) -> None:
    assert branch(body)[1] == expected


def test_a_planted_reader_moves_the_frontier() -> None:
    body = """
        number = Cast <to = 1> (timestep)
        double = Add (number, one)
        mixed = Add (sample, {reader})
        epsilon = Mul (mixed, double)"""
    check_frontier({"double"}, body.format(reader="double"))
    with pytest.raises(AssertionError):
        check_frontier({"double"}, body.format(reader="number"))


@pytest.mark.parametrize(
    ("values", "wanted"),
    [("a d", "b c d"), ("a c", "b c"), ("a d b", "b c d"), ("a", ""), ("e d", ""), ("a sized", ""), ("a no_such", "")],
)
def test_nodes_on_the_way(values: str, wanted: str) -> None:
    """Of a value to another one of the set; sizes lead nowhere, and neither do nodes beside the way."""
    body = """
        a = Mul (sample, one)
        b = Sigmoid (a)
        beside = Sigmoid (a)
        c = Add (b, one)
        d = Mul (c, a)
        e = Sigmoid (sample)
        sizes = Shape (a)
        sized = Reshape (sample, sizes)
        f = Add (d, e)
        g = Add (f, beside)
        epsilon = Add (g, sized)"""
    model = ir.from_onnx_text(f"{HEAD} <float one = {{1}}> {{ {body} }}")
    assert on_the_way(model.graph, values.split()) == set(wanted.split())
