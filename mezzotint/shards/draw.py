"""`mezzotint sample`: images written into one file, or many images into a folder of shards."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import claim_file
from mezzotint.runtime.bounds import MOST_FILE_BYTES
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.engine import EngineUsage
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.options import SamplingOptions

from ..cluster.connection import piece_threads
from ..io import images
from ..text.report import sample_summary
from .shards import ShardOptions, parse_shards, sample_shards

FILES = (".png", ".npy")
OTHER_FILES = (".npz", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".pdf")
"""Endings of file formats that are not written. They are refused: no folder gets such a name by mistake."""


def check_output(
    output: Path | str, *, shard_size: int | None, format: str | None, shards: str | None, cluster: str | None = None
) -> None:
    """Refuse options of folders for a file, and files that cannot be written. None is an option that was left out.

    Raises InputError or OutputError.
    """
    if isinstance(output, str):
        if output.lower().endswith((*FILES, *OTHER_FILES)):
            raise InputError("a file is written to a local path", where=output, hint="give the URL of a folder")
        return
    if output.suffix in FILES:
        folders = {"--shard-size": shard_size, "--format": format, "--shards": shards, "--cluster": cluster}
        for name, value in folders.items():
            if value is not None:
                raise InputError(
                    f"{name} is for folders", where=str(output), hint=f"leave {name} out, or use -o FOLDER"
                )
    if output.suffix in (*FILES, *OTHER_FILES):
        images.check_image_file(output)


def sample_to_path(
    bundle: Bundle,
    output: Path | str,
    n: int,
    options: SamplingOptions,
    shard_options: ShardOptions,
    *,
    shards: str | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Write `output`, a path or the URL of a folder, and return a summary. `shards` is text for `parse_shards`."""
    summary = sample_summary(bundle, output, n, options)
    if isinstance(output, Path) and output.suffix in FILES:
        images.check_image_file(output, bundle.sample_shape)
        if n * math.prod(bundle.sample_shape) * 4 > MOST_FILE_BYTES:
            raise InputError(
                f"{n} images are too many for one file", where=str(output), hint="give a folder: -o FOLDER"
            )
        claim = claim_file(output)
        drawn = bundle.sample_with(
            options, n, threads=threads, progress=lambda done, total: progress("sample", done, total)
        )
        images.save_images(drawn, output, claim=claim)
        return {**summary, "engine": bundle.usage(threads).to_json()}
    if shards is not None:
        shard_options = replace(shard_options, shards=parse_shards(shards, n, shard_options.shard_size))
    if cluster is not None:
        threads = piece_threads(threads)
    result = sample_shards(
        bundle, output, n, options, shard_options, threads=threads, cluster=cluster, progress=progress
    )
    return {
        **summary,
        "format": shard_options.format,
        "shards": result.shards,
        "made": list(result.made),
        "skipped": list(result.skipped),
        "pictures_made": result.pictures,
        "seconds": round(result.seconds, 3),
        "engine": bundle.usage(threads).to_json() if result.made else None,
    }


def sample_rows(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the summary for display: the number of shards instead of their numbers, the engine in one line."""
    shown = {key: len(value) if isinstance(value, list) else value for key, value in summary.items()}
    engine = summary["engine"]
    return {**shown, "engine": "not needed" if engine is None else EngineUsage(**engine).text()}
