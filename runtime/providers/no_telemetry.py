"""No telemetry: imports that would send figures over the network do not.

`import openvino` sends an event, and keeps a number of the user in the home folder, where the package
openvino_telemetry can be imported; without it OpenVINO and NNCF have stand-ins that do nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGE = "openvino_telemetry"


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Hide openvino_telemetry from what is imported in the meantime."""
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    before = {name: modules.pop(name) for name in list(modules) if name.partition(".")[0] == _PACKAGE}
    modules[_PACKAGE] = None  # an import of it raises ImportError
    try:
        yield
    finally:
        del modules[_PACKAGE]
        modules.update(before)
