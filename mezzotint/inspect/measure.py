"""What the page of a bundle tells that has to be measured: pictures, times, and the error of each layer.

Each measurement that this bundle does not allow becomes a `note` with the reason, and the page shows the rest.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from mezzotint.compiler.audit.fusion import audit_fusion
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.compare import json_db
from mezzotint.runtime.errors import InputError, MezzotintError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images

from ..bench import bench
from ..bench.pairs import Comparison, compare, latencies, unseen_seed
from ..bench.trace import node_seconds
from ..debug.diagnose import diagnose
from ..io.images import picture, to_pixels

Data = dict[str, Any]

SIDE = 256  # pixels: larger pictures are made smaller for the page
_REPEATS = 5
NO_REFERENCE = "needs the float model: --reference FLOAT.onnx, which `mezzotint export` writes"


@dataclass(frozen=True)
class Wishes:
    """What to measure: `pictures` 0 and `calls` 0 leave out the pictures and the layers' errors."""

    reference: Path | None = None
    pictures: int = 8
    calls: int = 2
    profile: bool = True
    conditions: Conditions | None = None
    unconditional: Conditions | None = None
    seed: int | None = None
    threads: int = 2


def measure(bundle: Bundle, wishes: Wishes, progress: Progress = silent) -> Data:
    """{"audit", "pictures", "speed", "cost"}. Raises InputError where the reference is missing."""
    if wishes.reference is not None and not wishes.reference.is_file():
        raise InputError(
            "there is no such float model",
            where=str(wishes.reference),
            hint="write it with `mezzotint export MODEL -o FILE.onnx`, from the model that the bundle was made of",
        )
    return {
        "audit": audit_rows(bundle, wishes.threads),
        "pictures": _or_note(lambda: _pictures(bundle, wishes, progress)),
        "speed": _or_note(lambda: _speed(bundle, wishes, progress)),
        "cost": _or_note(lambda: _cost(bundle, wishes, progress)),
    }


def audit_rows(bundle: Bundle, threads: int | None = None) -> list[Data]:
    """The fusion audit by this onnxruntime, failures first: {name, op, kernel, integer, rule, why, fix}."""
    with TemporaryDirectory() as folder:
        islands = bundle.manifest["islands"]
        found = audit_fusion(bundle.model_path, Path(folder), threads=threads, islands=islands)
    return [v.to_json() for v in sorted(found.verdicts, key=lambda v: (v.integer, not v.failed))]


def _or_note(measurement: Callable[[], Data]) -> Data:
    try:
        return measurement()
    except MezzotintError as error:
        return {"note": f"{error.what}; {error.hint}" if error.hint else error.what}


def _pictures(bundle: Bundle, wishes: Wishes, progress: Progress) -> Data:
    if not wishes.pictures:
        return {"note": "no pictures were asked for (-n 0)"}
    seed = unseen_seed(bundle) if wishes.seed is None else wishes.seed
    rows = [_first(given, wishes.pictures) for given in (wishes.conditions, wishes.unconditional)]
    given: Data = {"conditions": rows[0], "unconditional": rows[1], "threads": wishes.threads}
    data: Data = {"seed": seed, "latents": bundle.sample_shape[0] not in (1, 3)}
    if wishes.reference is None:
        mine = bundle.sample(wishes.pictures, seed=seed, progress=lambda a, b: progress("pictures", a, b), **given)
        return {**data, "rows": [{"label": "quantized", "images": _urls(_shown(mine))}], "hint": NO_REFERENCE}
    found = compare(bundle, wishes.reference, wishes.pictures, seed=seed, progress=progress, **given)
    return {**data, **_compared(found, bundle)}


def _first(given: Conditions | None, n: int) -> Conditions | None:
    """The conditions of the first `n` pictures, where there are more."""
    return None if given is None else {name: array[:n] for name, array in given.items()}


