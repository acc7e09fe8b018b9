"""An evaluation (eval_run.py) as Markdown and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]
Table = tuple[str, Sequence[str], list[tuple[str, ...]]]

METRICS = {
    "eps_sqnr_db": ("SQNR of epsilon, all steps", "{:.2f} dB"),
    "eps_sqnr_db_worst_step": ("SQNR of epsilon, worst step", "{:.2f} dB"),
    "sample_sqnr_db": ("SQNR of the final samples", "{:.2f} dB"),
    "psnr_db_median": ("PSNR, median", "{:.2f} dB"),
    "psnr_db_p10": ("PSNR, 10th percentile", "{:.2f} dB"),
    "psnr_db_mean": ("PSNR, mean", "{:.2f} dB"),
    "ssim_mean": ("SSIM, mean", "{:.4f}"),
    "lpips_mean": ("LPIPS, mean", "{:.4f}"),
    "agreement": ("same class", "{:.1%}"),
    "frechet": ("Frechet distance to the float pictures", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
}
OTHER_WEIGHTS = "the reference has other weights than the model that the bundle was compiled from"


def tables(found: Found) -> list[Table]:
    """(title, columns, rows) of everything that is told."""
    rows = [_metric(name, found["metrics"][name]) for name in METRICS]
    steps = found["eps_sqnr_db_per_step"]
    worst = found["worst_step"]
    return [
        ("what it is", ("", ""), [(key, value) for key, value in _facts(found).items()]),
        ("pictures in pairs", ("metric", "value", "95 % interval", "resamples"), rows),
        (
            "SQNR of epsilon at each network call",
            ("call", "timestep", "dB"),
            [(str(s["call"]), f"{s['timestep']:g}", _db(s["db"]) + (" worst" * (s["call"] == worst))) for s in steps],
        ),
        ("cost", ("", "bundle", "float", "ratio"), _cost(found)),
    ]


def markdown(found: Found) -> str:
    """The page `eval.md`."""
    lines = [f"# Evaluation of {found['bundle']['name']}", ""]
    if not found["reference"]["same_weights"]:
        lines += [f"**Warning:** {OTHER_WEIGHTS}.", ""]
    for title, columns, rows in tables(found):
        lines += [f"## {title[0].upper()}{title[1:]}", "", _line(columns), _line(["---"] * len(columns))]
        lines += [*map(_line, rows), ""]
    islands = found["kernels"]["islands"]
    if islands:
        lines += ["## Kept in float", "", *(f"- `{name}`: {why}" for name, why in islands.items()), ""]
    return "\n".join([*lines, *(f"- {note}" for note in notes(found))]) + "\n"


def print_evaluation(found: Found) -> None:
    """The same on the console."""
    from ..text import console

    if not found["reference"]["same_weights"]:
        console.print_warning(OTHER_WEIGHTS)
    for title, columns, rows in tables(found):
        console.print_table(title, columns, rows)
    for note in notes(found):
        console.out.print(note, highlight=False, markup=False, soft_wrap=True)


def notes(found: Found) -> list[str]:
    """How the numbers are to be read."""
    told = [
        "intervals are percentile bootstraps over the pairs of pictures; they do not tell of the calibration's chance",
        "SQNR of epsilon: both networks on the latents of the float trajectory, without the noise correction",
        "SSIM: windows of 7x7 pixels, evenly weighted",
    ]
    if found["features"] is not None:
        told.append(
            "Frechet distances depend on the number of pictures: compare those of equal numbers only; the interval is "
            "that of the draws, scaled to have its middle at the value"
        )
    if found["speed"] is not None:
        told.append(
            "speed: fp32 onnxruntime in the same run, in blocks there and back; the range is that of the blocks"
        )
        told.append("memory: what opening the model and one call add to a fresh process")
    return told


def _facts(found: Found) -> dict[str, str]:
    features, kernels = found["features"], found["kernels"]
    return {
        "bundle": f"{found['bundle']['name']}, recipe {found['bundle']['recipe']}, {found['bundle']['digest'][:12]}",
        "reference": f"{found['reference']['name']}, {found['reference']['digest'][:12]}",
        "deployment": found["deployment"],
        "pictures": f"{found['pictures']} pairs, seed {found['seed']}",
        "noise correction": "applied" if found["correction"] else "not applied",
        "features": "none" if features is None else f"{features['name']}, {features['digest'][:12]}",
        "kernels": f"{kernels['integer']} integer, {kernels['float']} float, {len(kernels['islands'])} islands",
        "onnxruntime": found["onnxruntime"],
    }


def _metric(name: str, metric: Found) -> tuple[str, ...]:
    label, form = METRICS[name]
    if metric["value"] is None:
        return label, metric["why"], "", ""
    ends = metric["interval"]
    told = "" if ends is None else " to ".join("infinite" if e is None else form.format(e) for e in ends)
    return label, form.format(metric["value"]), told, str(metric["resamples"] or "")


def _cost(found: Found) -> list[tuple[str, ...]]:
    size, speed, memory = found["size"], found["speed"], found["memory"]
    rows: list[tuple[str, ...]]
    rows = [("file", _mb(size["bytes"]), _mb(size["float_bytes"]), f"{size['share']:.3f}")]
    if speed is None or memory is None:
        return [*rows, ("time and memory of a call", "not measured (--no-speed)", "", "")]
    ratio, threads = speed["ratio"], "onnxruntime's choice of" if speed["threads"] is None else speed["threads"]
    told = f"one call, batch {speed['batch']}, {threads} threads, {speed['calls']} calls in {speed['blocks']} blocks"
    faster = f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
    rows.append((told, f"{speed['call_ms']:.2f} ms", f"{speed['float_call_ms']:.2f} ms", faster))
    share = "" if memory["share"] is None else f"{memory['share']:.3f}"
    rows.append(("memory of one call", _mb(memory["bundle"]["added"]), _mb(memory["float"]["added"]), share))
    return rows


def _mb(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def _db(value: float | None) -> str:
    return "no difference" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
