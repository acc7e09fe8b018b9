"""The drawing of the rooms: boxes by floor in the four top folders, and the arrows that no longer way replaces.

    python tools/rooms.py --draw

Everything is computed from the code by tools/rooms.py. The layout is Sugiyama's: an arrow over several floors gets a
point on each floor between, floors are ordered by the mean place of their neighbours, and x is the least-squares
position that keeps the order and the distances. Nothing depends on chance: equal code gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from textwrap import shorten, wrap

from tools.rooms import arrows, direct, floors, purpose, sources

BANDS = {  # top folder -> (fill, stroke), the highest first
    "mezzotint": ("#f4f0fa", "#7b5ea7"),
    "passes": ("#fdf4e3", "#b07a1e"),
    "compiler": ("#eaf2fb", "#3b6ea5"),
    "runtime": ("#eaf5ea", "#4c7a4c"),
}
BOX, HEIGHT = 212, 62
POINT = 12  # width of an arrow that passes a floor
GAP, RISE = 14, 42  # between boxes of a floor, between floors
MARGIN, LABEL = 24, 26
LETTERS = 32  # of a line of the purpose
SWEEPS = 24


@dataclass(frozen=True)
class Place:
    """A box, or a point of a long arrow, on one floor of the drawing."""

    name: str
    width: int


@dataclass(frozen=True)
class Sheet:
    """Floors of places, the highest first, and the way of each arrow (source, points ..., target)."""

    floors: list[list[Place]]
    ways: list[list[Place]]


def draw(root: Path) -> str:
    """Return the SVG of the rooms below `root`."""
    rooms = arrows(root)
    sheet = _sheet(rooms)
    _order(sheet)
    x = _positions(sheet)
    shift = MARGIN + LABEL - min(x[place] - place.width / 2 for floor in sheet.floors for place in floor)
    x = {place: value + shift for place, value in x.items()}
    right = max(x[place] + place.width / 2 for floor in sheet.floors for place in floor)
    tops = _tops(sheet)
    body = [*_bands(sheet, tops, right), *_arrows(sheet, x, tops), *_boxes(root, sheet, x, tops)]
    width, height = round(right + MARGIN + LABEL), tops[-1] + HEIGHT + MARGIN + LABEL
    return "\n".join([*_head(width, height), *body, "</svg>"]) + "\n"


def _sheet(rooms: Mapping[str, set[str]]) -> Sheet:
    """Place rooms on floors: a folder below those that import it, inside it a room above what it imports."""
    stack: list[list[Place]] = []
    for band in BANDS:
        inner = {r: {t for t in to if _band(t) == band} for r, to in rooms.items() if _band(r) == band}
        stack += [[Place(room, BOX) for room in floor] for floor in reversed(floors(inner))]
    level = {place.name: i for i, floor in enumerate(stack) for place in floor}
    ways = []
    for room, targets in sorted(direct(dict(rooms)).items()):
        for target in sorted(targets):
            points = [Place(f"{room} > {target}, {i}", POINT) for i in range(level[room] + 1, level[target])]
            for i, point in enumerate(points, level[room] + 1):
                stack[i].append(point)
            ways.append([Place(room, BOX), *points, Place(target, BOX)])
    return Sheet(stack, ways)


def _neighbours(sheet: Sheet) -> tuple[dict[Place, list[Place]], dict[Place, list[Place]]]:
    """Return each place's neighbours above and below it."""
    above: dict[Place, list[Place]] = {place: [] for floor in sheet.floors for place in floor}
    below: dict[Place, list[Place]] = {place: [] for floor in sheet.floors for place in floor}
    for way in sheet.ways:
        for upper, lower in pairwise(way):
            below[upper].append(lower)
            above[lower].append(upper)
    return above, below


def _crossings(sheet: Sheet, below: Mapping[Place, list[Place]]) -> int:
    count = 0
    for upper, lower in pairwise(sheet.floors):
        rank = {place: i for i, place in enumerate(lower)}
        ends = [[rank[other] for other in below[place]] for place in upper]
        flat = [(i, end) for i, each in enumerate(ends) for end in each]
        count += sum(a[0] < b[0] and a[1] > b[1] for a in flat for b in flat)
    return count