def _compared(found: Comparison, bundle: Bundle) -> Data:
    exact, mine = _shown(found.float_images, found.float_images), _shown(found.quantized_images, found.float_images)
    apart = np.abs(mine.astype(np.float32) - exact)
    factor = max(1, int(np.floor(1 / max(float(np.percentile(apart, 99.5)), 1 / 64))))
    wide = np.clip(apart * factor * 2 - 1, -1, 1).astype(np.float32)
    per_step = found.sqnr.per_step()
    return {
        "rows": [
            {"label": "float", "images": _urls(exact)},
            {"label": "quantized", "images": _urls(mine)},
            {"label": f"difference x {factor}", "images": _urls(wide)},
        ],
        "psnr": [json_db(float(db)) for db in found.psnr],
        "sqnr": [[bundle.deployment.calls[call], json_db(db)] for call, db in per_step.items()],
        "figures": found.to_json(),
    }


def _shown(images: Images, scale_of: Images | None = None) -> Images:
    """Pictures in [-1, 1]. Of latents the first three channels, spread over what `scale_of` (or they) use."""
    if images.shape[1] in (1, 3):
        return np.clip(images, -1, 1)
    reach = images if scale_of is None else scale_of
    count = 3 if images.shape[1] >= 3 else 1
    limit = np.percentile(np.abs(reach[:, :count]), 99.5, axis=(0, 2, 3), keepdims=True)
    shown: Images = np.clip(images[:, :count] / np.maximum(limit, 1e-6)[0], -1, 1).astype(np.float32)
    return shown


def _urls(images: Images) -> list[str]:
    """PNG files as data: addresses."""
    found = []
    for pixels in to_pixels(images):
        shown = picture(pixels)
        if max(shown.size) > SIDE:
            ratio = SIDE / max(shown.size)
            size = (max(1, round(shown.width * ratio)), max(1, round(shown.height * ratio)))
            shown = shown.resize(size, Image.Resampling.LANCZOS)
        file = io.BytesIO()
        shown.save(file, format="PNG", optimize=True)
        found.append("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())
    return found


def _speed(bundle: Bundle, wishes: Wishes, progress: Progress) -> Data:
    if not wishes.profile:
        return {"note": "times were not asked for (--no-profile)"}
    progress("times", 0, 2)
    net = bundle.denoiser(wishes.threads)
    batch = net.fixed_batch or 1
    rows = {name: array for name, (array, _) in bench.make_conditions(net, bundle, batch).items()}
    times = latencies(
        bundle, batch, float_model=wishes.reference, threads=wishes.threads, repeats=_REPEATS, conditions=rows
    )
    progress("times", 1, 2)
    found = bench.profile(bundle, batch, rows, wishes.threads, _REPEATS)
    progress("times", 2, 2)
    total = found.kernel_seconds or 1.0
    groups = sorted(found.groups().items(), key=lambda item: -item[1][1])
    return {
        "call_ms": _ms(times[0].median),
        "float_ms": _ms(times[1].median) if len(times) > 1 else None,
        "batch": batch,
        "threads": wishes.threads,
        "groups": [
            {"group": name, "nodes": nodes, "ms": _ms(seconds), "share": round(seconds / total, 4)}
            for name, (nodes, seconds) in groups
        ],
        "nodes": {name: _ms(seconds) for name, seconds in node_seconds(found).items()},
    }


def _cost(bundle: Bundle, wishes: Wishes, progress: Progress) -> Data:
    if wishes.reference is None:
        return {"note": NO_REFERENCE}
    if not wishes.calls:
        return {"note": "the errors of layers were not asked for (--calls 0)"}
    found = diagnose(
        bundle,
        wishes.reference,
        1,
        calls=wishes.calls,
        seed=wishes.seed,
        conditions=wishes.conditions,
        unconditional=wishes.unconditional,
        threads=wishes.threads,
        progress=progress,
    )
    calls: Sequence[Any] = list(found.calls.values())
    rows = [
        {
            "name": layer.name,
            "kernel": layer.kernel,
            "share": layer.share,
            "what": layer.suggestion.what,
            "why": layer.suggestion.why,
            "kind": layer.suggestion.kind,
            "output": [json_db(layer.cost.per_step()[call]) for call in found.calls],
            "local": [json_db(layer.local[call]) for call in found.calls],
        }
        for layer in found.layers
    ]
    together, shipped = found.together.pooled(), found.bundle.pooled()
    return {
        "timesteps": calls,
        "rows": rows,
        "together": json_db(together),
        "bundle": json_db(shipped),
        "unknown": dict(found.unknown),
        "same_weights": found.same_weights,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 4)
