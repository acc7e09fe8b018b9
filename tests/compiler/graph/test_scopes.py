"""Node names: the path of the module, also for the nodes that passes add."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from mezzotint.compiler.graph.nodes import Builder, Names
from mezzotint.compiler.graph.scopes import SCOPES, name_by_module, scope_of, within


def chain(*scopes: str) -> ir.Graph:
    """A graph of one Relu after another, with these notes of the exporter."""
    value = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    inputs, nodes = [value], []
    for i, noted in enumerate(scopes):
        node = ir.node("Relu", [value], name=f"node_{i}")
        node.metadata_props.update({SCOPES: noted} if noted else {})
        node.outputs[0].name = f"v{i}"
        nodes.append(node)
        value = node.outputs[0]
    return ir.Graph(inputs, [value], nodes=nodes, opset_imports={"": 21})


def names(graph: ir.Graph) -> list[str]:
    return [node.name or "" for node in graph]


def test_the_path_of_modules_and_the_operation_make_the_name() -> None:
    graph = chain(
        "['', 'model', 'model.down.0', 'model.down.0.conv', 'conv2d']",
        "['', 'model', 'model.down.0', 'model.down.0.act', 'silu']",
        "['', 'model', 'model.down.0', 'model.down.0.act', 'silu']",
        "['', 'model', 'add']",
    )
    assert name_by_module(graph) == 4
    assert names(graph) == ["down.0/conv/Relu", "down.0/act/Relu", "down.0/act/Relu_1", "Relu"]


def test_a_module_that_some_nodes_are_not_in_is_kept() -> None:
    graph = chain("['', 'unet', 'unet.conv', 'conv2d']", "['', 'head', 'relu']")
    name_by_module(graph)
    assert names(graph) == ["unet/conv/Relu", "head/Relu"]


@pytest.mark.parametrize("noted", ["", "[", "'text'", "[1, 2]", "[]", "['']", "__import__('os').getcwd()"])
def test_nodes_without_readable_notes_keep_their_names(noted: str) -> None:
    graph = chain(noted)
    assert name_by_module(graph) == 0
    assert names(graph) == ["node_0"]


def test_a_name_that_is_taken_is_not_given_twice() -> None:
    graph = chain("", "['', 'm', 'm.a', 'relu']", "['', 'm', 'm.b', 'relu']")
    graph[0].name = "a/Relu"
    name_by_module(graph)
    assert names(graph) == ["a/Relu", "a/Relu_1", "b/Relu"]


def test_names_do_not_change_when_they_are_given_again() -> None:
    graph = chain("['', 'm', 'm.a', 'relu']", "['', 'm', 'm.a', 'relu_1']")
    name_by_module(graph)
    before = names(graph)
    name_by_module(graph)
    assert names(graph) == before


def test_what_is_added_stands_in_the_scope_of_its_node() -> None:
    graph = chain("['', 'm', 'm.a', 'relu']", "['', 'm', 'm.b', 'relu']")
    name_by_module(graph)
    known = Names(graph)
    added = Builder(graph, known, after=graph[0]).op("Identity", [graph[0].outputs[0]], "v0_copy")
    inside = Builder(graph, known, graph[2]).op("Identity", [added], "b/Relu_input")
    apart = Builder(graph, known, graph[0], scope="tables").op("Identity", [graph.inputs[0]], "row")
    made = [value.producer() for value in (added, inside, apart)]
    assert [node.name for node in made if node] == ["a/v0_copy", "b/Relu_input", "tables/row"]
    assert added.name == "v0_copy"


def test_scopes_of_names() -> None:
    node = ir.node("Relu", [None], name="/down/0/Relu")
    assert scope_of(node) == "/down/0"
    assert within("", "x") == "x"
    assert within("a", "ab/x") == "a/ab/x"
