"""The only file that opens onnxruntime: sessions on any of its providers, and a denoiser on any engine.

A `Denoiser` is a graph plus the meaning of its inputs, which call_inputs.py checks before each call. `OnnxRuntime` is
the engine for a provider that onnxruntime has, or that a plugin library adds to it; session_network.py counts what it
takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from .call_inputs import CallInputs, array_kind
from .engine import Engine, EngineNetwork, EngineUsage, model_name, threads_of
from .errors import EngineError, InputError
from .session_network import SessionNetwork, with_nodes
from .signature import Signature, Timestep

TESTED_ONNXRUNTIME = ("1.22.1", "1.23.2", "1.24.4", "1.27.0", "1.31.1", "1.32.0")
"""The fusion rules of onnxruntime decide which graphs become integer kernels, and they change with its versions."""

Level = Literal["all", "basic", "none"]
_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
# onnxruntime's errors have no common base below Exception.
_ORT_ERRORS: tuple[type[Exception], ...] = tuple(
    getattr(_state, name)
    for name in (
        "Fail",
        "InvalidArgument",
        "NoSuchFile",
        "NoModel",
        "InvalidProtobuf",
        "InvalidGraph",
        "NotImplemented",
        "EPFail",
        "EngineError",
        "ModelLoaded",
        "RuntimeException",
    )
)
CPU_PROVIDER = "CPUExecutionProvider"
_registered: set[str] = set()  # plugin libraries; onnxruntime keeps them for the life of the process
_registering = Lock()
_RUN_ERRORS: tuple[type[Exception], ...] = (*_ORT_ERRORS, RuntimeError)  # a failing binding raises the built-in one


def running_version() -> str:
    """Return the version of the loaded onnxruntime."""
    return str(ort.__version__)


def listed_providers() -> list[str]:
    """Return the providers that the installed onnxruntime was built with."""
    return list(ort.get_available_providers())


def untested_version() -> str | None:
    """Return the version of the loaded onnxruntime if no release of its minor version was tested, else None."""
    running = running_version()
    tested = {tuple(version.split(".")[:2]) for version in TESTED_ONNXRUNTIME}
    return None if tuple(running.split(".")[:2]) in tested else running


@dataclass(frozen=True)
class OnnxRuntime(Engine):
    """A provider of onnxruntime.

    provider   its name in onnxruntime
    library    the plugin library that adds it; None for a provider that onnxruntime was built with
    settings   provider options that `precision` stands for
    install    what to do where it is missing
    """

    provider: str = CPU_PROVIDER
    library: str | None = None
    settings: tuple[tuple[str, str], ...] = ()
    install: str | None = None

    def open(
        self, model: str | Path | bytes, *, threads: int | None = None, profile: Path | None = None
    ) -> SessionNetwork:
        session = open_session(model, threads=threads, profile=profile, engine=self)
        asked = EngineUsage(
            engine=self.name,
            library=f"onnxruntime {running_version()}",
            device=self.provider,
            threads=session.get_session_options().intra_op_num_threads or None,
            precision=self.precision or ("f32" if self.settings else "types of the graph"),
            options={**dict(self.settings), **dict(self.options)},
        )
        usage = asked if self.provider == CPU_PROVIDER else with_nodes(asked, session, model_name(model))
        return SessionNetwork(session, usage, _RUN_ERRORS)

    def add_to(self, options: ort.SessionOptions) -> list[Any]:
        """Add the provider to the options of a session; returns the `providers` that the session still needs.

        Raises EngineError where the provider is not there, or has no device.
        """
        settings = {**dict(self.settings), **dict(self.options)}
        if self.library is None:
            if self.provider not in ort.get_available_providers():
                raise EngineError(
                    f"onnxruntime {running_version()} has no {self.provider}", where=self.name, hint=self.install
                )
            return [self.provider] if self.provider == CPU_PROVIDER else [(self.provider, settings), CPU_PROVIDER]
        wanted = settings.pop("device", None)
        devices = [
            device
            for device in plugin_devices(self.provider, self.library)
            if wanted is None or device.device.type.name == wanted.upper()
        ]
        if not devices:
            raise EngineError(
                f"the plugin of {self.provider} is installed and has no {wanted or 'usable'} device on this machine",
                where=self.library,
                hint="`mezzotint doctor` lists the engines that are usable here",
            )
        options.add_provider_for_devices(devices[:1], settings)
        return []


CPU_ENGINE = OnnxRuntime("cpu")


def plugin_devices(provider: str, library: str) -> list[Any]:
    """Return the devices that a plugin library offers for a provider. Raises EngineError for a library that fails."""
    with _registering:
        if library not in _registered:
            try:
                ort.register_execution_provider_library(provider, library)
            except _RUN_ERRORS as error:
                raise EngineError(
                    f"onnxruntime {running_version()} cannot load the plugin: {error}",
                    where=library,
                    hint="install a version of the plugin that fits onnxruntime's",
                ) from error
            _registered.add(library)
    return [device for device in ort.get_ep_devices() if device.ep_name == provider]


def open_session(
    model: str | Path | bytes,
    *,
    threads: int | None = None,
    optimized: Path | None = None,
    profile: Path | None = None,
    level: Level = "all",
    spinning: bool = True,
    engine: OnnxRuntime = CPU_ENGINE,
) -> ort.InferenceSession:
    """Open a session, by default on the CPU. `threads` None is OMP_NUM_THREADS, else onnxruntime's own choice.

    `optimized` names a file for the graph that onnxruntime really built, with its large initializers in `<name>.data`;
    integer kernels can be counted there without a private API. `profile` starts onnxruntime's profiler, which slows
    every call down; `session.end_profiling()` writes the trace to `<profile>_<time>.json` and returns that name.
    Waiting threads spin within a call; without `spinning` they sleep, which is better if other work needs the cores.
    Raises InputError for a model that cannot be opened, EngineError for a provider that cannot be used.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads_of(threads) or 0
    options.inter_op_num_threads = 1  # a denoiser is a chain: parallel branches only compete for the same cores
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.graph_optimization_level = _LEVELS[level]
    # The default, 4, silently rounds the activations of 4-bit MatMuls to int8 (0.8 % error on a random layer).
    # 0 computes the graph as it is: the compiler decides whether activations are quantized.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    # Between calls no thread spins: another session or engine of the process may need the core (measured: 35 ms of CPU
    # time after each call of two threads, and no difference in the time of a call).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{Path(optimized).name}.data"
        )
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    where = model_name(model)
    if engine.provider != CPU_PROVIDER:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = engine.add_to(options)
    try:
        # Without enable_fallback=0 a provider that fails is replaced by the CPU provider.
        session = ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=providers or None, enable_fallback=0
        )
    except _RUN_ERRORS as error:
        raise InputError(f"onnxruntime cannot open the model: {error}", where=where) from error
    if engine.provider not in session.get_providers():
        raise EngineError(
            f"onnxruntime opened the model without {engine.provider}: its libraries or its device cannot be used",
            where=where,
            hint=engine.install,
        )
    return session


