"""Other quantizers on the same float model: what a user would take instead, measured beside ours.

A peer gets the float ONNX file and network calls of the float trajectory to calibrate on, and gives back something to
call. onnxruntime's quantizer is always there; OpenVINO with NNCF where both are installed. Conditions of a model are
calibrated on as they came with the calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.errors import InputError
from mezzotint.runtime.session import Denoiser
from mezzotint.runtime.signature import Signature, Timestep

Images = npt.NDArray[np.float32]
Predict = Callable[..., Images]
"""`net(x, timestep, **conditions)`."""
Call = tuple[Images, Timestep, Mapping[str, npt.NDArray[Any]]]  # (x [B, C, H, W], timestep, conditions [B, ...])
PEERS = ONNXRUNTIME, NNCF = "onnxruntime", "openvino-nncf"


def available() -> list[str]:
    """The peers that can run here."""
    return [ONNXRUNTIME, *([NNCF] if find_spec("nncf") and find_spec("openvino") else [])]


def quantize(
    peer: str, model: Path, signature: Signature, calls: Sequence[Call], folder: Path, threads: int | None
) -> tuple[Predict, Path]:
    """A peer's 8-bit denoiser of a float ONNX file, and the file that it wrote.

    The calls have one batch size, and NNCF's denoiser takes no other. Raises InputError for a peer that is not
    installed, for no calls, and for calls without the model's conditions; the peer's own errors come as they are.
    """
    if peer not in available():
        raise InputError(f"{peer} is not installed", hint=f"here are: {', '.join(available())}")
    if not calls:
        raise InputError("there are no calls to calibrate on", hint="record some on the float trajectory")
    for _, _, conditions in calls:
        if set(conditions) != set(signature.conditions):
            raise InputError(
                f"calls to calibrate on have conditions {sorted(conditions)}, the model {sorted(signature.conditions)}",
                hint="record them with the calls",
            )
    feeds = _feeds(Denoiser(model, signature, threads=threads), calls)
    if peer == ONNXRUNTIME:
        file = _onnxruntime(model, feeds, folder)
        return Denoiser(file, signature, threads=threads), file
    return _nncf(model, signature, feeds, folder, threads)


def _feeds(net: Denoiser, calls: Sequence[Call]) -> list[dict[str, npt.NDArray[Any]]]:
    """What the graph is fed in each call, the timestep in the type and the shape that it declares."""
    dtype, shape = net.inputs[net.signature.timestep]
    found = []
    for x, t, conditions in calls:
        size = tuple(d if isinstance(d, int) else len(x) for d in shape)
        found.append({net.signature.sample: x, net.signature.timestep: np.full(size, t, dtype), **conditions})
    return found


def _onnxruntime(model: Path, feeds: Sequence[dict[str, npt.NDArray[Any]]], folder: Path) -> Path:
    """quantize_static with the operations that pay on the CPU, uint8 activations and int8 weights per channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self._rows, None)

    path = folder / "onnxruntime.onnx"
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it advises its own preprocessing, on the root logger
    try:
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
    finally:
        logging.disable(level)
    return path


def _nncf(
    model: Path, signature: Signature, feeds: Sequence[dict[str, npt.NDArray[Any]]], folder: Path, threads: int | None
) -> tuple[Predict, Path]:
    """NNCF's post-training quantization with its defaults, run by OpenVINO on the CPU, all else in float32."""
    import nncf
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    read = openvino.Core().read_model(model)
    quantized = nncf.quantize(read, nncf.Dataset(list(feeds)), subset_size=len(feeds))
    path = folder / "nncf.xml"
    openvino.save_model(quantized, path, compress_to_fp16=False)
    first = feeds[0]
    quantized.reshape({name: list(array.shape) for name, array in first.items()})
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    request = openvino.Core().compile_model(quantized, "CPU", options).create_infer_request()

    def predict(x: Images, t: Timestep, **conditions: npt.NDArray[Any]) -> Images:
        time = np.full_like(first[signature.timestep], t)
        given = {signature.sample: x, signature.timestep: time, **conditions}
        return np.array(request.infer(given)[0], np.float32)

    return predict, path.with_suffix(".bin")
