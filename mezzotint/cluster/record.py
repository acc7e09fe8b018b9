"""`machines.json`: which machine computed which piece of a run, on which processor, in how many seconds.

It also says what each other kind of processor than the driver's predicts at a fixed network call. It says nothing about
the results, which are the same without it: a run that is continued adds to it.
"""

from __future__ import annotations

import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.staging import staged_file
from mezzotint.runtime.errors import InputError, MezzotintWarning
from mezzotint.runtime.json_text import read_json
from mezzotint.runtime.signature import Timestep

from .placement import Machine, mixed_kinds
from .tasks import Stamp

MACHINES = "machines.json"
MACHINES_LAYOUT = 1
SECONDS_BETWEEN = 5.0  # two writings of the file


class MixedProcessors(MezzotintWarning):
    """Pieces of one run were computed on processors of several kinds."""


class InaccurateProcessor(MezzotintWarning):
    """On a kind of processor that took part in a run the bundle is less accurate than it was accepted to be."""


@dataclass(frozen=True)
class KindCheck:
    """A fixed network call that `machine` made on its kind of processor, beside the driver's on the kind `against`.

    `sqnr_db` is that of the prediction, None without any difference, and `largest_difference` is that of two values.
    `expected_sqnr_db` is what this leaves beside the float model, None where the manifest does not say what was there.
    """

    machine: str
    against: str
    timestep: Timestep
    sqnr_db: float | None
    largest_difference: float
    expected_sqnr_db: float | None
    warning: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "machine": self.machine,
            "against": self.against,
            "timestep": self.timestep,
            "sqnr_db": self.sqnr_db,
            "largest_difference": self.largest_difference,
            "expected_sqnr_db": self.expected_sqnr_db,
            "warning": self.warning,
        }


class MachineRecord:
    """The record in the folder of the run named `run`. `add` writes it now and then, `close` at the end."""

    def __init__(self, folder: Path, run: str) -> None:
        self._file = folder / MACHINES
        self._run = run
        self._machines: dict[str, Machine] = {}
        self._pieces: dict[str, dict[str, Any]] = {}
        self._checks: dict[str, KindCheck] = {}
        self._warnings: list[str] = []
        self._added = self._unwritten = False
        self._written = 0.0
        self._read()

    def add(self, piece: int, stamp: Stamp) -> None:
        """Note who computed a piece. The folder must be that of the run by now. Raises OutputError."""
        name = machine_name(stamp)
        self._machines[name] = stamp.machine
        seconds = round(stamp.seconds, 4)
        self._pieces[str(piece)] = {
            "machine": name,
            "process": stamp.process,
            "threads": stamp.threads,
            "seconds": seconds,
        }
        self._added = self._unwritten = True
        if time.monotonic() - self._written > SECONDS_BETWEEN:
            self._write()

    @property
    def checked(self) -> frozenset[str]:
        """The kinds of processors that the run has checked."""
        return frozenset(self._checks)

    def check(self, kind: str, result: KindCheck) -> None:
        """Note the check of a kind of processor."""
        self._checks[kind] = result
        self._unwritten = True
        if result.warning:
            self._warnings.append(result.warning)

    def close(self) -> None:
        """Write what is not written, and warn of kinds that differ, and of those that are inaccurate.

        Raises OutputError.
        """
        if self._unwritten:
            self._write()
        for warning in self._warnings:
            warnings.warn(InaccurateProcessor(f"{warning}; see {self._file}"), stacklevel=2)
        if self._added and (words := mixed_kinds(self._machines)) is not None:
            warnings.warn(MixedProcessors(f"{words}; see {self._file}"), stacklevel=2)

    def _read(self) -> None:
        """Take what an earlier part of the same run noted; a file of another run, or a damaged one, is replaced."""
        try:
            facts = self._load()
            if facts is not None and (facts["layout"], facts["run"]) == (MACHINES_LAYOUT, self._run):
                for name, fields in facts["machines"].items():
                    features = fields["features"]
                    known = None if features is None else tuple(features)
                    self._machines[name] = Machine(**{**fields, "features": known})
                self._pieces = dict(facts["pieces"])
                self._checks = {kind: KindCheck(**check) for kind, check in facts.get("checks", {}).items()}
        except (InputError, KeyError, TypeError, ValueError, AttributeError):
            self._machines, self._pieces, self._checks = {}, {}, {}

    def _load(self) -> Any:
        return self._load_file(self._file) if self._file.is_file() else None

    @staticmethod
    def _load_file(file: Path) -> Any:
        return read_json(file, "the record of machines", InputError)

    def _write(self) -> None:
        pieces = dict(sorted(self._pieces.items(), key=lambda item: int(item[0])))
        machines = {name: machine.to_json() for name, machine in sorted(self._machines.items())}
        facts: dict[str, Any] = {"layout": MACHINES_LAYOUT, "run": self._run, "machines": machines}
        if self._checks:
            facts["checks"] = {kind: check.to_json() for kind, check in sorted(self._checks.items())}
        facts["pieces"] = pieces
        self._save(json.dumps(facts, indent=1) + "\n")
        self._unwritten, self._written = False, time.monotonic()

    def _save(self, text: str) -> None:
        with staged_file(self._file, force=True) as (file, _):
            file.write_text(text, encoding="utf-8", newline="\n")


def machine_name(stamp: Stamp) -> str:
    """Return the name of a machine in the record: two may have one host name."""
    return f"{stamp.machine.host}:{stamp.node[:8]}"
