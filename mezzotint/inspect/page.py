"""`mezzotint inspect BUNDLE --html FILE`: all that is known of a bundle as one page.

The page is one file: style, script and data are in it, and its policy lets it fetch nothing and run no other script.
Data stands in it as JSON; whatever comes from a model (names, notes) reaches the document as text only, never as HTML.
The script makes each table and drawing when it is wanted, so that a page of thousands of nodes opens at once.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from pathlib import Path
from typing import Any

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.bundle.ranges import Ranges
from mezzotint.runtime.progress import Progress, silent

from ..io.files import replacing
from . import data as inspect_data
from .data import PageData
from .graph import read_graph
from .html import ASSETS, base_style
from .measure import PageOptions, measure_sections
from .sites import quantizers_of

SCRIPTS = ("core", "charts", "tables", "graph", "panel", "search", "heat", "sections", "main")


def write_page(bundle: Bundle, target: Path, options: PageOptions | None = None, progress: Progress = silent) -> None:
    """Measure what is wished for and write the page; an earlier one stays until the new one is whole.

    Raises InputError for a reference that is not there, OutputError where nothing can be written.
    """
    data = page_data(bundle, measure_sections(bundle, options or PageOptions(), progress))
    with replacing(target) as part:
        part.write_text(render_page(data), encoding="utf-8", newline="\n")


def page_data(bundle: Bundle, measured: PageData, ranges: Ranges | None = None) -> PageData:
    """All that the page shows, as plain data. `ranges` stand in for those of the bundle.

    Where nothing was audited, the compilation's own audit is told.
    """
    audit = measured.get("audit") or inspect_data.verdict_rows(bundle)
    islands = bundle.manifest["islands"]
    drawn = read_graph(bundle.model_path, bundle.signature.timestep, {row["name"]: row for row in audit}, islands)
    quantizers = inspect_data.quantizer_rows(bundle)
    rows = quantizers_of(drawn, [q["site"] for q in quantizers])
    for node, found in zip(drawn["nodes"], rows, strict=True):
        if found:
            node["quantizers"] = found
    for row, kind in _kinds(rows, quantizers).items():
        quantizers[row]["kind"] = kind
    for node, found in zip(drawn["nodes"], rows, strict=True):
        for row, role in found:
            if role == "output" and drawn["kinds"][node["kind"]] != "table":  # a bias table is named after its layer
                quantizers[row].setdefault("maker", node["name"])
    _add_times(drawn, measured["speed"])
    table = inspect_data.load_ranges(bundle) if ranges is None else ranges
    return {
        "title": f"{bundle.manifest['source']['name']}, {bundle.manifest['recipe']['name']}",
        "version": bundle.manifest["mezzotint"],
        "summary": inspect_data.summary_section(bundle),
        "answers": inspect_data.answers(bundle, audit, measured),
        "pictures": measured["pictures"],
        "speed": {key: value for key, value in measured["speed"].items() if key != "nodes"},
        "cost": measured["cost"],
        "passes": inspect_data.passes_section(bundle),
        "graph": drawn,
        "audit": audit,
        "ranges": inspect_data.range_section(bundle, table),
        "noise": inspect_data.noise_section(bundle),
        "islands": [{"name": name, "why": why} for name, why in islands.items()],
        "quantizers": quantizers,
        "manifest": inspect_data.manifest_section(bundle),
    }


def _kinds(rows: list[list[tuple[int, str]]], quantizers: list[PageData]) -> dict[int, str]:
    """Whether a quantizer is of a weight: its nodes say so; one that no node tells of is judged by its format."""
    weights = {row for found in rows for row, role in found if role == "weight"}
    others = {row for found in rows for row, role in found if role != "weight"}
    return {
        i: "weight"
        if i in weights or (i not in others and q["rows"] == 1 and q["format"].startswith("int"))
        else "value"
        for i, q in enumerate(quantizers)
    }


def _add_times(graph: PageData, speed: PageData) -> None:
    """Each node's time; what onnxruntime made itself (transposes, layouts) has no node here and is summed up."""
    if "nodes" not in speed:
        return
    times = dict(speed["nodes"])
    for node in graph["nodes"]:
        names = dict.fromkeys([node["name"], *(graph["values"][value][0] for value in node["out"])])
        if found := [times.pop(name) for name in names if name in times]:
            node["ms"] = round(sum(found), 4)
    speed["other_ms"] = round(sum(times.values()), 4)


def render_page(data: PageData) -> str:
    """The whole document."""
    script = "\n".join((ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = {
        "POLICY": escape(policy),
        "TITLE": escape(data["title"]),
        "STYLE": base_style() + (ASSETS / "page.css").read_text(encoding="utf-8"),
        "DATA": json_for_html(data),
        "SCRIPT": script,
    }
    text = (ASSETS / "page.html").read_text(encoding="utf-8")
    head, *rest = text.split("{{")
    found = [head]
    for piece in rest:
        name, _, after = piece.partition("}}")
        found += [parts[name], after]
    return "".join(found)


def json_for_html(data: Any) -> str:
    """JSON that cannot end the element that it stands in, nor open a comment there: no `<`, `>` and `&` in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
