"""A command line on a disk that is full after so many bytes, to run in a process of its own."""

from __future__ import annotations

FULL_DISK = """
import json, resource, sys
import typer.main
from mezzotint.cli.app import app

command = typer.main.get_command(app)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
for limit in json.loads(sys.argv[1]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        command.main(sys.argv[2:], prog_name="mezzotint")
    except SystemExit as left:
        print("limit", limit, "code", left.code, file=sys.stderr)
"""
