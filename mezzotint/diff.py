"""The differences between two bundles, or between two passes of one bundle.

Two bundles are compared by their manifests: origin, measurements, operations of their graphs, passes with their
options, each quantizer, each layer's kernel and each island. Two passes are compared by the graphs that the bundle
keeps after every pass. Nodes are matched by name; a node with another operation, attribute or input has changed.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.runtime.bundle.acceptance import Acceptance
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.bundle.manifest_entries import PassRecord, QuantizerEntry
from mezzotint.runtime.errors import InputError

_NODE = re.compile(r'^\s+\[(?:"(?P<quoted>[^"]*)"|(?P<plain>[^\]]*))\] .*? = (?P<op>[\w.]+)(?P<rest>.*)$')
_FILE = re.compile(r"(\d+)_(.+)\.txt")
NOTHING = "-"


@dataclass(frozen=True)
class DiffTable:
    """Rows of text or numbers below the names of their columns; no rows mean no difference."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def to_json(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Difference:
    """Tables by a short name; `text` is the unified diff of two graphs, for passes only."""

    title: str
    tables: Mapping[str, DiffTable]
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"title": self.title, **{name: table.to_json() for name, table in self.tables.items()}}


def compare_bundles(one: Bundle, other: Bundle) -> Difference:
    """Return tables `made`, `measured`, `nodes`, `passes`, `quantizers`, `kernels` and `islands`."""
    a, b = one.manifest, other.manifest
    pair = ("", "first", "second")
    quantizers = _changes({q.site: _quantizer(q) for q in a.quantizers}, {q.site: _quantizer(q) for q in b.quantizers})
    kernels = _changes(*({name: layer.kernel for name, layer in m.kernels.layers.items()} for m in (a, b)))
    tables = {
        "made": DiffTable("how they were made", pair, _changes(_made(one), _made(other))),
        "measured": DiffTable("what they measure", pair, _pairs(_measured(a), _measured(b))),
        "nodes": DiffTable("operations", pair, _changes(a.nodes, b.nodes)),
        "passes": DiffTable("passes", ("pass", "first", "second"), _passes(a.history, b.history)),
        "quantizers": DiffTable("quantizers", ("site", "first", "second"), quantizers),
        "kernels": DiffTable("kernels", ("layer", "first", "second"), kernels),
        "islands": DiffTable("islands", ("layer", "first", "second"), _changes(a.islands, b.islands)),
    }
    return Difference(f"{one.path} and {other.path}", tables)


def compare_passes(bundle: Bundle, one: str, other: str) -> Difference:
    """Return tables `operations` and `nodes`, and the text, of the graphs after two passes, by number or by name.

    Raises InputError for a pass that the bundle does not contain, or contains several times.
    """
    first, second = (_dump(bundle, name) for name in (one, other))
    before, after = (path.read_text(encoding="utf-8").splitlines() for path in (first, second))
    nodes = [_nodes(lines) for lines in (before, after)]
    counts = [Counter(op for op, _ in graph.values()) for graph in nodes]
    written = [{name: f"{op}{rest}" for name, (op, rest) in graph.items()} for graph in nodes]
    pair = ("first", "second")
    tables = {
        "operations": DiffTable("operations", ("", *pair), _changes(*counts)),
        "nodes": DiffTable("nodes", ("node", *pair), _changes(*written)),
    }
    text = "\n".join(difflib.unified_diff(before, after, first.stem, second.stem, lineterm="", n=1))
    return Difference(f"{bundle.path}: {first.stem} and {second.stem}", tables, text)


