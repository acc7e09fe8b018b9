"""score_products: the two products of an attention, and what is none."""

from __future__ import annotations

import pytest

from mezzotint.compiler.graph.score_products import only_read_by, score_products
from tests.helpers.attention import MASKED, SOFTMAX, attention_program

TWICE = f"{SOFTMAX} again = Add (scaled, half)"
BY_QUERY = "sums = ReduceSum <keepdims = 1> (scores) shares = Div (scores, sums) weights = Softmax <axis = -1> (shares)"
COMPUTED = "scaled = Mul (scores, scores) weights = Softmax <axis = -1> (scaled)"


@pytest.mark.parametrize("softmax", [SOFTMAX, MASKED])
def test_both_products_are_found(softmax: str) -> None:
    (found,) = score_products(attention_program(softmax).graph)
    assert found.scores.name == "scores" and found.mix is not None and found.mix.name == "mix"


@pytest.mark.parametrize("softmax", [TWICE, BY_QUERY, COMPUTED])
def test_scores_that_others_read_or_that_meet_each_other_are_none(softmax: str) -> None:
    assert not score_products(attention_program(softmax).graph)


def test_weights_that_others_read_have_no_second_product() -> None:
    (found,) = score_products(attention_program(f"{SOFTMAX} twice = Add (weights, weights)").graph)
    assert found.mix is None


def test_the_way_from_rows_to_an_operand() -> None:
    graph = attention_program().graph
    values = {value.name: value for node in graph for value in node.outputs}
    reader = only_read_by(values["keys"], values["k"])
    assert reader is not None and reader.outputs[0].name == "k4"
    assert only_read_by(values["queries"], values["k"]) is None
