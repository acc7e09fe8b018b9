"""Command lines on a disk that is full after so many bytes, or that cannot make temporary files: one process for all.

The program's argument is a file of JSON: a list of {"words", "limit", "temporary"}. A limit on the size of files stands
for the end of the disk, also for standard output, which is a file. Each command prints a line to standard error:
`limit L code C`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, os, resource, sys, tempfile
from pathlib import Path
import typer.main
from mezzotint.cli.app import app

command = typer.main.get_command(app)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for case in json.loads(Path(sys.argv[1]).read_text()):
    os.dup2(os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    tempfile.tempdir = case["temporary"]
    if case["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["limit"], hard))
    try:
        command.main([str(word) for word in case["words"]], prog_name="mezzotint")
    except SystemExit as left:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print("limit", case["limit"], "code", left.code, file=sys.stderr, flush=True)
"""


def run_accidents(cases: Sequence[dict[str, Any]]) -> tuple[list[str], str]:
    """Run commands with `limit` bytes of disk or `temporary` as the place for temporary files.

    Returns what each wrote to standard error, without its last line `limit L code C`, which has to say code 2; and what
    all wrote to standard output.
    """
    rows = [{"limit": None, "temporary": None, **case, "words": [str(w) for w in case["words"]]} for case in cases]
    with TemporaryDirectory() as folder:
        file, out = Path(folder) / "cases.json", Path(folder) / "out"
        file.write_text(json.dumps(rows), encoding="utf-8")
        command = [sys.executable, "-c", PROGRAM, str(file), str(out)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        printed = out.read_text(encoding="utf-8")
    said = done.stderr.split("limit ")
    endings = [text.partition("\n") for text in said[1:]]
    assert [line for line, _, _ in endings] == [f"{row['limit']} code 2" for row in rows], done.stderr
    texts = [said[0], *(rest for _, _, rest in endings)][: len(rows)]
    return texts, printed


def full_disk(limits: Sequence[int], words: Sequence[object]) -> None:
    """Run one command on disks that are full after `limits` bytes: each time one error of ours says so."""
    texts, printed = run_accidents([{"limit": limit, "words": words} for limit in limits])
    for text in texts:
        assert "Traceback" not in text and text.count("error: the disk is full") == 1, text
    assert printed == ""
