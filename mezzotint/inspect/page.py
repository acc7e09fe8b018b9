"""`mezzotint inspect BUNDLE --html FILE`: everything known about a bundle, as one page.

The page is one file with style, script and data; its policy forbids requests and every other script. The data is JSON.
Text from a model (names, notes) reaches the document as text only, never as HTML. The script builds each table and
drawing when it is needed, so that a page of thousands of nodes opens at once.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import claim_file
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.bundle.ranges import Ranges
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.visible import visible

from ..io.files import replacing
from . import data as inspect_data
from .data import PageData
from .graph import read_graph
from .html import ASSETS, base_style, fill_template, json_for_html
from .measure import PageOptions, measure_sections
from .sites import quantizers_of

SCRIPTS = ("core", "charts", "tables", "graph", "panel", "search", "heat", "sections", "main")


def write_page(bundle: Bundle, target: Path, options: PageOptions | None = None, progress: Progress = silent) -> None:
    """Measure and write the page; an earlier page stays until the new one is complete.

    Raises InputError for a missing reference, OutputError where the file cannot be written.
    """
    claim = claim_file(target)
    data = page_data(bundle, measure_sections(bundle, options or PageOptions(), progress))
    with replacing(target, claim) as part:
        part.write_text(render_page(data), encoding="utf-8", newline="\n")


def page_data(bundle: Bundle, measured: PageData, ranges: Ranges | None = None) -> PageData:
    """Return everything that the page shows, as plain data. `ranges` replace those of the bundle.

    Without an audit in `measured`, the compilation's own audit is shown.
    """
    audit = measured.get("audit") or inspect_data.verdict_rows(bundle)
    islands = bundle.manifest.islands
    drawn = read_graph(bundle.model_path, bundle.signature.timestep, {row["name"]: row for row in audit}, islands)
    quantizers = inspect_data.quantizer_rows(bundle)
    rows = quantizers_of(drawn, [q["site"] for q in quantizers])
    for node, roles in zip(drawn["nodes"], rows, strict=True):
        if roles:
            node["quantizers"] = roles
    for row, kind in _kinds(rows, quantizers).items():
        quantizers[row]["kind"] = kind
    for node, roles in zip(drawn["nodes"], rows, strict=True):
        for row, role in roles:
            if role == "output" and drawn["kinds"][node["kind"]] != "table":  # a bias table is named after its layer
                quantizers[row].setdefault("maker", node["name"])
    _add_times(drawn, measured["speed"])
    table = inspect_data.load_ranges(bundle) if ranges is None else ranges
    return {
        "title": f"{bundle.manifest.source.name}, {bundle.manifest.recipe.name}",
        "version": bundle.manifest.mezzotint,
        "summary": inspect_data.summary_section(bundle),
        "answers": inspect_data.answers(bundle, audit, measured),
        "pictures": measured["pictures"],
        "speed": {key: value for key, value in measured["speed"].items() if key != "nodes"},
        "cost": measured["cost"],
        "passes": inspect_data.passes_section(bundle),
        "training": inspect_data.training_section(bundle),
        "graph": drawn,
        "audit": audit,
        "ranges": inspect_data.range_section(bundle, table),
        "noise": inspect_data.noise_section(bundle),
        "islands": [{"name": name, "why": why} for name, why in islands.items()],
        "quantizers": quantizers,
        "manifest": inspect_data.manifest_section(bundle),
    }


def _kinds(rows: list[list[tuple[int, str]]], quantizers: list[PageData]) -> dict[int, str]:
    """Return weight or value for each quantizer: by the roles at its nodes, and without a node by its format."""
    weights = {row for roles in rows for row, role in roles if role == "weight"}
    others = {row for roles in rows for row, role in roles if role != "weight"}
    return {
        i: "weight"
        if i in weights or (i not in others and q["rows"] == 1 and q["format"].startswith("int"))
        else "value"
        for i, q in enumerate(quantizers)
    }


def _add_times(graph: PageData, speed: PageData) -> None:
    """Add each node's time, and the sum for the nodes that onnxruntime added (transposes, layouts)."""
    if "nodes" not in speed:
        return
    times = dict(speed["nodes"])
    for node in graph["nodes"]:
        names = dict.fromkeys([node["name"], *(graph["values"][value][0] for value in node["out"])])
        if taken := [times.pop(name) for name in names if name in times]:
            node["ms"] = round(sum(taken), 4)
    speed["other_ms"] = round(sum(times.values()), 4)


def render_page(data: PageData) -> str:
    """Return the whole document."""
    script = "\n".join((ASSETS / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    fields = {
        "POLICY": escape(policy),
        "TITLE": escape(visible(data["title"])),
        "STYLE": base_style() + (ASSETS / "page.css").read_text(encoding="utf-8"),
        "DATA": json_for_html(_shown(data)),
        "SCRIPT": script,
    }
    return fill_template((ASSETS / "page.html").read_text(encoding="utf-8"), fields)


def _shown(data: Any) -> Any:
    """Return data with visible texts. Line breaks stay: texts of several lines are shown as such."""
    if isinstance(data, str):
        return "\n".join(visible(line, None) for line in data.split("\n"))
    if isinstance(data, dict):
        return {_shown(key): _shown(value) for key, value in data.items()}
    return [_shown(value) for value in data] if isinstance(data, (list, tuple)) else data
