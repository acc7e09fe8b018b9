"""An evaluation (result.py) as Markdown and as tables."""

from __future__ import annotations

from collections.abc import Sequence

from mezzotint.compiler.bundle.card_figures import METRIC_NAMES
from mezzotint.runtime.compare import db_text
from mezzotint.runtime.engine import EngineUsage
from mezzotint.runtime.visible import visible

from .result import Evaluation, JsonObject

ReportTable = tuple[str, Sequence[str], list[tuple[str, ...]]]

METRIC_FORMS = {
    "ssim_mean": "{:.4f}",
    "lpips_mean": "{:.4f}",
    "agreement": "{:.1%}",
    "frechet": "{:.4f}",
    "sfid": "{:.4f}",
} | dict.fromkeys(("precision", "recall", "inception_score", "inception_score_float"), "{:.3f}")
DECIBELS = "{:.2f} dB"
OTHER_WEIGHTS = "the reference has other weights than the model that the bundle was compiled from"


def tables(evaluation: Evaluation) -> list[ReportTable]:
    """Return (title, columns, rows) of every table of the report."""
    rows = [_metric(name, evaluation.metrics[name]) for name in METRIC_NAMES]
    steps = evaluation.eps_sqnr_db_per_step
    worst = evaluation.worst_step
    return [
        ("the evaluation", ("", ""), [(key, value) for key, value in _facts(evaluation).items()]),
        ("pairs of images", ("metric", "value", "95 % interval", "resamples"), rows),
        (
            "SQNR of epsilon at each network call",
            ("call", "timestep", "dB"),
            [
                (str(s["call"]), f"{s['timestep']:g}", db_text(s["db"], 2) + (" worst" * (s["call"] == worst)))
                for s in steps
            ],
        ),
        ("cost", ("", "bundle", "float", "ratio"), _cost(evaluation)),
    ]


def markdown(evaluation: Evaluation) -> str:
    """Return the text of `eval.md`."""
    lines = [f"# Evaluation of {evaluation.bundle['name']}", ""]
    if not evaluation.reference["same_weights"]:
        lines += [f"**Warning:** {OTHER_WEIGHTS}.", ""]
    for title, columns, rows in tables(evaluation):
        lines += [f"## {title[0].upper()}{title[1:]}", "", _line(columns), _line(["---"] * len(columns))]
        lines += [*map(_line, rows), ""]
    islands = evaluation.kernels["islands"]
    if islands:
        lines += ["## Kept in float", "", *(f"- `{name}`: {why}" for name, why in islands.items()), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(evaluation))]) + "\n"


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the report on the console."""
    from ..text import console

    if not evaluation.reference["same_weights"]:
        console.print_warning(OTHER_WEIGHTS)
    for title, columns, rows in tables(evaluation):
        console.print_table(title, columns, rows)
    for note in notes(evaluation):
        console.print_line(note)


def notes(evaluation: Evaluation) -> list[str]:
    """Return notes on how to read the numbers."""
    lines = [
        "intervals are percentile bootstraps over the pairs of images; the calibration's randomness is not in them",
        "SQNR of epsilon: both networks on the latents of the float trajectory, without the noise correction",
        "SSIM: windows of 7x7 pixels, evenly weighted",
    ]
    if evaluation.features is not None:
        lines.append(
            "Frechet distances depend on the number of images: compare those of equal numbers only; the interval is "
            "that of the draws, scaled so that their median is the value"
        )
    if evaluation.speed is not None:
        lines.append(
            "speed: fp32 onnxruntime in the same run, in blocks forwards and backwards; the range is that of the blocks"
        )
        lines.append("memory: what opening the model and one call add to a new process")
    return lines


def _facts(evaluation: Evaluation) -> dict[str, str]:
    bundle, features, kernels = evaluation.bundle, evaluation.features, evaluation.kernels
    return {
        "bundle": f"{bundle['name']}, recipe {bundle['recipe']}, {bundle['digest'][:12]}",
        "reference": f"{evaluation.reference['name']}, {evaluation.reference['digest'][:12]}",
        "deployment": evaluation.deployment,
        "images": f"{evaluation.pictures} pairs, seed {evaluation.seed}",
        "noise correction": "applied" if evaluation.correction else "not applied",
        "features": "none" if features is None else f"{features['name']}, {features['digest'][:12]}",
        "kernels": f"{kernels['integer']} integer, {kernels['float']} float, {len(kernels['islands'])} islands"
        + (f" {kernels['counted']}" if kernels.get("counted") else ""),
        "onnxruntime": evaluation.onnxruntime,
        **({} if evaluation.engine is None else {"engine of the bundle": EngineUsage(**evaluation.engine).text()}),
    }


def _metric(name: str, metric: JsonObject) -> tuple[str, ...]:
    label, form = METRIC_NAMES[name], METRIC_FORMS.get(name, DECIBELS)
    if metric["value"] is None:
        return label, metric["why"], "", ""
    ends = metric["interval"]
    interval = "" if ends is None else " to ".join("infinite" if e is None else form.format(e) for e in ends)
    return label, form.format(metric["value"]), interval, str(metric["resamples"] or "")


def _cost(evaluation: Evaluation) -> list[tuple[str, ...]]:
    size, speed, memory = evaluation.size, evaluation.speed, evaluation.memory
    rows: list[tuple[str, ...]]
    rows = [("file", _mb(size["bytes"]), _mb(size["float_bytes"]), f"{size['share']:.3f}")]
    if speed is None or memory is None:
        return [*rows, ("time and memory of a call", "not measured (--no-speed)", "", "")]
    ratio, threads = speed["ratio"], "onnxruntime's choice of" if speed["threads"] is None else speed["threads"]
    label = f"one call, batch {speed['batch']}, {threads} threads, {speed['calls']} calls in {speed['blocks']} blocks"
    faster = f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    rows.append((label, f"{speed['call_ms']:.2f} ms", f"{speed['float_call_ms']:.2f} ms", faster))
    share = "" if memory["share"] is None else f"{memory['share']:.3f}"
    rows.append(("memory of one call", _mb(memory["bundle"]["added"]), _mb(memory["float"]["added"]), share))
    return rows


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(visible(cell).replace("|", "\\|") for cell in cells) + " |"
