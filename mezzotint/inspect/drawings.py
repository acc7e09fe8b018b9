"""The drawings of a graph's blocks: the items of each, the edges between them, and the ports that lead out.

A drawing shows the children and the nodes of one block. A value that crosses the border of the block becomes a port,
one for each neighbouring block or node at any level; a click on a port leads there. The tables (nodes that depend on
the timestep only) would be connected with everything: only their own drawings show their edges.

Items are [kind, number, label, left, top]; kinds are `b` block, `n` node, `i` and `o` ports in and out (number: the
block, or -1 - node), `I` and `O` the graph's own inputs and outputs (number -1). Edges are [from, to, number of values,
path], the path as x, y, x, y ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .blocks import TIMESTEP_TABLES, PageBlock, count_kinds
from .layout import place_items

NODE, BLOCK, PORT = (186, 40), (206, 58), (170, 24)  # width and height of items, pixels
ItemKey = tuple[str, int | str]


class Drawings:
    """All blocks of a tree, the outermost first.

    `edges` connect nodes; `ends` are (value, node, whether it is an input) of the graph's own inputs and outputs.
    """

    def __init__(
        self,
        root: PageBlock,
        edges: Sequence[tuple[int, int]],
        ends: Sequence[tuple[str, int, bool]],
        kinds: Sequence[str],
        names: Sequence[str],
        all_kinds: Sequence[str],
    ) -> None:
        self.names, self.kinds, self.all_kinds = names, kinds, all_kinds
        self.blocks: list[dict[str, Any]] = []
        self.homes: dict[int, tuple[int, ...]] = {}  # node -> the blocks around it, outermost first
        self._number(root, -1, "", ())
        self.table_blocks = frozenset(
            i for i, b in enumerate(self.blocks) if b["name"] == TIMESTEP_TABLES and b["parent"] == 0
        )
        self.edges: list[list[tuple[int, int]]] = [[] for _ in self.blocks]
        self.ends: list[list[tuple[str, int, bool]]] = [[] for _ in self.blocks]
        for a, b in edges:
            for block in dict.fromkeys((*self.homes[a], *self.homes[b])):
                self.edges[block].append((a, b))
        for end in ends:
            for block in self.homes[end[1]]:
                self.ends[block].append(end)

    def _number(self, block: PageBlock, parent: int, path: str, trail: tuple[int, ...]) -> None:
        mine = len(self.blocks)
        trail = (*trail, mine)
        counted = count_kinds(block, self.kinds)
        row: dict[str, Any] = {"name": block.name, "path": path, "parent": parent, "nodes": block.nodes}
        self.blocks.append(row | {"mix": [counted.get(kind, 0) for kind in self.all_kinds], "children": []})
        self.homes.update(dict.fromkeys(block.nodes, trail))
        for child in block.children:
            self.blocks[mine]["children"].append(len(self.blocks))
            self._number(child, mine, f"{path}/{child.name}" if path else child.name, trail)

    def to_json(self) -> list[dict[str, Any]]:
        return [block | _Sheet(self, mine).to_json() for mine, block in enumerate(self.blocks)]


class _Sheet:
    """One drawing under construction."""

    def __init__(self, all_: Drawings, mine: int) -> None:
        self.all, self.mine = all_, mine
        block = all_.blocks[mine]
        self.items: list[tuple[str, int, str]] = []
        self.places: dict[ItemKey, int] = {}
        for child in block["children"]:
            self._item(("b", child), child, all_.blocks[child]["name"])
        for node in block["nodes"]:
            self._item(("n", node), node, label(all_.names[node], block["path"]))
        self.around = [mine]  # this block and the blocks around it, innermost first
        while (parent := all_.blocks[self.around[-1]]["parent"]) >= 0:
            self.around.append(parent)

    def _item(self, key: ItemKey, number: int, text: str) -> int:
        if key not in self.places:
            self.places[key] = len(self.items)
            self.items.append((key[0], number, text))
        return self.places[key]

    def _inside(self, node: int) -> int | None:
        """Return the item that is the node or contains it; None for a node outside the block."""
        trail = self.all.homes[node]
        if self.mine not in trail:
            return None
        inner = trail[trail.index(self.mine) + 1 :]
        return self.places[("b", inner[0])] if inner else self.places[("n", node)]

    def _port(self, node: int, side: str) -> int:
        """Return the port for a node outside the block."""
        trail = self.all.homes[node]
        common = next(block for block in self.around if block in trail)
        inner = trail[trail.index(common) + 1 :]
        number = inner[0] if inner else -1 - node
        text = self.all.blocks[inner[0]]["name"] if inner else label(self.all.names[node], "")
        return self._item((side, number), number, text)

    def _from_tables(self, node: int) -> bool:
        """Return whether a node belongs to the tables while this drawing does not."""
        return not self.all.table_blocks.isdisjoint(self.all.homes[node]) and self.all.table_blocks.isdisjoint(
            self.around
        )

    def _connected(self) -> dict[tuple[int, int], int]:
        """Return the number of values on each edge (from, to) between items."""
        counts: dict[tuple[int, int], int] = {}
        in_tables = not self.all.table_blocks.isdisjoint(self.around)
        for a, b in self.all.edges[self.mine]:
            start, end = self._inside(a), self._inside(b)
            if self._from_tables(a) or (in_tables and end is None) or (start is not None and start == end):
                continue
            pair = (
                self._port(a, "i") if start is None else start,
                self._port(b, "o") if end is None else end,
            )
            counts[pair] = counts.get(pair, 0) + 1
        for name, node, comes in self.all.ends[self.mine]:
            at = self._inside(node)
            if at is None or self._from_tables(node):
                continue
            end = self._item(("I" if comes else "O", name), -1, name)
            counts[(end, at) if comes else (at, end)] = 1
        return counts

    def to_json(self) -> dict[str, Any]:
        counts = self._connected()
        drawn = place_items([{"n": NODE, "b": BLOCK}.get(kind, PORT) for kind, _, _ in self.items], list(counts))
        return {
            "items": [[*item, *place] for item, place in zip(self.items, drawn.places, strict=True)],
            "edges": [[*pair, count, [xy for p in drawn.ways[pair] for xy in p]] for pair, count in counts.items()],
            "size": [drawn.width, drawn.height],
        }


def label(name: str, path: str) -> str:
    """Return a node's name relative to a block."""
    inner = name.strip("/")
    return inner[len(path) + 1 :] if path and inner.startswith(path + "/") else inner


def ends_of(
    rows: Sequence[Mapping[str, Any]], values: Sequence[Sequence[Any]], inputs: Sequence[int], outputs: Sequence[int]
) -> list[tuple[str, int, bool]]:
    """Return (value, node, whether it is an input) of the graph's own inputs and outputs."""
    entering, leaving = set(inputs), set(outputs)
    ends: dict[tuple[str, int, bool], None] = {}
    for node, row in enumerate(rows):
        ends |= dict.fromkeys((values[v][0], node, True) for v in row["in"] if v in entering)
        ends |= dict.fromkeys((values[v][0], node, False) for v in row["out"] if v in leaving)
    return list(ends)
