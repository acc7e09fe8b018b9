"""A network beside the denoiser: called with arrays by the names of its inputs, it returns all outputs by name."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError
from .session import open_session
from .session_network import info_of


class ComponentNetwork:
    """The ONNX file of a component, on onnxruntime's CPU provider. It opens with the first call."""

    def __init__(self, file: Path, *, threads: int | None = None) -> None:
        self.file, self.threads = file, threads

    @cached_property
    def session(self) -> Any:
        """The session. Raises InputError for a file that cannot be opened."""
        return open_session(self.file, threads=self.threads)

    @cached_property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        """The types of the inputs, by name."""
        return {value.name: np.dtype(info_of(value).dtype) for value in self.session.get_inputs()}

    def __call__(self, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Return all outputs. Integers and booleans are converted to the input's type, floats must be float32.

        Raises InputError for inputs that are missing, unknown or of other types and shapes than the graph's.
        """
        if unknown := [name for name in arrays if name not in self.inputs]:
            raise InputError(
                f"the graph has no input {unknown[0]!r}",
                where=str(self.file),
                hint=f"its inputs are: {', '.join(self.inputs)}",
            )
        if missing := [name for name in self.inputs if name not in arrays]:
            raise InputError(f"the input {missing[0]!r} is not given", where=str(self.file))
        feeds = {}
        for name, array in arrays.items():
            kind = self.inputs[name]
            if array.dtype != kind and (array.dtype.kind == "f" or kind.kind == "f"):
                raise InputError(f"the input {name!r} is {array.dtype}, the graph takes {kind}", where=str(self.file))
            feeds[name] = np.ascontiguousarray(array, kind)
        names = [value.name for value in self.session.get_outputs()]
        try:
            return dict(zip(names, self.session.run(names, feeds), strict=True))
        except Exception as error:  # onnxruntime's errors have no common base
            line = (str(error).splitlines() or [""])[0][:300]
            sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise InputError(f"the component cannot run: {line}", where=f"{self.file}: {sizes}") from error
