"""Summaries of bundles, as data and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint.runtime.bundle.acceptance import Acceptance
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.bundle.manifest_entries import QuantizerEntry, Storage
from mezzotint.runtime.bundle.training import TrainedUnit
from mezzotint.runtime.compare import db_text
from mezzotint.runtime.sampling.options import SamplingOptions
from mezzotint.runtime.targets import TARGETS

from . import console
from .report_mix import precisions_of, print_precisions

MOST_ROWS = 10
"""Rows of a long table, without --all."""


def model_bytes(bundle: Bundle) -> int:
    """Return the bytes of the bundle's ONNX files and their external data."""
    return bundle.model_bytes


def compile_summary(bundle: Bundle) -> dict[str, Any]:
    """Return the main facts of a compiled bundle."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "recipe": manifest.recipe.name,
        "target": manifest.target,
        "model_bytes": model_bytes(bundle),
        "parameter_bytes_before": manifest.source.parameter_bytes,
        "integer_kernels": manifest.kernels.integer,
        "float_kernels": manifest.kernels.floating,
        "islands": manifest.islands,
        "seconds": round(sum(record.seconds for record in manifest.history), 1),
        "peak_memory_mb": max((record.peak_memory_mb for record in manifest.history), default=0.0),
        "warnings": list(manifest.warnings),
        "acceptance": None if manifest.acceptance is None else manifest.acceptance.to_json(),
        "digest": manifest.digest,
    }


def compile_rows(bundle: Bundle, summary: dict[str, Any]) -> dict[str, Any]:
    """Return compile_summary for display."""
    size, before = summary["model_bytes"], summary["parameter_bytes_before"]
    acceptance = bundle.manifest.acceptance
    return {
        "bundle": summary["bundle"],
        "recipe": summary["recipe"],
        "target": summary["target"],
        "size": f"{size / 1e6:.2f} MB, {size / before:.3f} of the float parameters' {before / 1e6:.2f} MB",
        "kernels": bundle.manifest.kernels_text(),
        "kept in float": console.CellLines(f"{name}: {why}" for name, why in summary["islands"].items()) or "nothing",
        **({} if acceptance is None else acceptance.shown(bundle.manifest.measured_in)),
        "passes": f"{summary['seconds']:.1f} s, peak memory {summary['peak_memory_mb']:.0f} MB",
        "digest": summary["digest"],
    }


def sample_summary(bundle: Bundle, output: Path | str, n: int, options: SamplingOptions) -> dict[str, Any]:
    """Return what `sample` does, defaults filled in. Raises as `Bundle.plan`."""
    plan = bundle.plan(options.sampler, options.steps, options.eta, options.guidance)
    table = bundle.correction
    corrected = options.correction is not False and table is not None and table.refusal(plan) is None
    return {
        "output": str(output),
        "pictures": n,
        "sampler": plan.sampler,
        "steps": plan.steps,
        "eta": plan.eta,
        "guidance": plan.guidance,
        "seed": options.seed,
        "correction": corrected,
        **precisions_of(bundle, plan),
    }


def inspection(bundle: Bundle) -> dict[str, Any]:
    """Return the manifest without the hashes, and facts that follow from it."""
    hidden = ("files", "format")
    return {
        "bundle": str(bundle.path),
        "model_bytes": model_bytes(bundle),
        "corrected": bundle.correction is not None,
        **{k: v for k, v in bundle.manifest.to_json().items() if k not in hidden},
    }


def print_inspection(bundle: Bundle, *, everything: bool = False) -> None:
    """Print the facts of a bundle as tables: on about two screens, or with every quantizer, layer and call."""
    most = None if everything else MOST_ROWS
    manifest = bundle.manifest
    source, signature, kernels = manifest.source, manifest.signature, manifest.kernels
    size = model_bytes(bundle)
    console.print_pairs(
        str(bundle.path),
        {
            "recipe": f"{manifest.recipe.name}: {manifest.recipe.description}",
            "target": f"{manifest.target}: {TARGETS[manifest.target]}",
            "source": f"{source.kind} {source.name}",
            **({"fused LoRAs": console.CellLines(map(str, source.loras))} if source.loras else {}),
            "inputs": ", ".join([signature.sample, signature.timestep, *signature.conditions]),
            "output": f"{signature.output} ({signature.prediction})",
            "deployment": str(bundle.deployment),
            "timestep tables": "none"
            if bundle.deployed_timesteps is None
            else f"{len(bundle.deployed_timesteps)} rows",
            "size": f"{size / 1e6:.2f} MB; float parameters were {source.parameter_bytes / 1e6:.2f} MB",
            "storage": "unknown: compiled by a version that did not count it"
            if manifest.storage is None
            else _storage(manifest.storage),
            "kernels": manifest.kernels_text(),
            **({"warnings": console.CellLines(manifest.warnings)} if manifest.warnings else {}),
            **({} if manifest.acceptance is None else manifest.acceptance.shown(manifest.measured_in)),
            "noise correction": "none" if bundle.correction is None else bundle.correction.fitted_for,
            "digest": manifest.digest,
        },
    )
    if bundle.precisions is not None:
        print_precisions(bundle)
    if manifest.acceptance is not None:
        _print_acceptance(manifest.acceptance)
    console.print_table(
        "passes",
        ("pass", "nodes", "what it did", "seconds", "peak MB"),
        [
            (
                record.name,
                f"{record.nodes_before} -> {record.nodes_after}",
                record.note,
                f"{record.seconds:.1f}",
                f"{record.peak_memory_mb:.0f}",
            )
            for record in manifest.history
        ],
    )
    if manifest.training:
        _print_training(manifest.training, most)
    if manifest.bits:
        _print_bits(manifest.bits, most)
    if manifest.noise:
        _print_noise(manifest.noise, most)
    if manifest.quantizers:
        _print_quantizers(manifest.quantizers, everything)
    layers = [(name, layer.kernel, layer.why) for name, layer in kernels.layers.items()]
    if everything:
        console.print_table("layers", ("layer", "kernel", "why not integer"), layers)
    else:
        counted = Counter(kernel for _, kernel, _ in layers)
        console.print_table("layers", ("kernel", "layers"), list(counted.items()), most=most)
        floating = [(name, why) for name, _, why in layers if why]
        if floating:
            console.print_table("layers in float", ("layer", "why"), floating, most=most)
    if manifest.refused:
        console.print_table(
            "left unchanged by a rewriting pass", ("value", "why"), list(manifest.refused.items()), most=most
        )


def _print_acceptance(acceptance: Acceptance) -> None:
    """Print the SQNR of each group of timesteps, and the worst layers where it is low."""
    rows = [
        (str(group), group.last - group.first + 1, group.measured, db_text(group.sqnr_db))
        for group in acceptance.groups
    ]
    console.print_table("accuracy of the finished file", ("", "calls", "compared", "SQNR of the prediction, dB"), rows)
    if acceptance.layers:
        layers = [(layer.layer, f"{layer.share:.0%}", layer.why) for layer in acceptance.layers]
        console.print_table("worst layers", ("layer", "of the error", "why"), layers)
        for advice in dict.fromkeys(layer.advice for layer in acceptance.layers):
            console.print_line(f"what helps: {advice}")


def _storage(storage: Storage) -> console.CellLines:
    """Return bytes and values by storage type, one a line, and notes on constants stored wider than their type."""
    rows = [
        f"{kind}: {stored.bytes / 1e6:.2f} MB, {stored.values} values in {stored.constants} constants"
        for kind, stored in storage.types.items()
    ]
    rest = storage.model_bytes - storage.constant_bytes
    ratio = [] if storage.ratio is None else [f"{storage.ratio:.3f} of the float parameters"]
    return console.CellLines([*ratio, *rows, f"graph: {rest / 1e6:.2f} MB", *storage.notes])


def _print_training(units: Sequence[TrainedUnit], most: int | None) -> None:
    """Print the units that kept what they learned first, by what is left of their error."""
    rows = [
        (
            unit.unit,
            unit.by,
            f"{unit.start:.3g}",
            f"{_share(unit.soft, unit.start):.0%}",
            f"{_share(unit.hard, unit.start):.0%}" + ("" if unit.kept else ", not kept"),
        )
        for unit in sorted(units, key=lambda unit: _share(unit.hard, unit.start))
    ]
    heads = ("unit", "pass", "error before", "behind the fit", "rounded")
    console.print_table("training", heads, rows, most=most)


def _share(error: float, start: float) -> float:
    return error / start if start > 0 else 1.0


def _print_bits(bits: Mapping[str, Any], most: int | None) -> None:
    """Print the Pareto curve of assign_bits, with the chosen point."""
    points = [("", p) for p in bits["pareto"]] + [("chosen", bits["chosen"])]
    rows = [
        (mark, f"{p['takes']:.4g}", f"{p['mean_bits']:.2f}", _layers(p["layers"]), db_text(p["sqnr_db"]))
        for mark, p in sorted(points, key=lambda pair: float(pair[1]["takes"]))
    ]
    kind = bits["budget"]["kind"]
    console.print_table("bits", ("", kind, "bits a weight", "layers by bits", "predicted SQNR, dB"), rows, most=most)


def _print_noise(noise: Mapping[str, Any], most: int | None) -> None:
    """Print the measurements of fit_noise at each network call, and the part that the sampler undoes."""
    words = {"none": "nothing", "both": "slope and bias"}
    rows = [
        (
            f"{row['timestep']:g}" + (f" ({row['stage'] + 1}.)" if row["stage"] else ""),
            f"{row['slope']:+.4f}",
            f"{row['bias']:.4f}",
            f"{row['spread']:.4f}",
            f"{db_text(row['sqnr_db']['none'])} -> {db_text(row['sqnr_db'][row['kept']])}",
            words.get(row["kept"], row["kept"]),
            f"{row['sigma']:.4f} -> {row['noise']:.4f}" + (", clamped" if row["clamped"] else ""),
        )
        for row in noise["calls"]
    ]
    columns = ("timestep", "slope", "bias", "spread", "SQNR held out, dB", "undone", "sampler's noise")
    console.print_table(f"noise: {noise['summary']}", columns, rows, most=most)


def _layers(counted: dict[str, int]) -> str:
    words = {"float": "in float", "mixed": "mixed by channel"}
    return ", ".join(f"{n} {words.get(label, f'at {label}')}" for label, n in counted.items())


def _format(quantizer: QuantizerEntry) -> str:
    """Return `int8`, `int8 (8 levels)`, or `int8 (4 bits: 115, 8 bits: 13)` with the channels of each width."""
    if quantizer.levels:
        return f"{quantizer.format} ({quantizer.levels} levels)"
    if quantizer.vectors:
        return f"{quantizer.format} ({quantizer.vectors[0]} vectors of {quantizer.vectors[1]})"
    widths = ", ".join(f"{bits} bits: {n}" for bits, n in (quantizer.row_bits or {}).items())
    return f"{quantizer.format} ({widths})" if widths else quantizer.format


def _scale(quantizer: QuantizerEntry) -> str:
    scale, rows = quantizer.scale, quantizer.rows
    if isinstance(scale, tuple):
        count = f"{rows} rows" if rows > 1 else f"{quantizer.channels} channels"
        return f"{scale[0]:.3g} .. {scale[1]:.3g} ({count})"
    return f"{scale:.4g}"


def _zero(quantizer: QuantizerEntry) -> str:
    """Return the zero points, or `12 .. 251 (137 values)` where there are more than three."""
    zeros = quantizer.zero_point
    return ", ".join(map(str, zeros)) if len(zeros) <= 3 else f"{zeros[0]} .. {zeros[-1]} ({len(zeros)} values)"


def _print_quantizers(quantizers: Sequence[QuantizerEntry], everything: bool) -> None:
    """Print every quantizer, or how many there are of each kind."""
    if everything:
        rows = [(q.site, _format(q), _scale(q), _zero(q), q.by) for q in quantizers]
        console.print_table("quantizers", ("site", "format", "scale", "zero point", "chosen by"), rows)
        return
    kinds: dict[tuple[str, str, str], list[QuantizerEntry]] = {}
    for q in quantizers:
        table = f"{q.rows} rows" if q.rows > 1 else "one row"
        scales = "one scale" if q.channels == 1 else "a scale for each channel"
        kinds.setdefault((q.format, f"{scales}, {table}", q.by), []).append(q)
    counts = [(len(found), format, scales, _range_of(found), by) for (format, scales, by), found in kinds.items()]
    title = "quantizers (each one: --all)"
    console.print_table(title, ("", "format", "scales", "from .. to", "chosen by"), counts, most=MOST_ROWS)


def _range_of(quantizers: Sequence[QuantizerEntry]) -> str:
    ends = [end for q in quantizers for end in (q.scale if isinstance(q.scale, tuple) else (q.scale,))]
    return f"{min(ends):.3g} .. {max(ends):.3g}"
