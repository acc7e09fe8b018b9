"""The compiled graph as data: blocks, drawings, the quantizers of each node, and times by node."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import zlib
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from mezzotint import Bundle
from mezzotint.bench import bench
from mezzotint.bench.trace import node_seconds
from mezzotint.inspect import data as inspect_data
from mezzotint.inspect.blocks import LARGE, TIMESTEP_TABLES, PageBlock, make_blocks
from mezzotint.inspect.graph import NODE_KINDS, read_graph
from mezzotint.inspect.layout import Placement, place_items
from mezzotint.inspect.page import page_data
from mezzotint.inspect.sites import quantizers_of
from mezzotint.runtime.bundle.ranges import RANGES
from tests.helpers.browser import changed_bundle, made_up_ranges, named_bundle
from tests.helpers.models import CONVS, INTEGER, THREADS, Compiled

ROOT = Path(__file__).parents[3]
Edges = list[tuple[int, int]]


def chain(count: int) -> Edges:
    return [(i, i + 1) for i in range(count - 1)]


def blocks(block: PageBlock) -> Iterator[PageBlock]:
    yield block
    for child in block.children:
        yield from blocks(child)


def check_tree(tree: PageBlock, count: int) -> None:
    assert sorted(tree.all_nodes()) == list(range(count))
    assert max(block.items for block in blocks(tree)) <= 80


def overlapping(drawn: Placement, sizes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    boxes = [(x, y, x + w, y + h) for (x, y), (w, h) in zip(drawn.places, sizes, strict=True)]
    return [
        (i, j)
        for (i, a), (j, b) in combinations(enumerate(boxes), 2)
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


class TestLayout:
    @pytest.mark.parametrize("seed", range(4))
    def test_nothing_overlaps_and_edges_go_down(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        sizes = [(int(w), int(h)) for w, h in 2 * rng.integers(10, 100, (40, 2))]
        pairs = {(min(a, b), max(a, b)) for a, b in rng.integers(0, 40, (60, 2)).tolist() if a != b}
        drawn = place_items(sizes, sorted(pairs))

        assert overlapping(drawn, sizes) == []
        for (a, b), way in drawn.ways.items():
            assert way[0][1] == drawn.places[a][1] + sizes[a][1] and way[-1][1] == drawn.places[b][1]
            assert all(one[1] <= two[1] for one, two in pairwise(way))
        points = [*drawn.places, *(p for way in drawn.ways.values() for p in way)]
        assert min(x for x, _ in points) >= 0 and min(y for _, y in points) >= 0
        assert all(x + w <= drawn.width for (x, _), (w, _) in zip(drawn.places, sizes, strict=True))

    def test_the_check_finds_overlaps(self) -> None:
        assert overlapping(Placement(((0, 0), (5, 5)), {}, 0, 0), [(10, 10), (10, 10)]) == [(0, 1)]

    def test_cycles_and_parts(self) -> None:
        sizes = [(100, 40)] * 7
        drawn = place_items(sizes, [(0, 1), (1, 2), (2, 0), (3, 4)])
        assert overlapping(drawn, sizes) == [] and set(drawn.ways) == {(0, 1), (1, 2), (2, 0), (3, 4)}

    def test_nothing_at_all(self) -> None:
        assert place_items([], []) == Placement((), {}, 0, 0)

    def test_long_edges_pass_next_to_items(self) -> None:
        sizes = [(100, 40)] * 5
        drawn = place_items(sizes, [*chain(5), (0, 4)])
        way = drawn.ways[0, 4]
        passed = [(drawn.places[i][0], drawn.places[i][0] + 100) for i in (1, 2, 3)]
        assert len(way) == 2 + 2 * len(passed)
        for (left, right), (x, top), (same, bottom) in zip(passed, way[1:-1:2], way[2:-1:2], strict=True):
            assert x == same and bottom - top == 40 and not left <= x <= right


class TestBlocks:
    def test_modules_become_blocks(self) -> None:
        names = [f"down.{i // 20}/resnets.{i // 10 % 2}/conv{i // 5 % 2}/Op_{i}" for i in range(40)]
        tree = make_blocks(names, chain(40), frozenset())

        check_tree(tree, 40)
        assert [child.name for child in tree.children] == ["down.0", "down.1"]
        assert [child.name for child in tree.children[0].children] == ["resnets.0", "resnets.1"]
        assert [child.name for child in tree.children[0].children[0].children] == ["conv0", "conv1"]

    def test_tiny_blocks_dissolve_and_lonely_ones_merge(self) -> None:
        names = [*(f"a/b/c/Op_{i}" for i in range(8)), "a/b/d/Op_8", *(f"e/f/Op_{i}" for i in range(9, 16))]
        tree = make_blocks(names, chain(16), frozenset())
        assert [child.name for child in tree.children] == ["a/b", "e/f"]
        assert [child.name for child in tree.children[0].children] == ["c"] and tree.children[0].nodes == [8]

    def test_nodes_without_a_name_go_where_they_are_read(self) -> None:
        names = [*(f"a/Op_{i}" for i in range(6)), "helper", *(f"b/Op_{i}" for i in range(7, 14))]
        tree = make_blocks(names, [*chain(6), (6, 9), *chain(14)[6:]], frozenset())
        assert {child.name: 6 in child.nodes for child in tree.children} == {"a": False, "b": True}

    def test_names_that_tell_nothing(self) -> None:
        """A chain of diamonds: the nodes between two narrow places stay together."""
        edges: Edges = []
        for start in range(0, 400, 20):
            edges += [(start, start + k) for k in (1, 2, 3)]
            edges += [(start + k, start + k + 3) for k in range(1, 16)]
            edges += [(start + k, start + 19) for k in (16, 17, 18)]
            edges += [(start + 19, start + 20)] if start < 380 else []
        tree = make_blocks([f"node_{i}" for i in range(400)], edges, frozenset())

        check_tree(tree, 400)
        assert 5 <= len(tree.children) <= LARGE
        home = {i: n for n, child in enumerate(tree.children) for i in child.all_nodes()}
        assert sum(len({home[s + k] for k in range(1, 19)}) == 1 for s in range(0, 400, 20)) > 12

    @pytest.mark.parametrize("count", [1, LARGE, LARGE + 1, 300, 7000])
    def test_a_chain_of_any_length(self, count: int) -> None:
        tree = make_blocks([f"n{i}" for i in range(count)], chain(count), frozenset())
        check_tree(tree, count)
        assert count <= LARGE or min(block.items for block in blocks(tree)) > 1

    def test_shortcuts_everywhere(self) -> None:
        edges = sorted({(i, j) for i in range(500) for j in (i + 1, i + 7, i + 90) if j < 500})
        check_tree(make_blocks([f"n{i}" for i in range(500)], edges, frozenset()), 500)

    def test_tables_stand_apart(self) -> None:
        tree = make_blocks([f"a/Op_{i}" for i in range(20)], chain(20), frozenset({0, 3}))
        assert tree.children[0].name == TIMESTEP_TABLES and tree.children[0].nodes == [0, 3]
        tree = make_blocks([f"n{i}" for i in range(7000)], chain(7000), frozenset(range(100)))
        assert [child.name for child in tree.children].count(TIMESTEP_TABLES) == 1 and tree.items > 5
        check_tree(tree, 7000)


@pytest.fixture(scope="module")
def graph(hand: Compiled) -> dict[str, Any]:
    rows = {row["name"]: row for row in inspect_data.verdict_rows(hand.bundle)}
    return read_graph(hand.bundle.model_path, "t", rows, hand.bundle.manifest.islands)


class TestGraph:
    def test_it_is_the_graph_of_the_file(self, hand: Compiled, graph: dict[str, Any]) -> None:
        model = onnx.load(hand.bundle.model_path)
        assert [n["name"] for n in graph["nodes"]] == [n.name for n in model.graph.node]
        names = [value[0] for value in graph["values"]]
        for row, node in zip(graph["nodes"], model.graph.node, strict=True):
            assert row["op"] == node.op_type
            assert [names[v] for v in row["out"]] == list(node.output)
            assert ["" if v < 0 else names[v] for v in row["in"]] == list(node.input)
        assert [names[v] for v in graph["inputs"]] == ["x", "t"]

    def test_kinds(self, graph: dict[str, Any]) -> None:
        kinds = [NODE_KINDS[node["kind"]] for node in graph["nodes"]]
        assert kinds.count("integer") == INTEGER and kinds.count("island") == CONVS - INTEGER
        assert kinds.count("unfused") == 0 and kinds.count("float") >= 3
        assert {n["op"] for n, k in zip(graph["nodes"], kinds, strict=True) if k == "quantize"} == {
            "QuantizeLinear",
            "DequantizeLinear",
        }

    def test_a_layer_that_was_not_fused(self, hand: Compiled) -> None:
        rows = {row["name"]: {**row, "integer": False} for row in inspect_data.verdict_rows(hand.bundle)}
        data = read_graph(hand.bundle.model_path, "t", rows, {})
        assert [NODE_KINDS[node["kind"]] for node in data["nodes"]].count("unfused") == CONVS

    def test_every_edge_is_drawn_or_leads_out(self, hand: Compiled, tmp_path: Path) -> None:
        bundle, _ = named_bundle(hand.bundle, tmp_path / "named")
        data = read_graph(bundle.model_path, "t", {}, {})
        made = {v: i for i, node in enumerate(data["nodes"]) for v in node["out"]}
        wanted = {(made[v], i) for i, node in enumerate(data["nodes"]) for v in node["in"] if v in made}
        inside = {
            tuple(block["items"][end][1] for end in edge[:2])
            for block in data["blocks"]
            for edge in block["edges"]
            if all(block["items"][end][0] == "n" for end in edge[:2])
        }
        home = {node: i for i, block in enumerate(data["blocks"]) for node in block["nodes"]}
        assert inside == {(a, b) for a, b in wanted if home[a] == home[b]}
        root = data["blocks"][0]
        assert {item[2] for item in root["items"] if item[0] in "IO"} == {"x", "y"}

    def test_quantizers_find_their_nodes(self, hand: Compiled, graph: dict[str, Any]) -> None:
        sites = [q.site for q in hand.bundle.manifest.quantizers]
        rows = quantizers_of(graph, sites)
        layers = {
            node["name"]: {role: sites[row] for row, role in found}
            for node, found in zip(graph["nodes"], rows, strict=True)
            if NODE_KINDS[node["kind"]] == "integer"
        }
        assert len(layers) == INTEGER
        for name, roles in layers.items():
            assert roles["weight"] == f"{name}.w" and roles["input"].endswith(".act")

    def test_two_runs_of_python_draw_the_same(self, hand: Compiled) -> None:
        code = (
            "import hashlib, json, sys; from pathlib import Path; from mezzotint.inspect.graph import read_graph; "
            "data = read_graph(Path(sys.argv[1]), 't', {}, {}); "
            "print(hashlib.sha256(json.dumps(data).encode()).hexdigest())"
        )
        command = [sys.executable, "-c", code, str(hand.bundle.model_path)]
        runs = [
            subprocess.run(command, cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True)
            for seed in ("1", "2")
        ]
        mine = read_graph(hand.bundle.model_path, "t", {}, {})
        assert {r.stdout.strip() for r in runs} == {hashlib.sha256(json.dumps(mine).encode()).hexdigest()}


class TestData:
    def test_ranges_are_rows_of_the_manifest(self, hand: Compiled) -> None:
        table = made_up_ranges(hand.bundle)
        section = inspect_data.range_section(hand.bundle, table)
        count = len(hand.bundle.manifest.quantizers)
        assert {len(section[name]) for name in ("low", "high", "scale", "seen_low", "seen_high")} == {count}
        moving = next(i for i, row in enumerate(section["low"]) if isinstance(row, list))
        assert section["low"][moving] == pytest.approx(table.low[moving].tolist(), rel=1e-3)
        assert any(row is None for row in section["seen_low"])  # what was not measured
        json.dumps(section, allow_nan=False)

    def test_ranges_of_another_bundle(self, hand: Compiled, unet: Compiled) -> None:
        section = inspect_data.range_section(hand.bundle, made_up_ranges(unet.bundle))
        assert "the manifest lists" in section["note"]

    def test_a_bundle_without_ranges(self, hand: Compiled, tmp_path: Path) -> None:
        assert RANGES in inspect_data.range_section(hand.bundle, None)["note"]
        bare = changed_bundle(hand.bundle, tmp_path / "b", onnx.load(hand.bundle.model_path), quantizers=[])
        assert inspect_data.range_section(bare, None)["note"] == "nothing in this bundle is quantized"

    def test_differences_come_back(self, hand: Compiled) -> None:
        for row in inspect_data.passes_section(hand.bundle)["rows"]:
            text = (hand.bundle.path / "passes" / f"{row['number']:03d}_{row['name']}.diff").read_text()
            assert (
                zlib.decompress(base64.b64decode(row["diff"]["text"])).decode() == text
                if text
                else not row["diff"]["text"]
            )

    def test_the_four_questions(self, hand: Compiled) -> None:
        cost = {"rows": [{"name": "a", "share": 0.7, "kind": "bits"}, {"name": "b", "share": 0.3, "kind": "-"}]}
        speed = {"call_ms": 1.25, "groups": [{"group": "layout", "nodes": 3, "share": 0.6}]}
        rows = inspect_data.verdict_rows(hand.bundle)
        kept, slow, changed, error = inspect_data.answers(hand.bundle, rows, {"speed": speed, "cost": cost})
        assert kept["head"] == f"{CONVS - INTEGER} of {CONVS} quantized groups and layers" and any(
            "island" in line for line in kept["lines"]
        )
        assert slow["head"] == "1.25 ms a call" and slow["lines"] == ["60% layout (3 nodes)"]
        assert any("insert_qdq" in line for line in changed["lines"])
        assert error["head"] == "100% from 2 of 2 layers" and error["lines"][0]["node"] == "a"


def test_times_by_node(hand: Compiled) -> None:
    """Every layer has a time, float ones too (onnxruntime names those by their output); nothing is lost or doubled."""
    bundle: Bundle = hand.bundle
    found = bench.profile(bundle, 1, {}, THREADS, 3)
    speed = {"call_ms": 1.0, "groups": [], "nodes": {k: v * 1e3 for k, v in node_seconds(found).items()}}
    data = page_data(bundle, {"speed": speed, "pictures": {"note": ""}, "cost": {"note": ""}})

    times = {node["name"]: node["ms"] for node in data["graph"]["nodes"] if "ms" in node}
    assert set(bundle.manifest.kernels.layers) <= set(times)
    assert min(times.values()) >= 0 and data["speed"]["other_ms"] >= 0
    assert sum(times.values()) + data["speed"]["other_ms"] == pytest.approx(sum(found.nodes.values()) * 1e3, abs=0.01)
