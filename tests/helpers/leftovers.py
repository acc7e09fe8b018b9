"""Stages as other processes leave them: of a process that has ended, one that runs, or one of another machine."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mezzotint.compiler.stages import OWNER, PREFIX, Owner


def ended_process() -> int:
    """The number of a process that has ended."""
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    return ended.pid


def leave_stage(target: Path, /, **owner: Any) -> Path:
    """Make the stage of an ended process for a target; `owner` replaces what its owner's file says."""
    token = secrets.token_hex(8)
    folder = target.parent / f"{PREFIX}{token}"
    folder.mkdir(parents=True)
    facts = {**asdict(Owner.of_this_process(token, target.name)), "pid": ended_process(), **owner}
    (folder / OWNER).write_text(json.dumps(facts), encoding="utf-8")
    (folder / "half").write_bytes(b"half")
    return folder
