"""Thousands of images in a folder, shard by shard: a run can be stopped, resumed, and shared among machines.

    FOLDER/sampling.json            the settings that the images depend on, and their digest, the name of the run
    FOLDER/shard_00000.npz ...      see files.py

Image i depends on the seed and on i only, so any shard can be drawn again alone and has the same bytes. Batches begin
with the shards. The batch size is no setting of a run, because it changed no bit of an image (digits at float, w8a8,
w8a8-steps and w4a8, ddim and ddpm, batches of 1, 4, 5, 15 and 16, one thread and two; onnxruntime 1.31 on x86-64).
onnxruntime guarantees neither this nor the same bits on another CPU or in another version: to compare bytes among
machines, use the same CPU, version and batch size on all of them.

Memory: one shard's images and one batch, for any number of shards. Conditions are the exception: they are passed whole
(an .npz cannot be read by rows), and each batch takes its rows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.progress import Progress, silent
from mezzotint.runtime.sampling.guidance import Conditions, with_labels
from mezzotint.runtime.sampling.options import SamplingOptions
from mezzotint.runtime.signature import Images

from ..cluster.connection import check_cluster, open_cluster
from ..io.images import check_images
from ..text.report import sample_summary
from .drawing import draw_on_cluster, draw_shard
from .files import SHARD_FORMATS, Damaged, Foreign, Index
from .objects import run_at, settings_at
from .run import (
    COMPUTED,
    RUN,
    Run,
    condition_facts,
    engine_facts,
    network_facts,
    numbers_text,
    shard_count,
)

IMAGES_PER_SHARD = 256


@dataclass(frozen=True)
class ShardOptions:
    """How a folder is divided, and which of its shards a call draws: all of them for None."""

    shard_size: int = IMAGES_PER_SHARD
    format: str = "npz"
    shards: tuple[int, ...] | None = None
    force: bool = False


@dataclass(frozen=True)
class Drawn:
    """The result of `sample_to_folder`: shards by number, the number of images drawn, seconds."""

    shards: int
    made: tuple[int, ...]
    skipped: tuple[int, ...]
    pictures: int
    seconds: float


def sample_to_folder(
    bundle: Bundle,
    folder: str | Path,
    n: int,
    *,
    shard_size: int = IMAGES_PER_SHARD,
    format: str = "npz",
    shards: Iterable[int] | None = None,
    force: bool = False,
    sampler: str | None = None,
    steps: int | None = None,
    eta: float | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 16,
    correction: bool | None = None,
    conditions: Conditions | None = None,
    unconditional: Conditions | None = None,
    threads: int | None = None,
    cluster: str | None = None,
    progress: Progress = silent,
) -> Drawn:
    """Write images 0 .. n - 1 of `seed` in shards of `shard_size`. Complete shards are kept, so a run can be resumed.

    `format` is "npz" (float32, the model's range) or "png" (8 bits; 1 or 3 channels). `shards` are the numbers of the
    shards to draw, all when left out; `force` draws them again. A damaged shard is always drawn again. The other
    options are those of `Bundle.sample`. `folder` may be a URL of fsspec, as s3://bucket/run (io/objects.py). Nothing
    is written before the first shard is drawn. With `cluster`, "local" or an address (cluster/driver.py), shards are
    drawn by its workers, and the folder has the same bytes.

    Raises InputError for impossible settings, and for settings that differ from those of the run in the folder;
    OutputError where the folder holds something else or cannot be written.
    """
    plan = (sampler, steps, eta, guidance)
    options = SamplingOptions(*plan, int(seed), batch, correction, conditions or {}, unconditional or {})
    chosen = None if shards is None else tuple(int(number) for number in shards)
    shard_options = ShardOptions(int(shard_size), format, chosen, force)
    return sample_shards(
        bundle, folder, int(n), options, shard_options, threads=threads, cluster=cluster, progress=progress
    )


@dataclass(frozen=True)
class ShardPlan:
    """What a call draws: the shards of a run that are `missing`; `skipped` are complete. `options` have all rows."""

    run: Run
    options: SamplingOptions
    missing: tuple[int, ...]
    skipped: tuple[int, ...]

    @property
    def images(self) -> int:
        """The number of images that are drawn."""
        return sum(len(self.run.shard(number).index) for number in self.missing)


def plan_shards(
    bundle: Bundle,
    folder: Path | str,
    n: int,
    options: SamplingOptions,
    shard_options: ShardOptions,
    *,
    cluster: str | None = None,
    progress: Progress = silent,
) -> ShardPlan:
    """Return what `sample_shards` draws, after every check that needs no network call. Raises as it does."""
    shard_size, format = shard_options.shard_size, shard_options.format
    if n < 1 or shard_size < 1 or options.batch < 1 or options.seed < 0:
        what = f"{n} images of seed {options.seed} in shards of {shard_size} and batches of {options.batch}"
        raise InputError(what, hint="ask for at least one of each")
    if format not in SHARD_FORMATS:
        raise InputError(f"no format {format!r}", where=str(folder), hint=f"use {' or '.join(SHARD_FORMATS)}")
    if format == "png":
        check_images(bundle.sample_shape, folder)
    if cluster is not None:
        check_cluster(cluster)
    summary = sample_summary(bundle, folder, n, options)
    plan = bundle.plan(options.sampler, options.steps, options.eta, options.guidance)
    computing = bundle.condition_network
    rows, without = with_labels(bundle.signature, plan, options.conditions, options.unconditional, computing=computing)
    options = replace(options, conditions=rows, unconditional=without)
    settings = {
        "bundle": bundle.manifest.digest,
        "sample_shape": list(bundle.sample_shape),
        "pictures": n,
        "shard_size": shard_size,
        "format": format,
        "seed": options.seed,
        "sampler": summary["sampler"],
        "steps": int(summary["steps"]),
        "eta": float(summary["eta"]),
        "guidance": float(summary["guidance"]),
        "correction": summary["correction"],
        "conditions": condition_facts("conditions", options.conditions),
        "unconditional": condition_facts("unconditional", options.unconditional),
        **engine_facts(bundle.engine),
        **network_facts(computing),
    }
    run = run_at(folder, settings)
    chosen = sorted(set(range(run.count) if shard_options.shards is None else shard_options.shards))
    if wrong := [number for number in chosen if not 0 <= number < run.count]:
        what = f"there is no shard {numbers_text(wrong)}"
        raise InputError(what, where=str(folder), hint=f"choose among 0:{run.count}")
    missing = _missing(run, chosen, shard_options.force, progress) if run.is_begun() else chosen
    left = set(missing)
    return ShardPlan(run, options, tuple(missing), tuple(number for number in chosen if number not in left))


def sample_shards(
    bundle: Bundle,
    folder: Path | str,
    n: int,
    options: SamplingOptions,
    shard_options: ShardOptions,
    *,
    threads: int | None = None,
    cluster: str | None = None,
    progress: Progress = silent,
) -> Drawn:
    """Do the work of `sample_to_folder`, for its options as two values."""
    started = time.perf_counter()
    plan = plan_shards(bundle, folder, n, options, shard_options, cluster=cluster, progress=progress)
    run, missing = plan.run, plan.missing
    if cluster is None:
        _draw_here(bundle, run, missing, plan.options, threads, progress)
    elif missing:
        with open_cluster(cluster, threads) as opened:
            draw_on_cluster(opened, bundle, run, missing, plan.options, progress)
    return Drawn(run.count, missing, plan.skipped, plan.images, time.perf_counter() - started)


def _draw_here(
    bundle: Bundle, run: Run, missing: Sequence[int], options: SamplingOptions, threads: int | None, progress: Progress
) -> None:
    """Draw and write shards in this process, one after the other."""
    total = sum(len(run.shard(number).index) for number in missing)
    done = 0
    for number in missing:
        shard = run.shard(number)

        def report(here: int, done: int = done) -> None:
            progress("sample", done + here, total)

        images = draw_shard(bundle, shard, options, threads, report)
        run.announce()
        shard.write(images)
        del images  # before the next shard's images are allocated
        done += len(shard.index)
        progress("sample", done, total)


def read_shards(folder: str | Path) -> Iterator[tuple[Index, Images]]:
    """Yield the images of a finished run, one shard at a time and in order: int64 `[m]`, float32 `[m, C, H, W]`.

    The first array holds the numbers of the images. npz gives the sampled values, png the same to within 1/255. Raises
    InputError at once where shards are missing, with the command that draws them, and later for a damaged shard.
    """
    settings = settings_at(folder)
    if settings is None:
        raise InputError(f"there is no {RUN}", where=str(folder), hint="give a folder that `mezzotint sample` wrote")
    run = run_at(folder, settings)
    if missing := [number for number in range(run.count) if not run.shard(number).exists()]:
        raise _incomplete(run, missing, f"{len(missing)} of {run.count} shards are missing")
    return _read(run)


def parse_shards(text: str, n: int, shard_size: int) -> tuple[int, ...]:
    """Return the numbers in `3`, `3:8` (3 to 7), `:8`, `3:`, or several of these with commas. Raises InputError."""
    count = shard_count(n, shard_size)
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{0,18})(:?)(\d{0,18})\s*", part)
        if not match or not (match[1] or match[2]):
            raise InputError(f"not shards: {text!r}", where="--shards", hint="the form is 3, or 3:8 for 3 to 7")
        first = int(match[1] or 0)
        stop = int(match[3] or count) if match[2] else first + 1
        if first >= stop or stop > count:
            raise InputError(f"no shards {part.strip()}", where="--shards", hint=f"there are 0:{count}")
        numbers.update(range(first, stop))
    return tuple(sorted(numbers))


def _missing(run: Run, chosen: list[int], force: bool, progress: Progress) -> list[int]:
    """Return the chosen shards that have to be drawn. Every chosen shard is read and checked."""
    missing = []
    for done, number in enumerate(chosen):
        progress("check shards", done, len(chosen))
        if force:
            run.shard(number).remove_partial()
        if force or not run.shard(number).complete():
            missing.append(number)
    progress("check shards", len(chosen), len(chosen))
    return missing


def _read(run: Run) -> Iterator[tuple[Index, Images]]:
    for number in range(run.count):
        yield run.shard(number).index, _whole(run, number)  # no local name: it would keep the images of the last turn


def _whole(run: Run, number: int) -> Images:
    try:
        return run.shard(number).load()
    except (Damaged, Foreign) as error:
        raise _incomplete(run, [number], f"shard {number} is not whole: {error}") from error


def _incomplete(run: Run, numbers: list[int], what: str) -> InputError:
    """Return the error for missing shards; its hint is the command that draws them."""
    s = run.settings
    words = [f"mezzotint sample BUNDLE -o {run.where} -n {s['pictures']} --shard-size {s['shard_size']}"]
    words += [f"--{name} {s[name]}" for name in ("format", "seed", "sampler", "steps", "eta", "guidance")]
    words += [f"--{'' if s['correction'] else 'no-'}correction"]
    others = list(s)[list(s).index("correction") + 1 :]  # conditions, and options of later versions
    for name in (other for other in others if other != COMPUTED):
        value = "FILE" if s[name] and isinstance(s[name], Mapping) else s[name]
        words += [f"--{name.replace('_', '-')} {value}"] if value else []
    which = "" if len(numbers) == 1 else f": {numbers_text(numbers)}"
    return InputError(
        what + which,
        where=run.where,
        hint=" ".join([*words, "--shards", numbers_text(numbers).replace(" ", "")]),
    )
