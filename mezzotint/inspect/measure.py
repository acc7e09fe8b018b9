"""The measured sections of a bundle's page: images, times, and the error of each layer.

A measurement that is impossible for this bundle becomes a `note` with the reason, and the page shows the rest.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.compiler.audit.fusion import audit_fusion
from mezzotint.compiler.stages import scratch
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import json_db
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import IMAGE_RANK, Images, no_image

from ..bench import bench
from ..bench.pairs import Comparison, compare, latencies, unseen_seed
from ..bench.reference import ReferenceModel
from ..bench.trace import node_seconds
from ..debug.diagnose import diagnose
from ..io.images import picture, to_pixels
from .data import PageData

SIDE = 256  # pixels: larger images are reduced for the page
_REPEATS = 5
NO_REFERENCE = "needs the float model: --reference FLOAT.onnx, which `mezzotint export` writes"


@dataclass(frozen=True)
class PageOptions:
    """The measurements of a page. `pictures` 0 leaves out the images, `calls` 0 the errors of layers."""

    reference: Path | None = None
    pictures: int = 8
    calls: int = 2
    profile: bool = True
    conditions: Conditions | None = None
    unconditional: Conditions | None = None
    seed: int | None = None
    threads: int = 2


def measure_sections(bundle: Bundle, options: PageOptions, progress: Progress = silent) -> PageData:
    """Return {"audit", "pictures", "speed", "cost"}. Raises InputError where the reference is missing."""
    reference = (
        None if options.reference is None else ReferenceModel(bundle, options.reference, threads=options.threads)
    )
    if reference is not None:
        reference.check()
    data = {
        "audit": audit_rows(bundle, options.threads),
        "pictures": _or_note(lambda: _images(bundle, reference, options, progress)),
        "speed": _or_note(lambda: _speed(bundle, reference, options, progress)),
    }
    if reference is not None:
        reference.close()  # the errors of layers need no session of it, and the memory for another graph
    return {**data, "cost": _or_note(lambda: _cost(bundle, options, progress))}


def audit_rows(bundle: Bundle, threads: int | None = None) -> list[PageData]:
    """Return the fusion audit by this onnxruntime, failures first: {name, op, kernel, integer, rule, why, fix}."""
    with scratch() as folder:
        islands = bundle.manifest.islands
        audit = audit_fusion(bundle.model_path, folder, threads=threads, islands=islands)
    return [v.to_json() for v in sorted(audit.verdicts, key=lambda v: (v.integer, not v.failed))]


def _or_note(measurement: Callable[[], PageData]) -> PageData:
    try:
        return measurement()
    except MezzotintError as error:
        return {"note": f"{error.what}; {error.hint}" if error.hint else error.what}


def _images(bundle: Bundle, reference: ReferenceModel | None, options: PageOptions, progress: Progress) -> PageData:
    if not options.pictures:
        return {"note": "no images were requested (-n 0)"}
    seed = unseen_seed(bundle) if options.seed is None else options.seed
    conditions, unconditional = (
        _first(arrays, options.pictures) for arrays in (options.conditions, options.unconditional)
    )
    view = _view(bundle)
    data: PageData = {"seed": seed, "view": view}
    if reference is None:
        mine = bundle.sample(
            options.pictures,
            seed=seed,
            conditions=conditions,
            unconditional=unconditional,
            threads=options.threads,
            progress=lambda done, total: progress("images", done, total),
        )
        return {
            **data,
            "rows": [{"label": "quantized", "images": _urls(_shown(_flat(mine, bundle), view))}],
            "hint": NO_REFERENCE,
        }
    comparison = compare(
        bundle,
        reference.network,
        options.pictures,
        seed=seed,
        conditions=conditions,
        unconditional=unconditional,
        threads=options.threads,
        progress=progress,
    )
    return {**data, **_compared(comparison, bundle)}


def _first(conditions: Conditions | None, n: int) -> Conditions | None:
    """Return the conditions of the first `n` images."""
    return None if conditions is None else {name: array[:n] for name, array in conditions.items()}


def _compared(comparison: Comparison, bundle: Bundle) -> PageData:
    flat = [_flat(samples, bundle) for samples in (comparison.float_images, comparison.quantized_images)]
    exact, mine = (_shown(images, _view(bundle), flat[0]) for images in flat)
    apart = np.abs(mine.astype(np.float32) - exact)
    factor = max(1, int(np.floor(1 / max(float(np.percentile(apart, 99.5)), 1 / 64))))
    wide = np.clip(apart * factor * 2 - 1, -1, 1).astype(np.float32)
    per_step = comparison.sqnr.per_step()
    return {
        "rows": [
            {"label": "float", "images": _urls(exact)},
            {"label": "quantized", "images": _urls(mine)},
            {"label": f"difference x {factor}", "images": _urls(wide)},
        ],
        "psnr": [json_db(float(db)) for db in comparison.psnr],
        "sqnr": [[bundle.deployment.calls[call], json_db(db)] for call, db in per_step.items()],
        "figures": comparison.to_json(),
    }


def _view(bundle: Bundle) -> str:
    """Return what the page shows in the place of images, empty for images."""
    reason = no_image(bundle.sample_shape)
    if reason is None:
        return ""
    if len(bundle.sample_shape) == IMAGE_RANK - 1:
        return "These are latents, not decoded: the first three channels are shown as colours."
    if len(bundle.sample_shape) < IMAGE_RANK - 1:
        return f"{reason.capitalize()}: each is shown as a sheet of its values, one row for each channel."
    return f"{reason.capitalize()}: of each the middle frame is shown, its first three channels as colours."


def _flat(samples: Images, bundle: Bundle) -> Images:
    """Return samples of any rank as images `[n, C, H, W]`: a sheet of all values, or the middle frame."""
    moved = np.moveaxis(samples, bundle.signature.channel_axis, 1)
    while moved.ndim > IMAGE_RANK:
        moved = moved[:, :, moved.shape[2] // 2]
    return moved if moved.ndim == IMAGE_RANK else moved.reshape(len(moved), 1, moved.shape[1], -1)


def _shown(images: Images, view: str, scale_of: Images | None = None) -> Images:
    """Return images in [-1, 1]; with a `view` three channels, in the range of `scale_of` or their own."""
    if not view:
        return np.clip(images, -1, 1)
    reach = images if scale_of is None else scale_of
    count = 3 if images.shape[1] >= 3 else 1
    limit = np.percentile(np.abs(reach[:, :count]), 99.5, axis=(0, 2, 3), keepdims=True)
    shown: Images = np.clip(images[:, :count] / np.maximum(limit, 1e-6)[0], -1, 1).astype(np.float32)
    return shown


def _urls(images: Images) -> list[str]:
    """Return images as PNG files in data: addresses."""
    urls = []
    for pixels in to_pixels(images):
        shown = picture(pixels)
        if max(shown.size) > SIDE:
            ratio = SIDE / max(shown.size)
            size = (max(1, round(shown.width * ratio)), max(1, round(shown.height * ratio)))
            shown = shown.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        shown.save(file, format="PNG", optimize=True)
        urls.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return urls


def _speed(bundle: Bundle, reference: ReferenceModel | None, options: PageOptions, progress: Progress) -> PageData:
    if not options.profile:
        return {"note": "times were not requested (--no-profile)"}
    progress("times", 0, 2)
    net = bundle.denoiser(options.threads)
    batch = net.fixed_batch or 1
    rows = {name: array for name, (array, _) in bench.make_conditions(net, bundle, batch).items()}
    times = latencies(
        bundle,
        batch,
        float_model=None if reference is None else reference.network,
        threads=options.threads,
        repeats=_REPEATS,
        conditions=rows,
    )
    progress("times", 1, 2)
    breakdown = bench.profile(bundle, batch, rows, options.threads, _REPEATS)
    progress("times", 2, 2)
    total = breakdown.kernel_seconds or 1.0
    groups = sorted(breakdown.groups().items(), key=lambda item: -item[1][1])
    return {
        "call_ms": _ms(times[0].median),
        "float_ms": _ms(times[1].median) if len(times) > 1 else None,
        "batch": batch,
        "threads": options.threads,
        "groups": [
            {"group": name, "nodes": nodes, "ms": _ms(seconds), "share": round(seconds / total, 4)}
            for name, (nodes, seconds) in groups
        ],
        "nodes": {name: _ms(seconds) for name, seconds in node_seconds(breakdown).items()},
    }


def _cost(bundle: Bundle, options: PageOptions, progress: Progress) -> PageData:
    if options.reference is None:
        return {"note": NO_REFERENCE}
    if not options.calls:
        return {"note": "the errors of layers were not requested (--calls 0)"}
    diagnosis = diagnose(
        bundle,
        options.reference,
        1,
        calls=options.calls,
        seed=options.seed,
        conditions=options.conditions,
        unconditional=options.unconditional,
        threads=options.threads,
        progress=progress,
    )
    calls: Sequence[Any] = list(diagnosis.calls.values())
    rows = [
        {
            "name": layer.name,
            "kernel": layer.kernel,
            "share": layer.share,
            "what": layer.suggestion.what,
            "why": layer.suggestion.why,
            "kind": layer.suggestion.kind,
            "output": [json_db(layer.cost.per_step()[call]) for call in diagnosis.calls],
            "local": [json_db(layer.local[call]) for call in diagnosis.calls],
        }
        for layer in diagnosis.layers
    ]
    together, shipped = diagnosis.together.pooled(), diagnosis.bundle.pooled()
    return {
        "timesteps": calls,
        "rows": rows,
        "together": json_db(together),
        "bundle": json_db(shipped),
        "unknown": dict(diagnosis.unknown),
        "same_weights": diagnosis.same_weights,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
