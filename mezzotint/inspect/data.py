"""The sections of a bundle's page that are read from its files: no network runs here.

Each function returns the data of one section. A section without data has a `note` with the reason.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint.compiler.errors import RecipeError
from mezzotint.passes.recipes.files import recipe_from_json, to_yaml
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.bundle.manifest_entries import Storage
from mezzotint.runtime.bundle.ranges import RANGES, Ranges
from mezzotint.runtime.signature import CHANNELS_FIRST
from mezzotint.runtime.targets import TARGETS

from ..text.report import model_bytes

_LONGEST_DIFF = 4_000_000  # characters of one pass's diff in the page; the file has all of it
_FIELDS = ("low", "high", "scale", "seen_low", "seen_high")

PageData = dict[str, Any]


def load_ranges(bundle: Bundle) -> Ranges | None:
    """Return the ranges of a bundle over its timesteps; None for a bundle without."""
    return Ranges.load(bundle.path / RANGES) if RANGES in bundle.manifest.files else None


def summary_section(bundle: Bundle) -> PageData:
    """Return the facts and sizes of the bundle."""
    manifest, size = bundle.manifest, model_bytes(bundle)
    kernels, source, recipe = manifest.kernels, manifest.source, manifest.recipe
    runs, history = manifest.calibration, manifest.history
    shape = "x".join(map(str, bundle.sample_shape))
    if (axis := manifest.signature.channel_axis) != CHANNELS_FIRST:
        shape += f", channels along axis {axis}"
    rows = [
        ("source", f"{source.kind} {source.name} ({source.class_name or 'ONNX'})"),
        *((f"fused LoRA {i}", str(lora)) for i, lora in enumerate(source.loras, 1)),
        ("recipe", f"{recipe.name}: {recipe.description}"),
        ("target", f"{manifest.target}: {TARGETS[manifest.target]}"),
        ("deployment", str(bundle.deployment)),
        ("sample", f"{shape}, predicts {manifest.signature.prediction}"),
        ("conditions", ", ".join(manifest.signature.conditions) or "none"),
        ("noise correction", "none" if bundle.correction is None else str(bundle.correction.fitted_for)),
        ("calibration", f"{runs.samples} samples, seed {runs.seed}"),
        ("compiled in", f"{sum(record.seconds for record in history):.1f} s, {len(history)} passes"),
        *(() if manifest.acceptance is None else manifest.acceptance.shown(manifest.measured_in).items()),
        *([("kernels", manifest.kernels_text())] if manifest.measured_in else []),
        ("digest", manifest.digest),
    ]
    if bundle.precisions is not None:
        rows.insert(3, ("precisions", f"{', '.join(bundle.precisions.files)}; the graph below is that of the first"))
    return {
        "name": source.name,
        "recipe": recipe.name,
        "bytes": size,
        "float_bytes": source.parameter_bytes,
        "integer": kernels.integer,
        "float": kernels.floating,
        "measured_in": manifest.measured_in,
        "layers": len(kernels.layers),
        "integer_layers": sum(layer.integer for layer in kernels.layers.values()),
        "islands": len(manifest.islands),
        "rows": rows,
    }


def passes_section(bundle: Bundle) -> PageData:
    """Return one row for each pass, with its diff as compressed text."""
    rows = []
    for number, record in enumerate(bundle.manifest.history, 1):
        file = bundle.path / "passes" / f"{number:03d}_{record.name}.diff"
        rows.append(
            {
                "number": number,
                "name": record.name,
                "note": record.note,
                "before": record.nodes_before,
                "after": record.nodes_after,
                "seconds": record.seconds,
                "peak": record.peak_memory_mb,
                "options": {k: str(v) for k, v in record.options.items()},
                "diff": _diff(file),
            }
        )
    return {"rows": rows}


def training_section(bundle: Bundle) -> PageData:
    """Return one row for each unit that a pass trained, with the curve of its loss."""
    return {"rows": [unit.to_json() for unit in bundle.manifest.training]}


def _diff(file: Path) -> PageData:
    """Return {added, removed, text}: the text as zlib in base64, empty where the pass changed nothing."""
    if not file.is_file():
        return {"note": "the bundle has no diff of this pass"}
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    section: PageData = {
        "added": sum(line.startswith("+") and not line.startswith("+++ ") for line in lines),
        "removed": sum(line.startswith("-") and not line.startswith("--- ") for line in lines),
    }
    if len(text) > _LONGEST_DIFF:
        text = text[: text.rfind("\n", 0, _LONGEST_DIFF) + 1]
        section["note"] = f"cut off here; the whole diff is in passes/{file.name}"
    return {**section, "text": base64.b64encode(zlib.compress(text.encode(), 9)).decode() if text else ""}


def verdict_rows(bundle: Bundle) -> list[PageData]:
    """Return the compilation's audit: {name, op, kernel, integer, rule, why, fix} for each layer, float ones first."""
    rows = [
        {
            "name": name,
            "op": "",
            "kernel": layer.kernel,
            "integer": layer.integer,
            "rule": "island" if name in bundle.manifest.islands else "",
            "why": layer.why,
            "fix": "",
        }
        for name, layer in bundle.manifest.kernels.layers.items()
    ]
    return sorted(rows, key=lambda row: row["integer"])


