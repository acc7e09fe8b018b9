"""Thousands of pictures into a folder, shard by shard: can be stopped, resumed, and shared among machines.

    FOLDER/sampling.json            the settings that the pictures depend on, and their digest, the name of the run
    FOLDER/shard_00000.npz ...      see shard_files.py

Picture i depends on the seed and on i only, so that any shard can be made again alone and has the same bytes. Batches
begin with the shards, and the batch size is no setting of a run: it changed no bit of a picture (digits at float, w8a8,
w8a8-steps and w4a8, ddim and ddpm, batches of 1, 4, 5, 15 and 16, one thread and two; onnxruntime 1.31 on x86-64).
onnxruntime promises neither this nor the same bits on another CPU or in another version: who compares bytes among
machines has to give them the same of all three.

Memory: one shard's pictures and one batch, however many shards there are. Conditions are the exception: they are
handed over whole (an .npz cannot be read by rows), and each batch gets its rows.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.compiler.bundle.staging import remove_stale
from mezzotint.compiler.core.pipeline import Progress, silent
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.errors import InputError

from ..io.pictures import Images, check_channels
from ..text.report import sample_summary
from .files import FORMATS, Damaged, Foreign, Index, Shard
from .run import RUN, Run, belongs, described, ranges, read_run, shard_count

SHARD_SIZE = 256
Conditions = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Drawn:
    """What a call of `sample_to_folder` did: shards by number, pictures that were made, seconds."""

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
    shard_size: int = SHARD_SIZE,
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
    progress: Progress = silent,
    **options: Any,
) -> Drawn:
    """Pictures 0 .. n - 1 of `seed` in shards of `shard_size`; what is there and whole is left, so that it can go on.

    `format` is "npz" (float32, the model's range) or "png" (8 bits; 1 or 3 channels). `shards` are the numbers to make,
    all when left out; with `force` they are made again. A shard that is damaged is made again in any case. The other
    options are those of `Bundle.sample`, `conditions` `[n, ...]` or `[1, ...]`; further ones may be numbers, text or
    mappings of arrays like the conditions. Nothing is written before the first shard is drawn.

    Raises InputError for settings that cannot be, and for others than those of the run in the folder; OutputError
    where the folder is something else or cannot be written.
    """
    folder, n, shard_size, seed = Path(folder), int(n), int(shard_size), int(seed)
    if n < 1 or shard_size < 1 or batch < 1 or seed < 0:
        what = f"{n} pictures of seed {seed} in shards of {shard_size} and batches of {batch}"
        raise InputError(what, hint="ask for at least one of each")
    if format not in FORMATS:
        raise InputError(f"no format {format!r}", where=str(folder), hint=f"use {' or '.join(FORMATS)}")
    if format == "png":
        check_channels(bundle.sample_shape[0], folder)
    given = {"conditions": conditions or {}, "unconditional": unconditional or {}, **options}
    told = sample_summary(bundle, folder, n, sampler, steps, eta, guidance, seed, correction)
    settings = {
        "bundle": bundle.manifest["digest"],
        "sample_shape": list(bundle.sample_shape),
        "pictures": n,
        "shard_size": shard_size,
        "format": format,
        "seed": seed,
        "sampler": told["sampler"],
        "steps": int(told["steps"]),
        "eta": float(told["eta"]),
        "guidance": float(told["guidance"]),
        "correction": told["correction"],
        **{name: described(name, value, n) for name, value in given.items()},
    }
    run = Run(folder, settings)
    chosen = sorted({int(number) for number in (range(run.count) if shards is None else shards)})
    if wrong := [number for number in chosen if not 0 <= number < run.count]:
        raise InputError(f"there is no shard {ranges(wrong)}", where=str(folder), hint=f"choose among 0:{run.count}")
    started = time.perf_counter()
    missing = _missing(run, chosen, force, progress) if belongs(folder, settings) else chosen
    rest = {"sampler": sampler, "steps": steps, "eta": eta, "guidance": guidance}
    rest |= {"correction": correction, "threads": threads}
    total = sum(len(run.shard(number).index) for number in missing)
    done = 0
    for number in missing:
        shard = run.shard(number)

        def report(here: int, done: int = done) -> None:
            progress("sample", done + here, total)

        images = _draw(bundle, shard, batch, given, rest, report)
        run.announce()
        shard.write(images)
        del images  # before the next shard's are there
        done += len(shard.index)
        progress("sample", done, total)
    skipped = tuple(number for number in chosen if number not in set(missing))
    return Drawn(run.count, tuple(missing), skipped, total, time.perf_counter() - started)


def read_shards(folder: str | Path) -> Iterator[tuple[Index, Images]]:
    """The pictures of a finished run, a shard at a time and in order: numbers int64 `[m]`, float32 `[m, C, H, W]`.

    npz gives what was sampled, png the same to within 1/255. Raises InputError at once where shards are missing, with
    the command that makes them, and on the way where one is damaged.
    """
    folder = Path(folder)
    settings = read_run(folder / RUN)
    if settings is None:
        raise InputError(f"there is no {RUN}", where=str(folder), hint="give a folder that `mezzotint sample` wrote")
    run = Run(folder, settings)
    if missing := [number for number in range(run.count) if not run.shard(number).path.exists()]:
        raise _incomplete(run, missing, f"{len(missing)} of {run.count} shards are missing")
    return _read(run)


def parse_shards(text: str, n: int, shard_size: int) -> tuple[int, ...]:
    """`3`, `3:8` (3 to 7), `:8`, `3:`, or several with commas between, as numbers of shards. Raises InputError."""
    count = shard_count(n, shard_size)
    numbers: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d*)(:?)(\d*)\s*", part)
        if not found or not (found[1] or found[2]):
            raise InputError(f"not shards: {text!r}", where="--shards", hint="the form is 3, or 3:8 for 3 to 7")
        first = int(found[1] or 0)
        stop = int(found[3] or count) if found[2] else first + 1
        if first >= stop or stop > count:
            raise InputError(f"no shards {part.strip()}", where="--shards", hint=f"there are 0:{count}")
        numbers.update(range(first, stop))
    return tuple(sorted(numbers))


def _draw(
    bundle: Bundle,
    shard: Shard,
    batch: int,
    given: Mapping[str, Any],
    rest: Mapping[str, Any],
    report: Callable[[int], None],
) -> Images:
    """A shard's pictures, one batch after the other; `report` hears how many there are, the last only when written."""
    images = np.empty((len(shard.index), *shard.shape), np.float32)
    size = bundle.denoiser(rest["threads"]).fixed_batch or batch
    for start in range(shard.first, shard.stop, size):
        stop = min(start + size, shard.stop)
        here = start - shard.first

        def count(calls: int, of: int, here: int = here, width: int = stop - start) -> None:
            report(here + width * calls // (of + 1))

        rows = {name: _rows(value, start, stop) for name, value in given.items()}
        images[here : stop - shard.first] = bundle.sample(
            stop - start, seed=shard.seed, first=start, batch=size, progress=count, **rest, **rows
        )
    return images


def _rows(value: Any, start: int, stop: int) -> Any:
    """What pictures start .. stop - 1 get of an option."""
    if not isinstance(value, Mapping):
        return value
    return {key: array if len(array) == 1 else array[start:stop] for key, array in value.items()}


def _missing(run: Run, chosen: list[int], force: bool, progress: Progress) -> list[int]:
    """The chosen shards that have to be made. All of them are read, to know."""
    missing = []
    for done, number in enumerate(chosen):
        progress("check shards", done, len(chosen))
        if force:
            remove_stale(run.shard(number).path)
        if force or not run.shard(number).complete():
            missing.append(number)
    progress("check shards", len(chosen), len(chosen))
    return missing


def _read(run: Run) -> Iterator[tuple[Index, Images]]:
    for number in range(run.count):
        yield run.shard(number).index, _whole(run, number)  # no name for it here: it would outlive its turn


def _whole(run: Run, number: int) -> Images:
    try:
        return run.shard(number).load()
    except (Damaged, Foreign) as error:
        raise _incomplete(run, [number], f"shard {number} is not whole: {error}") from error


def _incomplete(run: Run, numbers: list[int], what: str) -> InputError:
    s = run.settings
    words = [f"mezzotint sample BUNDLE -o {run.folder} -n {s['pictures']} --shard-size {s['shard_size']}"]
    words += [f"--{name} {s[name]}" for name in ("format", "seed", "sampler", "steps", "eta", "guidance")]
    words += [f"--{'' if s['correction'] else 'no-'}correction"]
    for name in list(s)[list(s).index("correction") + 1 :]:  # conditions, and what this version may not know
        value = "FILE" if s[name] and isinstance(s[name], Mapping) else s[name]
        words += [f"--{name.replace('_', '-')} {value}"] if value else []
    told = "" if len(numbers) == 1 else f": {ranges(numbers)}"
    return InputError(
        what + told, where=str(run.folder), hint=" ".join([*words, "--shards", ranges(numbers).replace(" ", "")])
    )
