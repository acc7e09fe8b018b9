"""Runs the examples of a page in docs/ as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# file: (\S+)\n")
PROGRAMS = {"mezzotint": ["-m", "mezzotint"], "pytest": ["-m", "pytest", "-q", "-p", "no:cacheprovider"]}


def examples(page: str) -> Iterator[tuple[str, str]]:
    """(kind, text) of the blocks that are meant to be run: those marked as text are not."""
    for kind, text in BLOCK.findall(page):
        if kind != "text":
            yield kind, text


def run(page: str, folder: Path, root: Path) -> int:
    """Write the files of a page and run its commands, in its order; returns how many commands there were."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    commands = []
    for kind, text in examples(page):
        if place := FILE.match(text):
            (folder / place[1]).write_text(text[place.end() :], encoding="utf-8")
            continue
        assert kind in ("python", "sh"), f"a block of {kind} belongs to a file, or is marked as text"
        lines = [["-c", text]] if kind == "python" else [words_of(line) for line in text.splitlines()]
        for words in lines:
            commands.append(words)
            done = subprocess.run(
                [sys.executable, *words],
                check=False,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return len(commands)


def words_of(line: str) -> list[str]:
    program, *rest = shlex.split(line)
    return [*PROGRAMS[program], *rest]
