"""Other ways to run the same float model: what a user would take instead, measured in the same run.

A peer gets the float ONNX file and network calls of the float trajectory, and returns a network to call:

    onnxruntime            onnxruntime's own quantizer (quantize_static), 8 bits
    openvino-f32           OpenVINO without quantization, in float32
    openvino-bf16          the same with INFERENCE_PRECISION_HINT bf16, where the processor has bfloat16 units
    openvino-nncf          OpenVINO with NNCF's post-training quantization, 8 bits, all else in float32
    openvino-nncf-smooth   the same with model_type TRANSFORMER, which turns NNCF's SmoothQuant on

onnxruntime's quantizer is always there, the others where their packages are installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.engine import EnginePrecision
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.providers.names import find_engine
from mezzotint.runtime.providers.no_telemetry import without_telemetry
from mezzotint.runtime.providers.openvino import OPENVINO, load_openvino
from mezzotint.runtime.sampling.guidance import Network
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Images, Signature, Timestep

Call = tuple[Images, Timestep, Mapping[str, npt.NDArray[Any]]]  # (x [B, C, H, W], timestep, conditions [B, ...])
Feed = dict[str, npt.NDArray[Any]]
ONNXRUNTIME, NNCF, NNCF_SMOOTH = "onnxruntime", "openvino-nncf", "openvino-nncf-smooth"
OPENVINO_F32, OPENVINO_BF16 = "openvino-f32", "openvino-bf16"
PEERS = (ONNXRUNTIME, OPENVINO_F32, OPENVINO_BF16, NNCF, NNCF_SMOOTH)


@dataclass(frozen=True)
class _Job:
    """What a peer starts from: the float file, its signature, feeds of the float trajectory, a folder to write into."""

    model: Path
    signature: Signature
    feeds: Sequence[Feed]
    folder: Path
    threads: int | None


def available() -> list[str]:
    """Return the peers that can run here."""
    openvino = find_spec("openvino") is not None
    nncf = openvino and find_spec("nncf") is not None
    needs = {ONNXRUNTIME: True, OPENVINO_F32: openvino, OPENVINO_BF16: openvino, NNCF: nncf, NNCF_SMOOTH: nncf}
    return [peer for peer in PEERS if needs[peer]]


def prepare_peer(
    peer: str, model: Path, signature: Signature, calls: Sequence[Call], folder: Path, threads: int | None
) -> tuple[Network, Path]:
    """Return a peer's network for a float ONNX file, and the file that it runs from.

    Raises InputError for a peer that is not installed, for no calls, for calls without the model's conditions, and for
    bfloat16 on a processor that has none; the peer's own errors pass through.
    """
    if peer not in available():
        raise InputError(f"{peer} is not installed", hint=f"installed are: {', '.join(available())}")
    if not calls:
        raise InputError("there are no calls to calibrate on", hint="record some on the float trajectory")
    for _, _, conditions in calls:
        if set(conditions) != set(signature.conditions):
            raise InputError(
                f"calls to calibrate on have conditions {sorted(conditions)}, the model {sorted(signature.conditions)}",
                hint="record them with the calls",
            )
    feeds = _feeds(Denoiser(model, signature, threads=threads), calls)
    return _PREPARE[peer](_Job(model, signature, feeds, folder, threads))


def _feeds(net: Denoiser, calls: Sequence[Call]) -> list[Feed]:
    """Return the graph's inputs in each call, the timestep in the unit, the type and the shape that the graph wants."""
    signature = net.signature
    dtype, shape = net.inputs[signature.timestep]
    feeds = []
    for x, t, conditions in calls:
        size = tuple(d if isinstance(d, int) else len(x) for d in shape)
        time = np.full(size, signature.network_time(t), dtype)
        feeds.append({signature.sample: x, signature.timestep: time, **conditions})
    return feeds


def _onnxruntime(job: _Job) -> tuple[Network, Path]:
    """quantize_static with the operations that pay on the CPU, uint8 activations and int8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(job.feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._rows, None)

    path = job.folder / "onnxruntime.onnx"
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises its own preprocessing, on the root logger
    try:
        quantize_static(
            str(job.model),
            str(path),
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        )
    finally:
        logging.disable(level)
    return Denoiser(path, job.signature, threads=job.threads), path


def _openvino_f32(job: _Job) -> tuple[Network, Path]:
    return _on_openvino(job, job.model, "f32"), job.model


def _openvino_bf16(job: _Job) -> tuple[Network, Path]:
    """OpenVINO converts the weights when it compiles: the file stays the float one."""
    return _on_openvino(job, job.model, "bf16"), job.model


def _nncf(job: _Job, **options: Any) -> tuple[Network, Path]:
    """NNCF's post-training quantization, run by OpenVINO on the CPU, all else in float32."""
    openvino, _ = load_openvino()
    nncf = _load_nncf()
    logging.getLogger("nncf").setLevel(logging.ERROR)
    graph = openvino.Core().read_model(job.model)
    with redirect_stdout(StringIO()):  # its progress bars, which are no part of our output
        quantized = nncf.quantize(graph, nncf.Dataset(list(job.feeds)), subset_size=len(job.feeds), **options)
    path = job.folder / "nncf.xml"
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return _on_openvino(job, path, "f32"), path.with_suffix(".bin")


def _nncf_smooth(job: _Job) -> tuple[Network, Path]:
    return _nncf(job, model_type=_load_nncf().ModelType.TRANSFORMER)


def _load_nncf() -> Any:
    with without_telemetry():
        import nncf
    return nncf


def _on_openvino(job: _Job, file: Path, precision: EnginePrecision) -> Network:
    """Return OpenVINO's network of a file, with one precision for what is float; as bundles run on it."""
    return Denoiser(file, job.signature, threads=job.threads, engine=find_engine(OPENVINO, precision=precision))


_PREPARE: dict[str, Callable[[_Job], tuple[Network, Path]]] = {
    ONNXRUNTIME: _onnxruntime,
    OPENVINO_F32: _openvino_f32,
    OPENVINO_BF16: _openvino_bf16,
    NNCF: _nncf,
    NNCF_SMOOTH: _nncf_smooth,
}
