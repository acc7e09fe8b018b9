"""Other quantizers on the same float model: what a user would take instead, measured beside ours.

A peer gets the float ONNX file and network calls of the float trajectory to calibrate on, and gives back something to
call. onnxruntime's quantizer is always there; OpenVINO with NNCF where both are installed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .runtime.errors import InputError
from .runtime.session import Denoiser
from .runtime.signature import Signature
from .runtime.steps import Timestep

Images = npt.NDArray[np.float32]
Predict = Callable[[Images, Timestep], Images]
Call = tuple[Images, Timestep]  # (x [B, C, H, W], timestep)
PEERS = ONNXRUNTIME, NNCF = "onnxruntime", "openvino-nncf"


def available() -> list[str]:
    """The peers that can run here."""
    return [ONNXRUNTIME, *([NNCF] if find_spec("nncf") and find_spec("openvino") else [])]


def quantize(
    peer: str, model: Path, signature: Signature, calls: Sequence[Call], folder: Path, threads: int | None
) -> tuple[Predict, Path]:
    """A peer's 8-bit denoiser of a float ONNX file, and the file that it wrote. Unconditional models only.

    Raises InputError for a model with conditions and for a peer that is not installed.
    """
    if signature.conditions:
        raise InputError(f"peers are calibrated without conditions, and the model has {signature.conditions[0]!r}")
    if peer not in available():
        raise InputError(f"{peer} is not installed", hint=f"here are: {', '.join(available())}")
    if peer == ONNXRUNTIME:
        file = _onnxruntime(model, [_feeds(signature, x, t) for x, t in calls], folder)
        return Denoiser(file, signature, threads=threads), file
    return _nncf(model, signature, calls, folder, threads)


def _feeds(signature: Signature, x: Images, t: Timestep) -> dict[str, npt.NDArray[Any]]:
    return {signature.sample: x, signature.timestep: np.full(len(x), t, np.int64)}


def _onnxruntime(model: Path, feeds: Sequence[dict[str, npt.NDArray[Any]]], folder: Path) -> Path:
    """quantize_static with the operations that pay on the CPU, uint8 activations and int8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._rows, None)

    path = folder / "onnxruntime.onnx"
    quantize_static(
        str(model),
        str(path),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
    )
    return path


def _nncf(
    model: Path, signature: Signature, calls: Sequence[Call], folder: Path, threads: int | None
) -> tuple[Predict, Path]:
    """NNCF's post-training quantization with its defaults, run by OpenVINO on the CPU, all else in float32."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    read = openvino.Core().read_model(model)
    batch = len(calls[0][0])
    data = nncf.Dataset([_feeds(signature, x, t) for x, t in calls])
    quantized = nncf.quantize(read, data, subset_size=len(calls))
    path = folder / "nncf.xml"
    openvino.save_model(quantized, path, compress_to_fp16=False)
    quantized.reshape({signature.sample: [batch, *calls[0][0].shape[1:]], signature.timestep: [batch]})
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(quantized, "CPU", options).create_infer_request()

    def predict(x: Images, t: Timestep) -> Images:
        return np.array(request.infer(_feeds(signature, x, t))[0], np.float32)

    return predict, path.with_suffix(".bin")
