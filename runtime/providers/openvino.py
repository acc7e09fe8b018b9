"""OpenVINO as an engine: the package itself, and not its plugin for onnxruntime.

The plugin (onnxruntime-ep-openvino 1.8.1) offers no device on a processor that is not Intel's, takes shapes as the file
leaves them, and hides most properties behind a JSON text; see docs/howto/engines.md for what was measured.

Networks are compiled for the shapes of a call, because OpenVINO is slower where they are open. The two shapes that were
used last are kept: a run has whole batches and a rest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine import Engine, EngineUsage, TensorInfo, model_name, threads_of
from ..errors import EngineError, InputError
from .integer_form import foreign_operation
from .no_telemetry import without_telemetry

OPENVINO = "openvino"
INSTALL = "install or upgrade it: pip install 'mezzotint[openvino]'"
OLDEST = (2026, 3)
SHAPES_KEPT = 2
_THREADS, _PRECISION = "INFERENCE_NUM_THREADS", "INFERENCE_PRECISION_HINT"
# One call at a time, as fast as it goes; threads are not pinned to the cores of other threads of the process; and
# activations are quantized where the graph says so, not wherever a weight is in integers.
CPU_PROPERTIES: dict[str, Any] = {
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": "1",
    "ENABLE_CPU_PINNING": False,
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def load_openvino() -> tuple[Any, str]:
    """Return the package and its version. Raise EngineError where it is not installed, or computes wrongly."""
    if find_spec("openvino") is None:
        raise EngineError("OpenVINO is not installed", hint=INSTALL)
    with without_telemetry():
        import openvino

    version = openvino.get_version().partition("-")[0]
    # Up to 2026.2.1, integer layers of a network in bf16 were wrong by 7.5 dB (on AVX512 with bf16 units, no AMX).
    if tuple(int(number) for number in version.split(".")[:2]) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise EngineError(f"OpenVINO {version} is too old: {oldest} is the oldest that computes right", hint=INSTALL)
    return openvino, version


@dataclass(frozen=True)
class OpenVino(Engine):
    """OpenVINO. The option `device` is its device, CPU when left out; the others are properties of the device."""

    def open(
        self, model: str | Path | bytes, *, threads: int | None = None, profile: Path | None = None
    ) -> OpenVinoNetwork:
        if profile is not None:
            raise EngineError("OpenVINO does not write onnxruntime's profile", hint="profile on --provider cpu")
        threads = threads_of(threads)
        options = dict(self.options)
        device = options.pop("device", "CPU").upper()
        ours = {_PRECISION: "the precision", **({_THREADS: "the threads"} if threads is not None else {})}
        if twice := sorted(ours.keys() & options.keys()):
            raise EngineError(f"{twice[0]} is set by an option and by {ours[twice[0]]}", hint="leave one of them out")
        properties = {**(CPU_PROPERTIES if device == "CPU" else {}), **options, _PRECISION: self.precision or "f32"}
        if threads is not None:
            properties[_THREADS] = threads
        return OpenVinoNetwork(self, model, device, properties)


class OpenVinoNetwork:
    """A graph that OpenVINO runs, as a `EngineNetwork`."""

    def __init__(self, engine: OpenVino, model: str | Path | bytes, device: str, properties: dict[str, Any]) -> None:
        self._openvino, self._version = load_openvino()
        self._core = self._openvino.Core()
        self._device, self._properties = device, properties
        self.usage = self._checked_usage(engine)
        where = model_name(model)
        if operation := foreign_operation(model):
            raise EngineError(
                f"OpenVINO cannot run {operation}: the model is in the integer form of onnxruntime",
                where=where,
                hint="compile it with --target openvino, or run it with --provider cpu",
            )
        try:
            self._graph = self._core.read_model(model if isinstance(model, bytes) else str(model))
        except RuntimeError as error:
            raise InputError(f"OpenVINO cannot open the model: {_reason(error)}", where=where) from error
        self.inputs = {value.any_name: _info(value) for value in self._graph.inputs}
        self.outputs = {value.any_name: _info(value) for value in self._graph.outputs}
        self._lock = Lock()
        self._networks: OrderedDict[Shapes, _Compiled] = OrderedDict()

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], output: str, out: npt.NDArray[np.float32]) -> None:
        """Compute one output into `out`; the first call of new shapes compiles the graph for them."""
        try:
            self._for_shapes({name: array.shape for name, array in feeds.items()}).run(feeds, output, out)
        except RuntimeError as error:
            raise InputError(f"OpenVINO refused the call: {_reason(error)}") from error

    def layers(self, shapes: Mapping[str, tuple[int, ...]]) -> list[dict[str, str]]:
        """Return the nodes that OpenVINO built for these shapes: `name`, and OpenVINO's keys, as `primitiveType`."""
        built = self._for_shapes(shapes).model.get_runtime_model().get_ordered_ops()
        return [
            {"name": node.get_friendly_name(), **{key: value.astype(str) for key, value in node.get_rt_info().items()}}
            for node in built
        ]

    def node_times(self) -> list[NodeTime]:
        """Return the nodes that the last call ran; the engine's option PERF_COUNT must be YES.

        Raises EngineError without it, and before the first call.
        """
        with self._lock:
            last = next(reversed(self._networks.values()), None)
        if last is None or not last.model.get_property("PERF_COUNT"):
            raise EngineError(
                "OpenVINO has no times of nodes", hint="call a network that was opened with PERF_COUNT=YES"
            )
        return last.node_times()

    @property
    def compiled_shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes that the graph is compiled for, those of the last call at the end."""
        with self._lock:
            return [dict(key) for key in self._networks]

    def _for_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> _Compiled:
        key = tuple(sorted(shapes.items()))
        with self._lock:
            if key not in self._networks:
                graph = self._graph.clone()
                graph.reshape({name: list(shape) for name, shape in key})
                self._networks[key] = _Compiled(self._openvino, self._compile(graph))
                while len(self._networks) > SHAPES_KEPT:
                    self._networks.popitem(last=False)
            self._networks.move_to_end(key)
            return self._networks[key]

    def _compile(self, graph: Any) -> Any:
        return self._core.compile_model(graph, self._device, self._properties)

    def _checked_usage(self, engine: OpenVino) -> EngineUsage:
        """Return what OpenVINO uses for these properties, read back from a graph of one operation.

        Raises EngineError for properties and devices that it refuses, and for a precision that it replaces by another,
        which it does without a word.
        """
        opset = self._openvino.opset13
        value = opset.parameter([1], np.float32)
        try:
            compiled = self._compile(self._openvino.Model([opset.relu(value)], [value]))
        except RuntimeError as error:
            names = ", ".join(self._core.available_devices)
            raise EngineError(
                f"OpenVINO refuses the options: {_reason(error)}",
                where=f"device {self._device}",
                hint=f"devices here: {names}; options are properties of the device, as INFERENCE_NUM_THREADS",
            ) from error
        known = set(compiled.get_property("SUPPORTED_PROPERTIES"))
        precision = compiled.get_property(_PRECISION).get_type_name()
        if precision != self._properties[_PRECISION]:
            raise EngineError(
                f"{self._device} would compute in {precision} instead of {self._properties[_PRECISION]}",
                where=str(self._core.get_property(self._device, "FULL_DEVICE_NAME")),
                hint="choose a precision that the device has: `mezzotint doctor` lists them",
            )
        return EngineUsage(
            engine=engine.name,
            library=f"openvino {self._version}",
            device=f"{self._device} {self._core.get_property(self._device, 'FULL_DEVICE_NAME')}",
            threads=int(compiled.get_property(_THREADS)) if _THREADS in known else None,
            precision=precision,
            options={key: str(compiled.get_property(key)) for key in self._properties if key in known},
        )


class NodeTime(NamedTuple):
    """A node that OpenVINO ran: name, type, primitive (as `brgconv_avx512_I8`), and the seconds of one call."""

    name: str
    kind: str
    primitive: str
    seconds: float


class _Compiled:
    """A compiled graph, and its idle requests: each call of a thread takes one."""

    def __init__(self, openvino: Any, model: Any) -> None:
        self.model = model
        self._tensor = openvino.Tensor
        self._idle: list[Any] = []  # list.append and list.pop are atomic

    def run(self, feeds: Mapping[str, npt.NDArray[Any]], output: str, out: npt.NDArray[np.float32]) -> None:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.model.create_infer_request()
        for name, array in feeds.items():
            request.set_tensor(name, self._tensor(array, shared_memory=True))
        request.set_tensor(output, self._tensor(out, shared_memory=True))
        request.infer()
        self._idle.append(request)

    def node_times(self) -> list[NodeTime]:
        return [
            NodeTime(info.node_name, info.node_type, info.exec_type, info.real_time.total_seconds())
            for info in self._idle[-1].get_profiling_info()
            if "EXECUTED" in str(info.status)
        ]


def _info(value: Any) -> TensorInfo:
    """Return a declared tensor. OpenVINO drops the names of open dimensions; the first one counts samples."""
    shape = [d.get_length() if d.is_static else None for d in value.partial_shape]
    if shape and shape[0] is None:
        shape[0] = "batch"
    kind = value.element_type
    try:
        dtype = None if kind.get_type_name() == "bf16" else np.dtype(kind.to_dtype())
    except (RuntimeError, TypeError):
        dtype = None
    return TensorInfo(kind.get_type_name(), dtype, tuple(shape))


def _reason(error: RuntimeError) -> str:
    """Return the line of OpenVINO's message that says something: not the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    relevant = [line for line in lines if line and not line.startswith(("Exception from ", "Check '", "FrontEnd API"))]
    return relevant[0] if relevant else str(error).strip()