def _order(sheet: Sheet) -> None:
    """Order the places of each floor by the mean rank of their neighbours, and keep the order with fewest crossings."""
    above, below = _neighbours(sheet)
    best, fewest = [list(floor) for floor in sheet.floors], _crossings(sheet, below)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours, indices = (above, range(len(sheet.floors))) if down else (below, range(len(sheet.floors))[::-1])
        rank = {p: i / max(1, len(floor) - 1) for floor in sheet.floors for i, p in enumerate(floor)}
        for i in indices:
            floor = sheet.floors[i]
            mean = {p: _mean([rank[n] for n in neighbours[p]], rank[p]) for p in floor}
            floor.sort(key=lambda p: (mean[p], p.name))
            rank.update({p: k / max(1, len(floor) - 1) for k, p in enumerate(floor)})
        crossings = _crossings(sheet, below)
        if crossings < fewest:
            best, fewest = [list(floor) for floor in sheet.floors], crossings
    sheet.floors[:] = best


def _positions(sheet: Sheet) -> dict[Place, float]:
    """Return the middle of each place: near its neighbours, in the order of its floor, without overlaps."""
    above, below = _neighbours(sheet)
    x: dict[Place, float] = {}
    for floor in sheet.floors:
        offsets = _offsets(floor)
        x.update({place: offset - offsets[-1] / 2 for place, offset in zip(floor, offsets, strict=True)})
    for sweep in range(2 * SWEEPS):
        for floor in sheet.floors if sweep % 2 == 0 else reversed(sheet.floors):
            wanted = [_mean([x[n] for n in above[p] + below[p]], x[p]) for p in floor]
            offsets = _offsets(floor)
            free = _isotonic([want - offset for want, offset in zip(wanted, offsets, strict=True)])
            x.update({p: value + offset for p, value, offset in zip(floor, free, offsets, strict=True)})
    return x


def _offsets(floor: list[Place]) -> list[float]:
    """Return the middles of places that stand side by side, the first at 0."""
    offsets = [0.0]
    for left, right in pairwise(floor):
        offsets.append(offsets[-1] + (left.width + right.width) / 2 + GAP)
    return offsets


