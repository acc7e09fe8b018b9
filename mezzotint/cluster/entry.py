"""What Ray runs in a worker. It travels by value, because a worker need not find Mezzotint before it has run.

As in io/children.py, nothing is imported from the current folder, and Mezzotint is that of the driver's own files where
the machine has them, otherwise the one that is installed there.
"""

from __future__ import annotations

from typing import Any


def enter(package: str, dropped: tuple[str, ...], key: str, references: list[Any], piece: bytes) -> Any:
    """Perform one piece: `mezzotint.cluster.tasks.perform`. `references` has the work's one reference.

    Every import is inside: the function is pickled by its code.
    """
    import sys
    from importlib import import_module
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    name = "mezzotint"
    if name not in sys.modules:
        sys.path[:] = [entry for entry in sys.path if entry and entry not in dropped]
        spec = spec_from_file_location(name, package) if Path(package).is_file() else None
        if spec is not None and spec.loader is not None:
            module = sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(module)
    return import_module(f"{name}.cluster.tasks").perform(key, references[0], piece)
