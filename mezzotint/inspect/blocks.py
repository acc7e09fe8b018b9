"""The blocks of a graph: a tree whose leaves are nodes, each block small enough to be drawn and read.

The name of a node holds its modules, separated by slashes (`mid_block/resnets.0/conv1/Conv`). A block is a module. A
block with very few nodes is dissolved in the block around it, a block that only holds another block is merged with it,
and a block with too many items is cut into parts.

Cutting, and graphs without module names, use dominators: a node dominates the nodes that can be reached through it
only, so whole subtrees of the dominator tree stay together while they are small enough. Nodes for which this finds no
part (in a graph with long shortcuts everywhere) are cut into runs of the topological order.

Nodes that depend on the timestep only, or on no input at all, have a block of their own (TIMESTEP_TABLES): their edges
lead everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

TIMESTEP_TABLES = "timestep tables"
SMALL, LARGE = 5, 60  # items of a block: with fewer nodes it is dissolved, with more items it is cut
_PART = 24  # the number of nodes of a part that a cut aims at


@dataclass
class PageBlock:
    """A block of the tree. `nodes` are indices; the items of a block are its children and its nodes."""

    name: str
    nodes: list[int] = field(default_factory=list)
    children: list[PageBlock] = field(default_factory=list)

    @property
    def items(self) -> int:
        return len(self.nodes) + len(self.children)

    def all_nodes(self) -> Iterator[int]:
        yield from self.nodes
        for child in self.children:
            yield from child.all_nodes()


def make_blocks(names: Sequence[str], edges: Sequence[tuple[int, int]], tables: frozenset[int]) -> PageBlock:
    """Return the tree of the nodes `0 .. len(names) - 1`, which are in topological order; `edges` are (from, to)."""
    rest = [i for i in range(len(names)) if i not in tables]
    scopes = _scopes(names, rest, edges)
    root = PageBlock("")
    known: dict[tuple[str, ...], PageBlock] = {(): root}
    for i in rest:
        _block_of(scopes[i], known).nodes.append(i)
    if tables:
        root.children.append(PageBlock(TIMESTEP_TABLES, sorted(tables)))
    _tidy(root)
    _cut(root, edges)
    _sort(root)
    return root


def _scopes(names: Sequence[str], nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> dict[int, tuple[str, ...]]:
    """Return the module of each node. A node without one gets the common module of its consumers or producers."""
    scopes = {i: tuple(names[i].strip("/").split("/")[:-1]) for i in nodes}
    unnamed = {i for i in nodes if not scopes[i]}
    if 2 * len(unnamed) > len(nodes):  # the names hold no modules
        return dict.fromkeys(nodes, ())
    after: dict[int, list[int]] = {i: [] for i in unnamed}
    before: dict[int, list[int]] = {i: [] for i in unnamed}
    for a, b in edges:
        if a in after and b in scopes:
            after[a].append(b)
        if b in before and a in scopes:
            before[b].append(a)
    for neighbours, order in ((after, sorted(unnamed, reverse=True)), (before, sorted(unnamed))):
        for i in order:
            if not scopes[i]:
                scopes[i] = _common([scopes[j] for j in neighbours[i] if scopes[j]])
    return scopes


def _common(scopes: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the common beginning of all scopes."""
    if not scopes:
        return ()
    first, last = min(scopes), max(scopes)
    same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]


def _block_of(scope: tuple[str, ...], known: dict[tuple[str, ...], PageBlock]) -> PageBlock:
    if scope not in known:
        known[scope] = PageBlock(scope[-1])
        _block_of(scope[:-1], known).children.append(known[scope])
    return known[scope]


def _tidy(block: PageBlock) -> None:
    """Dissolve tiny blocks, merge a block with its only child."""
    for child in block.children:
        _tidy(child)
    kept = []
    for child in block.children:
        count = sum(1 for _ in child.all_nodes())
        if child.name != TIMESTEP_TABLES and not child.children and count < SMALL and block.items + count <= LARGE:
            block.nodes += child.nodes
        else:
            kept.append(child)
    block.children = kept
    if block.name and not block.nodes and len(block.children) == 1:
        only = block.children[0]
        block.name, block.nodes, block.children = f"{block.name}/{only.name}", only.nodes, only.children


def _cut(block: PageBlock, edges: Sequence[tuple[int, int]]) -> None:
    """Put the nodes of a block with too many items into parts, and the parts into parts where there are too many."""
    for child in block.children:
        _cut(child, edges)
    if block.items <= LARGE:
        return
    nodes = set(block.nodes)
    inner = [(a, b) for a, b in edges if a in nodes and b in nodes]
    regions = _regions(sorted(nodes), inner)
    parts = [PageBlock("", region) for region in regions if len(region) >= SMALL]
    loose = sorted(i for region in regions if len(region) < SMALL for i in region)
    if len(loose) + len(parts) + len(block.children) > LARGE:
        parts += [PageBlock("", run) for run in _runs(loose)]
        loose = []
    parts.sort(key=lambda part: part.nodes[0])
    for number, part in enumerate(parts, 1):
        part.name = f"part {number}"
    apart = [child for child in block.children if child.name == TIMESTEP_TABLES]  # they stay in the root
    rest = [*(child for child in block.children if child.name != TIMESTEP_TABLES), *parts]
    while len(rest) > 1 and len(loose) + len(apart) + len(rest) > LARGE:
        rest = [PageBlock("", [], [rest[i] for i in run]) for run in _runs(range(len(rest)))]
        for group in rest:
            group.name = f"{group.children[0].name} .. {group.children[-1].name}"
    block.nodes, block.children = loose, [*apart, *rest]


def _runs(items: Sequence[int]) -> list[list[int]]:
    """Return consecutive runs of about _PART items."""
    count = max(1, round(len(items) / _PART))
    size = max(1, -(-len(items) // count))
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def _regions(nodes: Sequence[int], edges: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Return subtrees of the dominator tree, as large as possible with at most 2 * _PART nodes."""
    import networkx as nx

    start = -1
    graph = nx.DiGraph()
    graph.add_nodes_from([start, *nodes])
    graph.add_edges_from(edges)
    graph.add_edges_from([(start, i) for i in nodes if graph.in_degree(i) == 0])
    parent = nx.immediate_dominators(graph, start)
    open_: dict[int, list[int]] = {i: [i] for i in nodes}  # the nodes below a node that have no region yet
    regions = []
    for i in reversed(nodes):  # topological order: a node comes before the nodes that it dominates
        whole = len(open_[i]) >= _PART or parent[i] == start
        if whole or len(open_[parent[i]]) + len(open_[i]) > 2 * _PART:
            regions.append(sorted(open_.pop(i)))
        else:
            open_[parent[i]] += open_.pop(i)
    return sorted(regions)


def _sort(block: PageBlock) -> None:
    """Sort children in the order of the graph, the tables first."""
    for child in block.children:
        _sort(child)
    block.nodes.sort()
    block.children.sort(key=lambda child: (child.name != TIMESTEP_TABLES, min(child.all_nodes(), default=0)))


def count_kinds(block: PageBlock, kinds: Sequence[str]) -> Mapping[str, int]:
    """Return the number of nodes of each kind in a block and all blocks below it."""
    return Counter(kinds[i] for i in block.all_nodes())
