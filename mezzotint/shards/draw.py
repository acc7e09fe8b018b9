"""What `mezzotint sample` does: pictures into one file, or many of them into a folder of shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mezzotint.runtime.bundle.bundle import Bundle, open_bundle
from mezzotint.runtime.errors import InputError

from ..io import pictures
from ..io.settings import load_conditions
from ..text import console
from ..text.report import sample_summary
from .shards import SHARD_SIZE, parse_shards, sample_to_folder

FILES = (".png", ".npy")
OTHER_FILES = (".npz", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".pdf")
"""Endings of what somebody may expect to be written, so that no folder gets such a name by mistake."""


def draw(
    bundle: Path,
    output: Path,
    n: int,
    *,
    conditions: Path | None,
    unconditional: Path | None,
    shard_size: int | None,
    format: str | None,
    shards: str | None,
    force: bool,
    quiet: bool,
    **options: Any,
) -> dict[str, Any]:
    """Write `output` and tell what was done; `options` are those of `Bundle.sample`. Refusals come before sampling."""
    if output.suffix in FILES:
        for name, value in (("--shard-size", shard_size), ("--format", format), ("--shards", shards)):
            if value is not None:
                raise InputError(
                    f"{name} is for folders", where=str(output), hint=f"leave {name} out, or use -o FOLDER"
                )
    if output.suffix in (*FILES, *OTHER_FILES):
        pictures.check_target(output)
    opened = open_bundle(bundle)
    options["conditions"] = None if conditions is None else load_conditions(conditions)
    options["unconditional"] = None if unconditional is None else load_conditions(unconditional)
    told = (options[key] for key in ("sampler", "steps", "eta", "guidance", "seed", "correction"))
    summary = sample_summary(opened, output, n, *told)
    if output.suffix in FILES:
        _draw_file(opened, output, n, quiet, options)
        return summary
    size = SHARD_SIZE if shard_size is None else shard_size
    with console.progress(quiet=quiet) as report:
        drawn = sample_to_folder(
            opened,
            output,
            n,
            shard_size=size,
            format=format or "npz",
            shards=None if shards is None else parse_shards(shards, n, size),
            force=force,
            progress=report,
            **options,
        )
    return {
        **summary,
        "format": format or "npz",
        "shards": drawn.shards,
        "made": list(drawn.made),
        "skipped": list(drawn.skipped),
        "pictures_made": drawn.pictures,
        "seconds": round(drawn.seconds, 3),
    }


def _draw_file(bundle: Bundle, output: Path, n: int, quiet: bool, options: dict[str, Any]) -> None:
    pictures.check_target(output, bundle.sample_shape[0])
    with console.progress(quiet=quiet) as report:
        images = bundle.sample(n, progress=lambda done, total: report("sample", done, total), **options)
    pictures.save(images, output)


def rows(summary: dict[str, Any]) -> dict[str, Any]:
    """The summary for people: how many shards, rather than all their numbers."""
    return {key: len(value) if isinstance(value, list) else value for key, value in summary.items()}