class Denoiser:
    """A network called as `denoiser(x, timestep, **conditions)`. It keeps no state between calls; threads may share it.

    `deployed` are the timesteps that the graph's tables have rows for; None means every timestep. `threads` and
    `profile` are those of `open_session`. `engine` opens the network; `usage` is what it really uses.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        signature: Signature,
        *,
        threads: int | None = None,
        deployed: Sequence[Timestep] | None = None,
        profile: Path | None = None,
        engine: Engine = CPU_ENGINE,
    ) -> None:
        self.signature = signature
        self.threads = threads
        self.network: EngineNetwork = engine.open(model, threads=threads, profile=profile)
        declared, outputs = self.network.inputs, self.network.outputs
        self._inputs = CallInputs(signature, declared, deployed)
        expected = {signature.sample, signature.timestep, *signature.conditions}
        if expected != set(declared) or signature.output not in outputs:
            raise InputError(
                f"the model has inputs {sorted(declared)} and outputs {sorted(outputs)}, "
                f"the signature names {sorted(expected)} and {signature.output!r}",
                where=model_name(model),
            )
        used = {**declared, signature.output: outputs[signature.output]}
        for name, value in used.items():
            if value.dtype is None:
                raise InputError(f"the model's {name!r} has type {value.type}, which numpy does not have")
        rank = len(declared[signature.sample].shape)
        for name in (signature.sample, signature.output):
            value = used[name]
            if value.dtype != np.float32 or len(value.shape) != rank or signature.channel_axis >= rank:
                raise InputError(
                    f"{name!r} is {value.type} {list(value.shape)}, expected float32 of the sample's rank, "
                    f"with channels along axis {signature.channel_axis}"
                )
        self._channels_out = outputs[signature.output].shape[signature.channel_axis]

    @property
    def session(self) -> ort.InferenceSession:
        """The session of onnxruntime. Raises EngineError for another engine."""
        if not isinstance(self.network, SessionNetwork):
            raise EngineError(f"{self.usage.engine} is no session of onnxruntime")
        return self.network.session

    @property
    def usage(self) -> EngineUsage:
        """What the network really uses: library, device, threads, precision, and nodes that fell back."""
        return self.network.usage

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in the order of the graph."""
        return tuple(self.network.inputs)

    @property
    def inputs(self) -> Mapping[str, tuple[np.dtype[Any], tuple[int | str | None, ...]]]:
        """dtype and declared shape of each input; an open dimension is a name, or None."""
        return {name: (np.dtype(value.dtype), value.shape) for name, value in self.network.inputs.items()}

    @property
    def channels_out(self) -> int | None:
        """The channels of the prediction, None where the graph leaves them open."""
        return self._channels_out if isinstance(self._channels_out, int) else None

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the graph fixes, or None where it is open."""
        size = self.network.inputs[self.signature.sample].shape[0]
        return size if isinstance(size, int) else None

    def __call__(
        self,
        x: npt.NDArray[np.float32],
        t: Timestep | np.number[Any] | npt.NDArray[Any],
        /,  # so that a condition may have any name
        *,
        out: npt.NDArray[np.float32] | None = None,
        **conditions: npt.NDArray[Any],
    ) -> npt.NDArray[np.float32]:
        """Return the raw prediction, float32 of the shape of `x`, for `x` float32 `[B, ...]` at one timestep.

        The engine reads `x` and writes the result without copies. The result is a new array that belongs to the
        caller, or `out` (C-contiguous float32 of the result's shape).
        Raises InputError, MixedTimesteps or TimestepNotDeployed, all before the network runs.
        """
        feeds = self._inputs.feeds(x, t, conditions)
        axis = self.signature.channel_axis
        shape = (*x.shape[:axis], self.channels_out or x.shape[axis], *x.shape[axis + 1 :])
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise InputError(f"out is {array_kind(out)}, the result is contiguous float32 {list(shape)}")
        try:
            self.network.run(feeds, self.signature.output, out)
        except InputError as error:
            raise type(error)(
                error.what, where=f"x {array_kind(x)}, timestep {t}", hint=error.hint
            ) from error.__cause__
        return out
