"""New processes: other programs, and Python that never imports from the current folder.

`python -m` and `python -c` look into the current folder first: a `numpy.py` there would run. A child started here has
no entry of the module path that depends on the current folder, starts in the root folder, and takes
`mezzotint` from the files of this process, whichever copy is installed. Entries of PYTHONPATH are kept, as absolute
paths.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

# Nothing but `sys` is loaded before the path is clean: any other import could come from the current folder.
_START = """
import sys
sys.path[:] = [entry for entry in sys.path if entry]
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("mezzotint", sys.argv[1])
package = sys.modules["mezzotint"] = module_from_spec(spec)
spec.loader.exec_module(package)
from importlib import import_module
import_module(sys.argv[2]).main(sys.argv[3])
"""


def run_isolated(module: str, argument: str) -> subprocess.CompletedProcess[str]:
    """Run `main(argument)` of a module of this package in a new process, and return what it wrote."""
    command = [sys.executable, "-c", _START, str(PACKAGE / "__init__.py"), module, argument]
    paths = absolute_paths(os.environ.get("PYTHONPATH", ""))
    return run_program(command, Path(PACKAGE.anchor), environment={**os.environ, "PYTHONPATH": paths})


def run_program(
    command: Sequence[str], folder: Path, seconds: float | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program in a folder, without input, and return what it wrote.

    Raises OSError where it cannot start, TimeoutError where it takes longer than `seconds`.
    """
    try:
        return subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{command[0]} took longer than {seconds:g} seconds") from error


def absolute_paths(paths: str) -> str:
    """Return a PYTHONPATH that does not depend on the current folder, for which an empty entry stands."""
    return os.pathsep.join(str(Path(entry).absolute()) for entry in paths.split(os.pathsep) if entry)
