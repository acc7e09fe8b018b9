"""Measurements from after a compilation, for the model card: of `mezzotint eval --json` and `mezzotint bench --json`.

The manifest keeps them as plain data under `measured`, so that a rewritten card still has them:

    eval    {"metrics": {NAME: {"value": number or null, "why": text, "low": number, "high": number, "unit": text}},
             "facts": {...}, "other_weights": bool}
    bench   {"call_ms", "minimum_ms", "float_call_ms", "speedup", "batch", "threads", "onnxruntime", "machine"}

`low` and `high` are the ends of a confidence interval. null stands for an infinite ratio (no error), or for a missing
value, with the reason in `why`. `facts` are the other single numbers and words of the evaluation (pictures, seed ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mezzotint.runtime.errors import InputError

METRIC_NAMES = {
    "eps_sqnr_db": "SQNR of epsilon, all steps",
    "eps_sqnr_db_worst_step": "SQNR of epsilon, worst step",
    "sample_sqnr_db": "SQNR of the final samples",
    "psnr_db_median": "PSNR, median",
    "psnr_db_p10": "PSNR, 10th percentile",
    "psnr_db_mean": "PSNR, mean",
    "ssim_mean": "SSIM, mean",
    "lpips_mean": "LPIPS, mean",
    "agreement": "same class",
    "frechet": "Frechet distance to the float images",
    "sfid": "sFID: the same of spatial features",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "inception score",
    "inception_score_float": "inception score of the float images",
}
"""The metrics of an evaluation in words, by their keys in JSON."""
_EVAL = 'give what `mezzotint eval --json` printed, or {"metrics": {NAME: NUMBER}}'
_BENCH = "give what `mezzotint bench --json` printed"


def eval_figures(data: Any, where: str) -> dict[str, Any]:
    """Return the figures of an evaluation for the card. Raises InputError for other data.

    A metric may be a number, null, or a mapping with `value` and perhaps `interval` (a pair) or `low` and `high`,
    `unit` and `why`.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("metrics"), Mapping) or not data["metrics"]:
        raise InputError("these are no figures of an evaluation: there is no `metrics`", where=where, hint=_EVAL)
    try:
        metrics = {str(name): _metric(str(name), value) for name, value in data["metrics"].items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"these are no figures of an evaluation: {error}", where=where, hint=_EVAL) from error
    facts = {str(k): v for k, v in data.items() if k != "bundle" and isinstance(v, (str, int, float, bool))}
    reference = data.get("reference")
    other = isinstance(reference, Mapping) and reference.get("same_weights") is False
    return {"metrics": metrics, "facts": facts, "other_weights": other}


def evaluated(data: Any) -> str | None:
    """Return the digest of the evaluated bundle, or None where the data has none."""
    bundle = data.get("bundle") if isinstance(data, Mapping) else None
    digest = bundle.get("digest") if isinstance(bundle, Mapping) else None
    return str(digest) if digest else None


def eval_speed(data: Any, machine: str) -> dict[str, Any] | None:
    """Return the speed of an evaluation in the form of `bench_figures`; None where it was not measured."""
    speed = data.get("speed")
    if not isinstance(speed, Mapping) or "call_ms" not in speed:
        return None
    ratio = speed.get("ratio")
    return {
        "call_ms": speed["call_ms"],
        "minimum_ms": None,
        "float_call_ms": speed.get("float_call_ms"),
        "speedup": ratio.get("value") if isinstance(ratio, Mapping) else None,
        "batch": speed.get("batch"),
        "threads": speed.get("threads"),
        "onnxruntime": str(data.get("onnxruntime", "")),
        "machine": machine,
    }


def bench_figures(data: Any, machine: str, where: str) -> dict[str, Any]:
    """Return the figures of `mezzotint bench` for the card; `machine` in words. Raises InputError for other data."""
    try:
        floating = data["float_call_ms"]
        return {
            "call_ms": _number(data["call_ms"]["median"]),
            "minimum_ms": _number(data["call_ms"]["minimum"]) if "minimum" in data["call_ms"] else None,
            "float_call_ms": None if floating is None else _number(floating["median"]),
            "speedup": None if floating is None else _number(data["speedup"]),
            "batch": int(data["batch"]),
            "threads": int(data["threads"]),
            "onnxruntime": str(data["onnxruntime"]),
            "machine": machine,
        }
    except (KeyError, TypeError, ValueError) as error:
        what = f"these are no figures of a measurement of speed: {type(error).__name__} {error}"
        raise InputError(what, where=where, hint=_BENCH) from error


def figure_sections(measured: Mapping[str, Any]) -> str:
    """Return the sections of the card; an empty text without measurements."""
    parts = []
    if "eval" in measured:
        parts.append(_quality(measured["eval"]))
    if "bench" in measured:
        parts.append(_speed(measured["bench"]))
    return "\n\n".join(parts)


def _quality(found: Mapping[str, Any]) -> str:
    rows = [
        f"| {METRIC_NAMES.get(name, name)} | {_value(name, row)} | {_interval(row)} |"
        for name, row in found["metrics"].items()
    ]
    words = {True: "yes", False: "no"}
    facts = ", ".join(
        f"{name} {words[value] if isinstance(value, bool) else value}" for name, value in found["facts"].items()
    )
    head = "Beside the float model, from the same noise" + (f" ({facts})" if facts else "") + ":"
    if found.get("other_weights"):
        head = "**The float model that it was compared with has other weights.** " + head
    return "\n".join([head, "", "| metric | value | interval |", "| --- | --- | --- |", *rows])


def _speed(found: Mapping[str, Any]) -> str:
    fastest = "" if found["minimum_ms"] is None else f"; the fastest {found['minimum_ms']:.4g} ms"
    threads = "its own choice of" if found["threads"] is None else found["threads"]
    lines = [
        f"One call with batch {found['batch']} takes {found['call_ms']:.4g} ms (median{fastest}), onnxruntime "
        f"{found['onnxruntime']} with {threads} threads, on: {found['machine']}."
    ]
    if found["float_call_ms"] is not None:
        times = "" if found["speedup"] is None else f", {found['speedup']:.2f} times as long"
        lines.append(f"The float model takes {found['float_call_ms']:.4g} ms there{times}.")
    return "## How fast here\n\n" + "\n".join(lines)


def _metric(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"value": _number_or_none(name, value)}
    if "value" not in value:
        raise ValueError(f"the metric {name!r} has no `value`")
    row: dict[str, Any] = {"value": _number_or_none(name, value["value"])}
    pair = [value["low"], value["high"]] if {"low", "high"} <= set(value) else value.get("interval")
    if isinstance(pair, (list, tuple)) and len(pair) == 2:
        row["low"], row["high"] = (_number_or_none(name, end) for end in pair)
    return row | {key: value[key] for key in ("unit", "why") if isinstance(value.get(key), str)}


def _number_or_none(name: str, value: Any) -> float | None:
    try:
        return None if value is None else _number(value)
    except ValueError as error:
        raise ValueError(f"the metric {name!r} is no number: {value!r}") from error


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _value(name: str, row: Mapping[str, Any]) -> str:
    if row["value"] is None:
        return str(row.get("why", "no error"))
    unit = row.get("unit", "dB" if "_db" in name else "")
    return f"{row['value']:.4g} {unit}".rstrip()


def _interval(row: Mapping[str, Any]) -> str:
    if "low" not in row:
        return ""
    return " to ".join("no error" if end is None else f"{end:.4g}" for end in (row["low"], row["high"]))
