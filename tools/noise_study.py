"""What the noise correction is worth on the embedded digits: pictures of float and quantized from the same noise.

    python -m tools.noise_study -o out/noise --pictures 5000 --steps 10

For each sampler that adds noise, and for W8A8 and W4A8 (static ranges, weights to nearest), the pictures are drawn by
the float network, by the quantized one, and by the quantized one with its output and then its noise corrected. Printed
as Markdown: the SQNR of epsilon on held-out calls (mean over the calls; with slope and bias alone in brackets), the
Frechet distance to the float network's pictures on features of the digits' classifier, how many are of the same class,
and the PSNR. Everything finished is kept in the folder: run again to go on after a stop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mezzotint import compile_model, open_bundle
from mezzotint.frechet import FeatureNet, Moments, frechet_distance
from mezzotint.io.files import replacing
from mezzotint.progress import shown
from mezzotint.runtime.bundle.bundle import MANIFEST, Bundle
from mezzotint.runtime.compare import psnr_db
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Predict

SAMPLERS = {"ddpm": 0.0, "ddim": 1.0, "euler-ancestral": 0.0}
"""The samplers with noise of their own, and DDIM's eta."""
WEIGHT_BITS = (8, 4)
CHUNK, BATCH = 500, 50
SEED = 7  # of the pictures: others than calibration and fit have seen


def variants(correction: Correction) -> dict[str, Correction | None]:
    """Nothing; the output corrected (slope and bias); and the sampler's noise lessened as well."""
    return {"none": None, "output": replace(correction, excess=np.zeros_like(correction.excess)), "all": correction}


def draw(
    net: Predict, bundle: Bundle, correction: Correction | None, pictures: int, folder: Path, report: Progress
) -> Images:
    """`[pictures, C, H, W]`, in chunks that are files of the folder."""
    found = []
    for first in range(0, pictures, CHUNK):
        file = folder / f"{first:06d}.npy"
        count = min(CHUNK, pictures - first)
        if not (file.is_file() and len(known := np.load(file)) == count):
            known = np.concatenate(
                [_batch(net, bundle, correction, first + k, min(BATCH, count - k)) for k in range(0, count, BATCH)]
            )
            with replacing(file) as part, part.open("wb") as out:
                np.save(out, known)
        found.append(known)
        report(folder.name, first + count, pictures)
    return np.concatenate(found)


def _batch(net: Predict, bundle: Bundle, correction: Correction | None, first: int, count: int) -> Images:
    x = samplers.initial_noise(SEED, (count, *bundle.sample_shape), first=first)
    noise = samplers.seeded_noise(SEED, first=first)
    return samplers.sample(net, x, bundle.schedule, bundle.deployment, noise=noise, correction=correction)


def study(
    folder: Path, sampler: str, bits: int, pictures: int, steps: int, threads: int, parts: list[str], report: Progress
) -> list[dict[str, Any]]:
    """A row for each part of the correction, of one sampler and one width of the weights."""
    home = folder / f"{sampler}-{steps}"
    bundle = _compiled(home / f"w{bits}a8", sampler, bits, steps, threads, report)
    table = bundle.correction
    assert table is not None
    exact = Denoiser(home / "float.onnx", bundle.signature, threads=threads)
    reference = draw(exact, bundle, None, pictures, home / "float", report)
    features = FeatureNet(threads=threads)
    wanted: Moments = features.moments(reference)
    rows = []
    sqnr = _sqnr(bundle.manifest.noise["shares"])
    for part, correction in variants(table).items():
        if parts and part not in parts:
            continue
        name = f"w{bits}a8 {part}".replace(" ", "-")
        mine = draw(bundle.denoiser(threads), bundle, correction, pictures, home / name, report)
        psnr = psnr_db(np.clip(reference, -1, 1), np.clip(mine, -1, 1), peak=2.0)
        rows.append(
            {
                "sampler": sampler,
                "weights": bits,
                "correction": part,
                "sqnr": sqnr["none" if part == "none" else "kept"],
                "frechet": frechet_distance(wanted, features.moments(mine)),
                "agreement": features.agreement(reference, mine),
                "psnr_db_median": float(np.median(psnr)),
                "psnr_db_p10": float(np.percentile(psnr, 10)),
            }
        )
    return rows


def _compiled(target: Path, sampler: str, bits: int, steps: int, threads: int, report: Progress) -> Bundle:
    if (target / MANIFEST).is_file():
        return open_bundle(target)
    return compile_model(
        "digits",
        target,
        recipe="d2-dpm-gated",
        settings={"choose_scales.weight_bits": bits},
        sampler=sampler,
        eta=SAMPLERS[sampler],
        steps=steps,
        threads=threads,
        export=target.parent / "float.onnx",
        force=True,
        progress=report,
    )


def _sqnr(shares: Mapping[str, float]) -> dict[str, str]:
    """Mean dB over the calls; the noise of the sampler does not touch epsilon."""
    parts = f"slope {shares['slope']:.2f}, bias {shares['bias']:.2f}"
    return {"none": f"{shares['none']:.2f}", "kept": f"{shares['kept']:.2f} ({parts})"}


def table_of(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| sampler | weights | correction | epsilon, dB | Frechet | same class | PSNR median | 10th percentile |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['sampler']} | W{row['weights']}A8 | {row['correction']} | {row['sqnr']} | {row['frechet']:.4f} | "
            f"{row['agreement']:.4f} | {row['psnr_db_median']:.2f} | {row['psnr_db_p10']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder that keeps bundles and pictures")
    parser.add_argument("--pictures", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), default=list(SAMPLERS))
    parser.add_argument("--bits", nargs="+", type=int, choices=list(WEIGHT_BITS), default=list(WEIGHT_BITS))
    parser.add_argument("--parts", nargs="*", default=[], help="only these parts of the correction")
    given = parser.parse_args(arguments)
    rows = []
    try:
        with shown() as report:
            for sampler in given.samplers:
                for bits in given.bits:
                    sizes = given.pictures, given.steps, given.threads
                    rows += study(given.output, sampler, bits, *sizes, given.parts, report)
    except MezzotintError as error:
        Console(stderr=True).print(str(error), style="red", markup=False)
        return 2
    print(table_of(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
