"""`mezzotint demo`: the embedded digits model, compiled to W8A8 and sampled twice from the same noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import staged
from mezzotint.runtime.bundle.bundle import MODEL, open_bundle
from mezzotint.runtime.progress import Progress, silent

from .api import compile_model
from .bench.pairs import compare, folder_bytes, latency_ratio
from .io import images

IMAGES = 64
BATCH = 16


def run_demo(
    output: Path, *, threads: int | None = 2, force: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Write one folder (images, bundle, float model, summary.json) and return the summary."""
    with staged(output, force=force) as (folder, _work):
        exported = folder / "float.onnx"
        bundle = compile_model("digits", folder / "bundle", export=exported, threads=threads, progress=progress)
        pairs = compare(bundle, exported, IMAGES, batch=BATCH, threads=threads, progress=progress)
        before, after, ratio = latency_ratio(bundle, exported, BATCH, threads=threads)
        grids = {"float": images.grid(pairs.float_images), "integer (W8A8)": images.grid(pairs.quantized_images)}
        images.side_by_side(grids).save(folder / "digits.png")
        images.save_images(pairs.float_images, folder / "float.png")
        images.save_images(pairs.quantized_images, folder / "integer.png")
        kernels = bundle.manifest.kernels
        sizes = folder_bytes(exported), folder_bytes(bundle.path / MODEL)
        summary = {
            "images": IMAGES,
            "deployment": {k: getattr(bundle.deployment, k) for k in ("sampler", "steps", "eta")},
            "float_bytes": sizes[0],
            "integer_bytes": sizes[1],
            "size_ratio": sizes[1] / sizes[0],
            "batch": BATCH,
            "threads": threads,
            "float_call_ms": before * 1e3,
            "integer_call_ms": after * 1e3,
            "speedup": ratio,
            "integer_kernels": kernels.integer,
            "float_kernels": kernels.floating,
            "islands": dict(bundle.manifest.islands),
            **pairs.to_json(),
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8", newline="\n")
    open_bundle(output / "bundle")  # with every hash checked
    return summary


def demo_rows(summary: dict[str, Any]) -> dict[str, str]:
    """Return the summary for display."""
    threads = summary["threads"] or "onnxruntime's own number of"

    def db(key: str) -> str:
        return "identical" if summary[key] is None else f"{summary[key]:.1f} dB"

    return {
        "size": f"{summary['integer_bytes'] / 1e6:.2f} MB, {summary['size_ratio']:.3f} of the float file's "
        f"{summary['float_bytes'] / 1e6:.2f} MB",
        f"one call, batch {summary['batch']}, {threads} threads": f"{summary['integer_call_ms']:.0f} ms, "
        f"{summary['speedup']:.2f}x faster than fp32 onnxruntime ({summary['float_call_ms']:.0f} ms)",
        "kernels": f"{summary['integer_kernels']} integer, {summary['float_kernels']} float",
        "SQNR of epsilon": f"{db('eps_sqnr_db')} over all steps, {db('eps_sqnr_db_worst_step')} at the worst "
        f"(step {summary['worst_step'] + 1})",
        f"PSNR of {summary['images']} images": f"{db('psnr_db_median')} median, {db('psnr_db_p10')} 10th percentile",
    }
