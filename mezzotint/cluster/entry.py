"""What Ray runs in a worker. It travels by value, because a worker need not find Mezzotint before it has run.

As in io/children.py, nothing is imported from the current folder, and Mezzotint is that of the driver's own files where
the machine has them, otherwise the one that is installed there.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Start(NamedTuple):
    """How a worker begins: the file of the package, and folders to drop from the module path and to add to it."""

    package: str
    dropped: tuple[str, ...]
    added: tuple[str, ...]


def enter(start: tuple[str, tuple[str, ...], tuple[str, ...]], key: str, references: list[Any], piece: bytes) -> Any:
    """Perform one piece: `mezzotint.cluster.tasks.perform`. `start` is a plain `Start`, `references` the work's one.

    Every import is inside: the function is pickled by its code.
    """
    import sys
    from importlib import import_module
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    name = "mezzotint"
    package, dropped, added = start
    if name not in sys.modules:
        sys.path[:] = [entry for entry in sys.path if entry and entry not in dropped]
        spec = spec_from_file_location(name, package) if Path(package).is_file() else None
        if spec is not None and spec.loader is not None:
            module = sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(module)
    sys.path.extend(folder for folder in added if folder not in sys.path)
    return import_module(f"{name}.cluster.tasks").perform(key, references[0], piece)
