"""What the pictures of a folder depend on: `sampling.json`, the settings of a run and their digest, which names it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.bundle.staging import staged_file
from mezzotint.compiler.errors import OutputError
from mezzotint.runtime.errors import InputError

from ..io.pictures import check_place
from .files import Shard

RUN = "sampling.json"
LAYOUT = 1
FLAGS = {"pictures": "-n", "bundle": "BUNDLE", "correction": "--correction or --no-correction"}
"""Settings whose place on the command line is not `--name`."""


class Run:
    """Settings, and where the shards that follow from them are."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = settings
        self.digest = _digest(settings)
        self.count = shard_count(settings["pictures"], settings["shard_size"])

    def shard(self, number: int) -> Shard:
        s = self.settings
        first = number * s["shard_size"]
        stop = min(first + s["shard_size"], s["pictures"])
        channels, height, width = s["sample_shape"]
        return Shard(
            self.folder, number, first, stop, s["format"], (channels, height, width), seed=s["seed"], run=self.digest
        )

    def announce(self) -> None:
        """Write the settings, unless they are there; somebody else's may have arrived meanwhile."""
        if not belongs(self.folder, self.settings):
            text = json.dumps({"layout": LAYOUT, "run": self.digest, "settings": self.settings}, indent=2) + "\n"
            with staged_file(self.folder / RUN, force=True) as (file, _):
                file.write_text(text, encoding="utf-8", newline="\n")


def belongs(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds this run already. Raises InputError for another one, OutputError for something else."""
    check_place(folder / RUN)
    if not folder.is_dir():
        return False
    before = read_run(folder / RUN)
    if before is None:
        # A run that was killed, or runs elsewhere, while it wrote the settings may have left a hidden folder.
        if any(not entry.name.startswith(f".{RUN}.partial-") for entry in folder.iterdir()):
            raise OutputError(
                "the folder exists, and no samples were drawn into it", where=str(folder), hint="choose another folder"
            )
        return False
    was, now = _flat(before), _flat(settings)
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            flag = FLAGS.get(name, "--" + name.partition(".")[0].replace("_", "-"))
            raise InputError(
                f"the folder was begun with other settings: {name} was {was.get(name)!r} and is {now.get(name)!r} now",
                where=str(folder / RUN),
                hint=f"give {flag} as it was to go on, or choose another folder",
            )
    return True


def read_run(file: Path) -> dict[str, Any] | None:
    """The settings of a run, None where there are none. Raises InputError for what was changed or is not ours."""
    if not file.exists():
        return None
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["layout"] != LAYOUT:
            raise ValueError(f"layout {facts['layout']!r}, this version of Mezzotint knows {LAYOUT}")
        settings: dict[str, Any] = facts["settings"]
        if facts["run"] != _digest(settings):
            raise ValueError("it was changed after it was written")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the settings of a run cannot be read: {error}", where=str(file), hint="choose another folder"
        ) from error
    return settings


def described(name: str, value: Any, n: int) -> Any:
    """An option as JSON; of arrays `[n or 1, ...]` the type, the shape and the hash."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)  # 7 and 7.0 are one setting
    if value is None or isinstance(value, (bool, str)):
        return value
    if not isinstance(value, Mapping):
        raise InputError(f"{name} is {type(value).__name__}", hint="give a number, a text, or arrays by name")
    found = {}
    for key, array in value.items():
        shape = np.shape(array)
        if len(shape) == 0 or shape[0] not in (1, n) or np.asarray(array).dtype.hasobject:
            raise InputError(f"{name} {key!r} has shape {list(shape)}", hint=f"give numbers [{n}, ...] or [1, ...]")
        digest = sha256()
        for row in np.asarray(array):  # by rows, as a copy of all would take memory again
            digest.update(np.ascontiguousarray(row).tobytes())
        found[key] = {"dtype": np.asarray(array).dtype.str, "shape": list(shape), "sha256": digest.hexdigest()}
    return found


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Settings by dotted names; what is None was left out, as older runs may leave out what they did not know."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found.update(_flat(value, f"{above}{name}."))
        elif value is not None:
            found[above + name] = value
    return found


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(_flat(settings), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


def shard_count(n: int, shard_size: int) -> int:
    """How many shards there are; the last one may be smaller."""
    return -(-n // shard_size)


def ranges(numbers: Sequence[int]) -> str:
    """`2, 5:8` for 2, 5, 6, 7."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1][1] += 1
        else:
            found.append([number, number + 1])
    return ", ".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in found)
