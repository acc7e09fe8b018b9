"""`sampling.json`: the settings that the images of a folder depend on, and their digest, the name of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.bundle.staging import staged_file
from mezzotint.compiler.errors import OutputError
from mezzotint.compiler.stages import PREFIX, remove_leftovers
from mezzotint.runtime.engine import Engine
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.sampling.condition_network import ConditionNetwork
from mezzotint.runtime.sampling.guidance import Conditions, checked_rows
from mezzotint.runtime.session import CPU_ENGINE

from ..cluster.record import MachineRecord
from ..io.files import replacing
from ..io.images import check_place
from .files import Shard

RUN = "sampling.json"
RUN_LAYOUT = 1
COMPUTED = "condition_network"
FLAGS = {"pictures": "-n", "bundle": "BUNDLE", "correction": "--correction or --no-correction"}
"""Settings that are not written as `--name` on the command line."""


class Run:
    """The settings of a run, and the places of its shards."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.where = str(folder)
        self.settings = settings
        self.digest = _digest(settings)
        self.count = shard_count(settings["pictures"], settings["shard_size"])

    def shard(self, number: int) -> Shard:
        s = self.settings
        first = number * s["shard_size"]
        stop = min(first + s["shard_size"], s["pictures"])
        shape = tuple(s["sample_shape"])
        return Shard(self.folder, number, first, stop, s["format"], shape, seed=s["seed"], run=self.digest)

    def is_begun(self) -> bool:
        """Return whether the place holds this run. Raises as `belongs`."""
        return belongs(self.folder, self.settings)

    def text(self) -> str:
        """Return the content of `sampling.json`."""
        return json.dumps({"layout": RUN_LAYOUT, "run": self.digest, "settings": self.settings}, indent=2) + "\n"

    def record(self) -> MachineRecord:
        """Return the record of the machines that drew the shards."""
        return MachineRecord(self.folder, self.digest)

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """Yield where a file of the run can be read; it may not be there. What a killed run left is removed."""
        if self.folder.is_dir():
            remove_leftovers(self.folder)
        yield self.folder / name

    def store(self, name: str, data: bytes) -> None:
        """Write a file of the run; one that is there is replaced. Raises OutputError."""
        with replacing(self.folder / name) as part:
            part.write_bytes(data)

    def announce(self) -> None:
        """Write the settings unless they are there. Raises as `belongs`: another run may have been begun meanwhile."""
        if not belongs(self.folder, self.settings):
            try:
                with staged_file(self.folder / RUN) as (file, _):
                    file.write_text(self.text(), encoding="utf-8", newline="\n")
            except OutputError:
                if not belongs(self.folder, self.settings):  # another command may have announced the same run just now
                    raise


def belongs(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether the folder holds this run. Raises InputError for another run, OutputError for other files."""
    check_place(folder / RUN)
    if not folder.is_dir():
        return False
    before = read_run(folder / RUN)
    if before is None:
        # A killed run, or one on another machine that is writing its settings, may have left a hidden folder.
        if any(not entry.name.startswith(PREFIX) for entry in folder.iterdir()):
            raise OutputError(
                "the folder exists, and no samples were drawn into it", where=str(folder), hint="choose another folder"
            )
        return False
    check_same(before, settings, str(folder / RUN))
    return True


def check_same(before: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Raise InputError for the first setting that differs from that of the run at `where`."""
    was, now = _flat(before), _flat(settings)
    for name in {**was, **now}:
        if was.get(name) != now.get(name):
            flag = FLAGS.get(name, "--" + name.partition(".")[0].replace("_", "-"))
            raise InputError(
                f"the folder was begun with other settings: {name} was {was.get(name)!r} and is {now.get(name)!r} now",
                where=where,
                hint=f"give {flag} as it was to go on, or choose another folder",
            )


def read_run(file: Path) -> dict[str, Any] | None:
    """Return the settings of a run, None where there is no file. Raises InputError for a changed or foreign file."""
    if not file.exists():
        return None
    facts = read_json(file, "the settings of the run", InputError, hint="choose another folder")
    try:
        if facts["layout"] != RUN_LAYOUT:
            raise ValueError(f"layout {facts['layout']!r}, this version of Mezzotint knows {RUN_LAYOUT}")
        settings: dict[str, Any] = facts["settings"]
        if facts["run"] != _digest(settings):
            raise ValueError("it was changed after it was written")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"the settings of a run cannot be read: {error}", where=str(file), hint="choose another folder"
        ) from error
    return settings


def condition_facts(name: str, conditions: Conditions) -> dict[str, Any]:
    """Return the type, the shape and the hash of each array `[rows, ...]`. Raises InputError for others."""
    facts = {}
    for key, array in checked_rows(conditions, name).items():
        digest = sha256()
        for row in array:  # row by row: a copy of the whole array would take its memory again
            digest.update(np.ascontiguousarray(row).tobytes())
        facts[key] = {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": digest.hexdigest()}
    return facts


def engine_facts(engine: Engine) -> dict[str, Any]:
    """Return the settings that name an engine, as its options on the command line; empty for the CPU provider."""
    if engine == CPU_ENGINE:
        return {}
    options = [f"{key}={value}" for key, value in engine.options]
    return {
        "provider": engine.name,
        "provider_option": " --provider-option ".join(options) or None,
        "precision": engine.precision,
    }


def network_facts(network: ConditionNetwork | None) -> dict[str, Any]:
    """Return the setting that names the network which computes conditions; empty for a bundle without one."""
    return {} if network is None else {COMPUTED: network.digest}


def _flat(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return settings by dotted names, without those that are None: runs of older versions lack newer settings."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{above}{name}."))
        elif value is not None:
            flat[above + name] = value
    return flat


def _digest(settings: Mapping[str, Any]) -> str:
    text = json.dumps(_flat(settings), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode()).hexdigest()


def shard_count(n: int, shard_size: int) -> int:
    """Return the number of shards; the last one may be smaller."""
    return -(-n // shard_size)


def numbers_text(numbers: Sequence[int]) -> str:
    """Return `2, 5:8` for 2, 5, 6, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number:
            runs[-1][1] += 1
        else:
            runs.append([number, number + 1])
    return ", ".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in runs)
