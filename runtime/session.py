"""The only file that opens onnxruntime: sessions on the CPU, and a denoiser that checks its inputs.

A `Denoiser` is a graph plus the meaning of its inputs. It checks each call (dtypes, ranks, sizes, one timestep, one
that the graph's tables have a row for). onnxruntime would report an error about an inner node, or, for a timestep
outside a frozen table, return wrong numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from .arrays import shared_row
from .bounds import MOST_THREADS, check_number
from .errors import InputError, MixedTimesteps, TimestepNotDeployed
from .signature import Signature, Timestep, whole

TESTED_ONNXRUNTIME = ("1.22.1", "1.23.2", "1.24.4", "1.27.0", "1.31.1", "1.32.0")
"""The fusion rules of onnxruntime decide which graphs become integer kernels, and they change with its versions."""

Level = Literal["all", "basic", "none"]
_LEVELS = {
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
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
_RUN_ERRORS: tuple[type[Exception], ...] = (*_ORT_ERRORS, RuntimeError)  # a failing binding raises the built-in one


def running_version() -> str:
    """Return the version of the loaded onnxruntime."""
    return str(ort.__version__)


def untested_version() -> str | None:
    """Return the version of the loaded onnxruntime if no release of its minor version was tested, else None."""
    running = running_version()
    tested = {tuple(version.split(".")[:2]) for version in TESTED_ONNXRUNTIME}
    return None if tuple(running.split(".")[:2]) in tested else running


def open_session(
    model: str | Path | bytes,
    *,
    threads: int | None = None,
    optimized: Path | None = None,
    profile: Path | None = None,
    level: Level = "all",
    spinning: bool = True,
) -> ort.InferenceSession:
    """Open a CPU session. With `threads` None onnxruntime chooses their number.

    `optimized` names a file for the graph that onnxruntime really built, with its large initializers in `<name>.data`;
    integer kernels can be counted there without a private API. `profile` starts onnxruntime's profiler, which slows
    every call down; `session.end_profiling()` writes the trace to `<profile>_<time>.json` and returns that name.
    Without `spinning` waiting threads sleep, which is better if other work needs the cores. Raises InputError for a
    model that cannot be opened.
    """
    if threads is not None and (isinstance(threads, bool) or threads < 1):
        raise InputError(f"{threads!r} threads are not possible", hint="ask for 1 or more, or None")
    check_number("threads", threads, MOST_THREADS)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1  # a denoiser is a chain: parallel branches only compete for the same cores
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 3
    options.graph_optimization_level = _LEVELS[level]
    # The default, 4, silently rounds the activations of 4-bit MatMuls to int8 (0.8 % error on a random layer).
    # 0 computes the graph as it is: the compiler decides whether activations are quantized.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
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
    where = "a model in memory" if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(
            model if isinstance(model, bytes) else str(model), options, providers=["CPUExecutionProvider"]
        )
    except _ORT_ERRORS as error:
        raise InputError(f"onnxruntime cannot open the model: {error}", where=where) from error


class Denoiser:
    """A session called as `denoiser(x, timestep, **conditions)`. It keeps no state between calls; threads may share it.

    `deployed` are the timesteps that the graph's tables have rows for; None means every timestep. `profile` is that of
    `open_session`.
    """

    def __init__(
        self,
        model: str | Path | bytes,
        signature: Signature,
        *,
        threads: int | None = None,
        deployed: Sequence[Timestep] | None = None,
        profile: Path | None = None,
    ) -> None:
        self.signature = signature
        self.threads = threads
        self.session = open_session(model, threads=threads, profile=profile)
        self.deployed = None if deployed is None else frozenset(whole(deployed))
        self._inputs = {value.name: value for value in self.session.get_inputs()}
        outputs = {value.name: value for value in self.session.get_outputs()}
        expected = {signature.sample, signature.timestep, *signature.conditions}
        if expected != set(self._inputs) or signature.output not in outputs:
            raise InputError(
                f"the model has inputs {sorted(self._inputs)} and outputs {sorted(outputs)}, "
                f"the signature names {sorted(expected)} and {signature.output!r}",
                where="a model in memory" if isinstance(model, bytes) else str(model),
            )
        for value in (*self._inputs.values(), outputs[signature.output]):
            if value.type not in _DTYPES:
                raise InputError(f"the model's {value.name!r} has type {value.type}, which numpy does not have")
        for value in (self._inputs[signature.sample], outputs[signature.output]):
            if value.type != "tensor(float)" or len(value.shape) != 4:
                raise InputError(
                    f"{value.name!r} is {value.type} {value.shape}, expected float32 [batch, channels, height, width]"
                )
        self._channels_out = outputs[signature.output].shape[1]

    @property
    def input_names(self) -> tuple[str, ...]:
        """The names of the inputs, in the order of the graph."""
        return tuple(self._inputs)

    @property
    def inputs(self) -> Mapping[str, tuple[np.dtype[Any], tuple[int | str | None, ...]]]:
        """dtype and declared shape of each input; an open dimension is a name, or None."""
        return {name: (np.dtype(_DTYPES[value.type]), tuple(value.shape)) for name, value in self._inputs.items()}

    @property
    def fixed_batch(self) -> int | None:
        """The batch size that the graph fixes, or None where it is open."""
        size = self._inputs[self.signature.sample].shape[0]
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
        """Return the raw prediction, float32 `[B, C, H, W]`, for `x` float32 `[B, C, H, W]` at one timestep.

        onnxruntime reads `x` and writes the result without copies. The result is a new array that belongs to the
        caller, or `out` (C-contiguous float32 of the result's shape).
        Raises InputError, MixedTimesteps or TimestepNotDeployed, all before the network runs.
        """
        sizes: dict[str, int] = {}
        feeds = {self.signature.sample: self._checked(self.signature.sample, x, sizes)}
        if set(conditions) != set(self.signature.conditions):
            raise InputError(
                f"conditions {sorted(conditions)} were given, the model takes {sorted(self.signature.conditions)}"
            )
        for name, value in conditions.items():
            feeds[name] = self._checked(name, value, sizes)
        feeds[self.signature.timestep] = self._timestep(t, x.shape[0])
        channels = self._channels_out if isinstance(self._channels_out, int) else x.shape[1]
        shape = (x.shape[0], channels, *x.shape[2:])
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise InputError(f"out is {_kind(out)}, the result is contiguous float32 {list(shape)}")
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output(self.signature.output, "cpu", 0, np.float32, list(shape), out.ctypes.data)
        try:
            self.session.run_with_iobinding(binding)
        except _RUN_ERRORS as error:
            raise InputError(f"onnxruntime refused the call: {error}", where=f"x {_kind(x)}, timestep {t}") from error
        return out

    def _checked(self, name: str, array: object, sizes: dict[str, int]) -> npt.NDArray[Any]:
        """Return `array` for the input `name`, contiguous. `sizes` collects the sizes of named dimensions of a call."""
        value = self._inputs[name]
        dtype = np.dtype(_DTYPES[value.type])
        expected = f"{dtype} {value.shape}"
        array = self._shared(name, array)
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != len(value.shape):
            raise InputError(f"input {name!r} is {_kind(array)}, expected a numpy array {expected}")
        for axis, (size, declared) in enumerate(zip(array.shape, value.shape, strict=True)):
            known = sizes.setdefault(declared, size) if isinstance(declared, str) else declared
            if size == 0 or (known is not None and size != known):
                raise InputError(
                    f"input {name!r} is {_kind(array)}, expected {expected}",
                    where=f"axis {axis}" + (f", where {declared} is {known}" if isinstance(declared, str) else ""),
                )
        return np.ascontiguousarray(array)

    def _shared(self, name: str, array: object) -> object:
        """Return the one row that all samples share for a condition that the graph declares as a number or one row."""
        shape = self._inputs[name].shape
        serves_all = name in self.signature.conditions and (not shape or shape[0] == 1)
        if not serves_all or not isinstance(array, np.ndarray) or array.ndim != max(len(shape), 1) or not len(array):
            return array
        row = shared_row(array)
        if row is None:
            raise InputError(
                f"the model takes one {name!r} for all samples of a call, and the rows of {_kind(array)} differ",
                hint="call it with one sample, or with the same row for all",
            )
        return row if shape else row.reshape(())

    def _timestep(self, t: object, batch: int) -> npt.NDArray[Any]:
        """Return one timestep in the unit, the dtype and the shape that the graph wants: [], [1] or [batch]."""
        value = self._inputs[self.signature.timestep]
        step = _one_timestep(t, batch)
        dtype = _DTYPES[value.type]
        if not isinstance(step, int) and not np.issubdtype(dtype, np.floating):
            raise InputError(
                f"timestep {step:g} lies between two training timesteps, and the graph's input {value.name!r} is "
                f"{np.dtype(dtype)}",
                hint="compile the model for this sampler, or sample with timestep_spacing leading or trailing",
            )
        if self.deployed is not None and step not in self.deployed:
            near = sorted(sorted(sorted(self.deployed), key=lambda known: abs(known - step))[:2])
            # float32 timesteps of two libraries may differ in the last bits; two rows differ by more.
            if not near or min(abs(known - step) for known in near) > 1e-3:
                raise TimestepNotDeployed(
                    f"timestep {step:g} has no row in this graph's tables; the nearest are "
                    f"{', '.join(f'{known:g}' for known in near)}",
                    hint="sample with the --steps that the graph was compiled for, or compile it for these",
                )
        seen = self.signature.network_time(step)
        if len(value.shape) == 0:
            return np.array(seen, dtype=dtype)
        size = value.shape[0] if isinstance(value.shape[0], int) else batch
        return np.full(size, seen, dtype=dtype)


def _one_timestep(t: object, batch: int) -> Timestep:
    if type(t) is int and t >= 0:  # the usual case, and not a bool
        return t
    array = np.asarray(t)
    if array.dtype.kind not in "iuf" or array.ndim > 1 or array.size not in (1, batch):
        raise InputError(f"the timestep is {_kind(t)}, expected a number, or an array of 1 or {batch} equal ones")
    first = float(array.flat[0])
    if not first >= 0 or not np.isfinite(first):
        raise InputError(f"timestep {first:g} is not a training timestep", hint="timesteps count 0, 1, 2, ...")
    if not bool(np.all(array == first)):
        raise MixedTimesteps(
            f"the batch holds timesteps {sorted(set(array.tolist()))[:4]}; one call has one timestep",
            hint="call once for each timestep",
        )
    return int(first) if first.is_integer() else first


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