def _changes(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """Return the rows that differ, in the order of the first mapping and then of the second."""
    names = dict.fromkeys([*one, *other])
    return tuple(
        (name, one.get(name, NOTHING), other.get(name, NOTHING)) for name in names if one.get(name) != other.get(name)
    )


def _pairs(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[tuple[Any, ...], ...]:
    """Return all rows, equal or not."""
    return tuple((name, one.get(name, NOTHING), other.get(name, NOTHING)) for name in dict.fromkeys([*one, *other]))


def _made(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "recipe": manifest.recipe.name,
        "target": manifest.target,
        "source": f"{manifest.source.kind} {manifest.source.name}",
        "LoRAs": ", ".join(map(str, manifest.source.loras)) or "none",
        "weights": (manifest.source.weights_sha256 or "unknown")[:12],
        "deployment": str(bundle.deployment),
        "prediction": bundle.signature.prediction,
        "timestep tables": len(bundle.deployed_timesteps or ()),
        **{f"calibration {key}": value for key, value in manifest.calibration.to_json().items()},
        **{f"version of {key}": value for key, value in manifest.versions.items()},
        "mezzotint": manifest.mezzotint,
    }


def _measured(manifest: Manifest) -> dict[str, Any]:
    shares = manifest.noise.get("shares", {})
    storage = manifest.require_storage()
    return {
        "bytes of the model": storage.model_bytes,
        "of the float parameters": storage.ratio,
        "integer kernels": manifest.kernels.integer,
        "float kernels": manifest.kernels.floating,
        "quantizers": len(manifest.quantizers),
        "seconds to compile": round(sum(record.seconds for record in manifest.history), 1),
        **_accepted(manifest.acceptance),
        **({"SQNR a call, dB": round(shares["none"], 2)} if "none" in shares else {}),
        **({"SQNR a call, corrected, dB": round(shares["kept"], 2)} if "kept" in shares else {}),
    }


def _accepted(acceptance: Acceptance | None) -> dict[str, str]:
    if acceptance is None:
        return {}
    return {"SQNR of the prediction": acceptance.sqnr_text(), "PSNR of images": acceptance.psnr_text()}


def _passes(one: Sequence[PassRecord], other: Sequence[PassRecord]) -> tuple[tuple[Any, ...], ...]:
    """Return the passes of only one bundle, and the options that differ."""
    rows: list[tuple[Any, ...]] = []
    first, second = ([record.name for record in history] for history in (one, other))
    for kind, a, b, c, d in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if kind == "equal":
            for mine, its in zip(one[a:b], other[c:d], strict=True):
                changed = _changes(mine.options, its.options)
                rows += [(f"{mine.name}.{option}", *values) for option, *values in changed]
            continue
        rows += [(record.name, "yes", NOTHING) for record in one[a:b]]
        rows += [(record.name, NOTHING, "yes") for record in other[c:d]]
    return tuple(rows)


def _quantizer(q: QuantizerEntry) -> str:
    """Return one line: format, scale or range of the scales, zero points, and the pass that chose them."""
    scale = q.scale
    scales = f"{scale[0]:.4g} .. {scale[1]:.4g}" if isinstance(scale, tuple) else f"{scale:.4g}"
    rows = f", {q.rows} rows" if q.rows > 1 else ""
    channels = f", {q.channels} channels" if q.channels > 1 else ""
    zeros = q.zero_point
    zero = f"{zeros[0]}" if len(zeros) == 1 else f"{zeros[0]} .. {zeros[-1]}"
    return f"{q.format}, scale {scales}, zero point {zero}{rows}{channels}, {q.by}"


def _dump(bundle: Bundle, name: str) -> Path:
    """Return the text file of the graph after a pass. Raises InputError."""
    dumps = {
        file: match for file in sorted((bundle.path / "passes").glob("*.txt")) if (match := _FILE.match(file.name))
    }
    graphs = {file: match for file, match in dumps.items() if match[2] != "fx"}
    fitting = [file for file, match in graphs.items() if name in (match[2], file.stem, str(int(match[1])))]
    if len(fitting) == 1:
        return fitting[0]
    kept = ", ".join(file.stem for file in graphs) or "none"
    raise InputError(
        f"{len(fitting)} passes are called {name!r}" if fitting else f"there is no pass {name!r}",
        where=str(bundle.path / "passes"),
        hint=f"give one of these, or its number: {kept}",
    )


def _nodes(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return name -> (operation, attributes and inputs as text)."""
    nodes = {}
    for line in lines:
        if match := _NODE.match(line):
            nodes[match["quoted"] or match["plain"]] = (match["op"], match["rest"].rstrip())
    return nodes