def _isotonic(values: list[float]) -> list[float]:
    """Return the rising sequence that is nearest in squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            last = pools.pop()
            total, count = total + last[0], count + last[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def _tops(sheet: Sheet) -> list[int]:
    """Return the y of each floor; a new band leaves room for its name."""
    tops: list[int] = []
    y, last = MARGIN, ""
    for floor in sheet.floors:
        band = _band(next(place.name for place in floor if place.width == BOX))
        y += 0 if not tops else HEIGHT + RISE
        y += LABEL + MARGIN if band != last else 0
        tops.append(y)
        last = band
    return tops


def _bands(sheet: Sheet, tops: list[int], right: float) -> list[str]:
    lines = []
    for band, (fill, stroke) in BANDS.items():
        ys = [
            top
            for top, floor in zip(tops, sheet.floors, strict=True)
            if any(_band(p.name) == band for p in floor if p.width == BOX)
        ]
        if not ys:
            continue
        y, bottom = min(ys) - LABEL - 8, max(ys) + HEIGHT + 16
        lines.append(
            f'<rect x="{MARGIN}" y="{y}" width="{right - MARGIN + LABEL:.0f}" height="{bottom - y}" rx="10" '
            f'fill="{fill}" stroke="{stroke}" stroke-opacity="0.35"/>'
        )
        lines.append(f'<text class="band" x="{MARGIN + 12}" y="{y + 22}" fill="{stroke}">{band}/</text>')
    return lines


def _arrows(sheet: Sheet, x: Mapping[Place, float], tops: list[int]) -> list[str]:
    """Return a path for each arrow; arrows that leave their folder have the colour of the folder that they reach."""
    level = {place: i for i, floor in enumerate(sheet.floors) for place in floor}
    starts, ends = _ports(sheet, x, 0), _ports(sheet, x, -1)
    lines = []
    for way in sheet.ways:
        source, target = way[0], way[-1]
        px, py = starts[(source.name, target.name)], tops[level[source]] + HEIGHT
        path = [f"M{px:.1f} {py}"]
        for place in way[1:]:
            nx = ends[(source.name, target.name)] if place is target else x[place]
            ny = tops[level[place]] - (3 if place is target else 0)
            middle = (py + ny) / 2
            path.append(f"C{px:.1f} {middle:.1f} {nx:.1f} {middle:.1f} {nx:.1f} {ny}")
            px, py = nx, ny
            if place is not target:
                py = tops[level[place]] + HEIGHT
                path.append(f"V{py}")
        inner = _band(source.name) == _band(target.name)
        color = "#5b6470" if inner else BANDS[_band(target.name)][1]
        dash = "" if inner else ' stroke-dasharray="5 3"'
        title = f"<title>{source.name} imports {target.name}</title>"
        lines.append(f'<path d="{" ".join(path)}" stroke="{color}"{dash} marker-end="url(#head)">{title}</path>')
    return lines


def _ports(sheet: Sheet, x: Mapping[Place, float], end: int) -> dict[tuple[str, str], float]:
    """Return where arrows leave (`end` 0) or reach (-1) their box, spread in the order of their next point."""
    ports = {}
    boxes = sorted({way[end] for way in sheet.ways}, key=lambda place: place.name)
    for box in boxes:
        mine = [way for way in sheet.ways if way[end] == box]
        mine.sort(key=lambda way: (x[way[1 if end == 0 else -2]], way[0].name, way[-1].name))
        step = min(22.0, (BOX - 40) / len(mine))
        for i, way in enumerate(mine):
            ports[(way[0].name, way[-1].name)] = x[box] + (i - (len(mine) - 1) / 2) * step
    return ports


def _boxes(root: Path, sheet: Sheet, x: Mapping[Place, float], tops: list[int]) -> list[str]:
    files = [
        path.relative_to(root).parent.as_posix() for path in sources(root, tuple(BANDS)) if path.name != "__init__.py"
    ]
    lines = []
    for top, floor in zip(tops, sheet.floors, strict=True):
        for place in (place for place in floor if place.width == BOX):
            left, stroke = round(x[place] - BOX / 2), BANDS[_band(place.name)][1]
            name = place.name.partition("/")[2] or f"{place.name}/*.py"
            about = purpose(root, place.name)
            count = files.count(place.name) or 1  # a room of one file has it in __init__.py
            lines.append(f"<g><title>{escape(place.name)}: {escape(about)}</title>")
            lines.append(
                f'<rect x="{left}" y="{top}" width="{BOX}" height="{HEIGHT}" rx="6" fill="#fff" stroke="{stroke}"/>'
            )
            lines.append(f'<text class="name" x="{left + 9}" y="{top + 18}">{escape(name)}</text>')
            size = f"{count} file{'' if count == 1 else 's'}"
            lines.append(f'<text class="count" x="{left + BOX - 9}" y="{top + 18}">{size}</text>')
            for i, line in enumerate(_lines(about)):
                lines.append(f'<text class="about" x="{left + 9}" y="{top + 35 + 15 * i}">{escape(line)}</text>')
            lines.append("</g>")
    return lines


def _lines(about: str) -> list[str]:
    """Return the first words of a purpose, on at most two lines."""
    first = wrap(about.partition(". ")[0].rstrip("."), LETTERS)
    return first if len(first) <= 2 else [first[0], shorten(" ".join(first[1:]), LETTERS, placeholder=" ...")]


def _head(width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif" '
        'role="img" aria-labelledby="title">',
        '<title id="title">The rooms of Mezzotint: an arrow goes from a room to one that it imports</title>',
        "<!-- Written by tools/rooms.py from the code; do not edit. -->",
        "<style>path { fill: none; stroke-width: 1.3; stroke-opacity: 0.75; } text { fill: #1c1c1c; }",
        ".name { font-weight: 600; font-size: 14px; } .about { font-size: 11.5px; fill: #444; }",
        ".count { font-size: 11px; fill: #777; text-anchor: end; }",
        ".band { font-weight: 600; font-size: 16px; }</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" style="fill: context-stroke; stroke: none"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]


def _band(room: str) -> str:
    return room.partition("/")[0]


def _mean(values: list[float], default: float) -> float:
    return sum(values) / len(values) if values else default