def quantizer_rows(bundle: Bundle) -> list[PageData]:
    """Return the manifest's quantizers, each list of zero points reduced to its extremes."""
    rows = []
    for q in bundle.manifest.quantizers:
        zero, scale = q.zero_point, q.scale
        rows.append(
            {
                "site": q.site,
                "format": f"{q.format}, {q.levels} levels" if q.levels else q.format,
                "axis": q.axis,
                "channels": q.channels,
                "rows": q.rows,
                "scale": [_round(s) for s in (scale if isinstance(scale, tuple) else [scale])],
                "zero": [min(zero), max(zero)] if zero else [],
                "by": q.by,
                "bits": q.row_bits or {},
            }
        )
    return rows


def range_section(bundle: Bundle, table: Ranges | None) -> PageData:
    """Return the range of each quantizer at each timestep; a constant row is one number instead of a list."""
    count = len(bundle.manifest.quantizers)
    if not count:
        return {"note": "nothing in this bundle is quantized"}
    if table is None:
        return {"note": f"the bundle has no {RANGES}: it is of an older version; compile it again to see the ranges"}
    if len(table.low) != count:
        return {"note": f"{RANGES} has {len(table.low)} quantizers, the manifest lists {count}"}
    data: PageData = {"timesteps": [_round(t, 8) for t in table.timesteps.tolist()]}
    for name in _FIELDS:
        data[name] = [_collapsed([_round(v) for v in row]) for row in getattr(table, name).tolist()]
    return data


def noise_section(bundle: Bundle) -> PageData:
    """Return the noise of each network call, without its lists."""
    report = bundle.manifest.noise
    if not report:
        return {"note": "no noise was fitted: the recipe has no fit_noise pass"}
    calls = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in report["calls"]]
    return {"form": report["form"], "summary": report["summary"], "calls": calls}


def manifest_section(bundle: Bundle) -> PageData:
    """Return files, digest, recipe, versions, storage and refusals."""
    manifest = bundle.manifest
    try:
        recipe = to_yaml(recipe_from_json(manifest.recipe.to_json(), where=str(bundle.path)))
    except RecipeError as error:
        recipe = f"# cannot be written as YAML here: {error.what}\n"
    return {
        "files": [{"name": name, **entry.to_json()} for name, entry in manifest.files.items()],
        "digest": manifest.digest,
        "recipe": recipe,
        "versions": manifest.versions,
        "storage": _storage(manifest.storage),
        "refused": manifest.refused,
    }


def _storage(storage: Storage | None) -> list[PageData]:
    return [] if storage is None else [{"type": kind, **stored.to_json()} for kind, stored in storage.types.items()]


def answers(bundle: Bundle, rows: Sequence[PageData], measured: Mapping[str, Any]) -> list[PageData]:
    """Return the answers to four questions: why float, why slow, what changed, where the error comes from."""
    return [_why_float(rows), _why_slow(measured), _what_changed(bundle), _which_error(measured)]


def _why_float(rows: Sequence[PageData]) -> PageData:
    kept = [row for row in rows if not row["integer"]]
    counted = Counter(row["why"] or row["rule"] or "no reason is known" for row in kept)
    lines = [f"{n} x {why}" if n > 1 else why for why, n in counted.most_common(4)]
    head = f"{len(kept)} of {len(rows)} quantized groups and layers" if kept else "every layer runs on integer kernels"
    return {"question": "Why is a layer in float?", "head": head, "lines": lines, "section": "audit"}


def _why_slow(measured: Mapping[str, Any]) -> PageData:
    speed = measured["speed"]
    card: PageData = {"question": "Why is it slow?", "section": "graph", "lines": []}
    if "note" in speed:
        return {**card, "head": "not measured", "lines": [speed["note"]]}
    lines = [f"{group['share']:.0%} {group['group']} ({group['nodes']} nodes)" for group in speed["groups"][:4]]
    return {**card, "head": f"{speed['call_ms']:.4g} ms a call", "lines": lines}


def _what_changed(bundle: Bundle) -> PageData:
    history = bundle.manifest.history
    changed = [r for r in history if r.nodes_before != r.nodes_after]
    largest = sorted(changed, key=lambda r: -abs(r.nodes_after - r.nodes_before))[:4]
    lines = [f"{r.name}: {r.nodes_before} -> {r.nodes_after} nodes" for r in largest]
    head = f"{history[0].nodes_before} -> {history[-1].nodes_after} nodes" if history else "no pass ran"
    return {"question": "What changed?", "head": head, "lines": lines, "section": "passes"}


def _which_error(measured: Mapping[str, Any]) -> PageData:
    cost = measured["cost"]
    card: PageData = {"question": "Where does the error come from?", "section": "cost", "lines": []}
    if "note" in cost:
        return {**card, "head": "not measured", "lines": [cost["note"]]}
    rows = cost["rows"][:4]
    head = f"{sum(row['share'] for row in rows):.0%} from {len(rows)} of {len(cost['rows'])} layers"
    words = {"-": "leave it"}
    lines = [
        {"before": f"{row['share']:.0%}", "node": row["name"], "after": f"fix: {words.get(row['kind'], row['kind'])}"}
        for row in rows
    ]
    return {**card, "head": head, "lines": lines}


def _round(value: float, digits: int = 4) -> float | None:
    """Return `value` rounded to `digits` significant digits, None when it is not finite: JSON has no NaN."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def _collapsed(row: list[Any]) -> Any:
    return row[0] if len(set(row)) == 1 else row
