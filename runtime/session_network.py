"""A session of onnxruntime as a network, and the count of the nodes that its provider really runs.

onnxruntime runs what a provider does not take on the CPU provider, and says nothing. Here these nodes are counted, a
warning tells them, and a provider that takes no node at all is an error.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine import EngineUsage, TensorInfo
from .errors import EngineError, EngineFallback, InputError

_SHOWN = 5  # operations named in a message
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class SessionNetwork:
    """A session as a `EngineNetwork`; `refusals` are the exceptions of a call that onnxruntime refuses."""

    def __init__(self, session: Any, usage: EngineUsage, refusals: tuple[type[Exception], ...]) -> None:
        self.session = session
        self.usage = usage
        self.inputs = {value.name: info_of(value) for value in session.get_inputs()}
        self.outputs = {value.name: info_of(value) for value in session.get_outputs()}
        self._refusals = refusals

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], output: str, out: npt.NDArray[np.float32]) -> None:
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(output, "cpu", 0, np.float32, list(out.shape), out.ctypes.data)
        try:
            self.session.run_with_iobinding(binding)
        except self._refusals as error:
            raise InputError(f"onnxruntime refused the call: {error}") from error


def info_of(value: Any) -> TensorInfo:
    """Return what onnxruntime says of an input or an output."""
    dtype = _DTYPES.get(value.type)
    return TensorInfo(value.type, None if dtype is None else np.dtype(dtype), tuple(value.shape))


def with_nodes(usage: EngineUsage, session: Any, where: str) -> EngineUsage:
    """Return the usage with the nodes of each provider, counted in the graph that onnxruntime divided.

    Warns with `EngineFallback` of nodes on another provider than `usage.device`. Raises EngineError where it takes
    none, and for an onnxruntime that does not tell.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise EngineError(
            f"{usage.library} does not tell which nodes a provider runs",
            where=usage.device,
            hint="install a newer one: pip install --upgrade onnxruntime",
        )
    taken = [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]
    return counted(usage, taken, where)


def counted(usage: EngineUsage, taken: list[tuple[str, str]], where: str) -> EngineUsage:
    """Do the work of `with_nodes` for nodes as pairs (provider, operation)."""
    nodes = Counter(provider for provider, _ in taken)
    fallback = Counter(operation for provider, operation in taken if provider != usage.device)
    count, total = sum(fallback.values()), len(taken)
    most = ", ".join(f"{operation} x{n}" for operation, n in fallback.most_common(_SHOWN))
    if count == total:
        raise EngineError(
            f"{usage.device} takes none of the model's {total} nodes: all would run on the CPU provider ({most})",
            where=where,
            hint="compile with a --target that the engine supports, or leave --provider out",
        )
    if count:
        what = f"{count} of {total} nodes run on the CPU provider, and not on {usage.device}: {most}"
        warnings.warn(what, EngineFallback, stacklevel=6)
    return replace(usage, nodes=dict(nodes), fallback=dict(fallback))
