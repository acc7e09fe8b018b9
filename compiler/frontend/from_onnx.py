"""Import of an ONNX file as a Program. The weights are streamed to the working folder, never loaded as a whole."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mezzotint.runtime.bundle.model_config import public_config
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Prediction, Signature, TimestepUnit

from ..core.program import Program
from ..core.verify import weights_finite
from ..errors import ModelError, SignatureError
from ..graph import weight_store as store
from ..graph.model_file import read_model
from .batch import settle_batch
from .call_metadata import noted_call
from .channels import split_channels
from .conventions import known_unit, with_known_labels
from .foreign import check_plain
from .half import widen_halves
from .roles import infer_signature
from .sample_shape import settle_channel_axis, settle_sample_shape

_LOG = logging.getLogger("mezzotint")

OLDEST_OPSET = 13  # QuantizeLinear has an axis since then


def import_onnx(
    path: Path,
    folder: Path,
    *,
    schedule: Schedule,
    deployment: Deployment,
    inputs: Mapping[str, str] | None = None,
    output: str | None = None,
    prediction: Prediction | None = None,
    timestep_unit: TimestepUnit | None = None,
    channels: int | None = None,
    channel_axis: int | None = None,
    size: tuple[int, ...] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Program:
    """Return the Program of an ONNX denoiser (opset 13 or later, with or without external data).

    `inputs`, `output`, `prediction` and `timestep_unit` say what cannot be inferred (see `infer_signature`), `channels`
    how many channels the image has. `channel_axis` and `size` are those of the sample, see sample_shape.py. `config` is
    the diffusers configuration of the model that was exported. The schedule is one for that prediction.
    Raises ModelError, SignatureError.
    """
    model = load_onnx(path)
    signature = infer_signature(
        model.graph,
        inputs=inputs,
        output=output,
        prediction=prediction or schedule.prediction,
        timestep_unit=timestep_unit or known_unit(config, schedule) or "steps",
        num_train_timesteps=schedule.num_train_timesteps,
        where=str(path),
    )
    return finish_import(
        model,
        folder,
        signature=with_known_labels(signature, model.graph, config),
        schedule=schedule,
        deployment=deployment,
        channels=channels,
        channel_axis=channel_axis,
        size=size,
        source={"kind": "onnx", "name": path.name, **({} if config is None else {"config": public_config(config)})},
        where=str(path),
    )


def finish_import(
    model: ir.Model,
    folder: Path,
    *,
    signature: Signature,
    schedule: Schedule,
    deployment: Deployment,
    size: tuple[int, ...] | None,
    source: Mapping[str, Any],
    where: str,
    channels: int | None = None,
    channel_axis: int | None = None,
    fx_text: str | None = None,
) -> Program:
    """Return the Program of an imported graph, for both front ends: store the weights, check them, find the shape.

    `size` has the sizes of a sample of any rank beside its batch and channels. The axis of the channels is
    `channel_axis`, else that of the signature, else for a sample of rank 3 the one that the graph reads.
    """
    signature, shape = settle_inputs(model, signature, schedule, deployment, channels, size, where, channel_axis)
    try:
        store.adopt(model, folder)
    except FileNotFoundError as error:
        raise _missing_data(str(error), where) from error
    if name := weights_finite(model):
        raise ModelError(
            f"the weight {name!r} holds NaN or infinite values", where=where, hint="check the checkpoint it came from"
        )
    return Program(
        model=model,
        signature=signature,
        schedule=schedule,
        deployment=deployment,
        shape=shape,
        source={
            **source,
            "parameter_bytes": store.parameter_bytes(model),
            "weights_sha256": _weights_sha(folder),
            **noted_call(model, where),
        },
        fx_text=fx_text,
    )


def settle_inputs(
    model: ir.Model,
    signature: Signature,
    schedule: Schedule,
    deployment: Deployment,
    channels: int | None,
    size: tuple[int, ...] | None,
    where: str,
    channel_axis: int | None = None,
) -> tuple[Signature, tuple[int, ...]]:
    """Edit the batch and the channels of a graph; return its signature and the shape of its sample.

    Raises ModelError, and SignatureError for timesteps that the model's input cannot hold.
    """
    settle_batch(model.graph, signature, where)
    signature = settle_channel_axis(model.graph, signature, channel_axis, where)
    signature = split_channels(model, signature, schedule, channels, where)
    _check_timestep(model.graph, signature, deployment)
    return signature, settle_sample_shape(model.graph, signature, size, where)


def _check_timestep(graph: ir.Graph, signature: Signature, deployment: Deployment) -> None:
    value = next(v for v in graph.inputs if v.name == signature.timestep)
    between = next((t for t in deployment.calls if not isinstance(t, int)), None)
    if between is not None and value.dtype is not None and not value.dtype.is_floating_point():
        raise SignatureError(
            f"{deployment.sampler} calls timestep {between:g}, and the model's timestep input is {value.dtype}",
            where=f"input {signature.timestep}",
            hint="set the scheduler's timestep_spacing to leading or trailing, or export it with a float timestep",
        )


def load_onnx(path: Path) -> ir.Model:
    """Return the model of an ONNX file, external weights still on disk. Raises ModelError if it cannot be compiled."""
    model = read_model(path, oldest_opset=OLDEST_OPSET)
    check_plain(model, str(path))
    if half := widen_halves(model):
        _LOG.info("%s: half precision inside (first at %r) is widened to float32", path, half)
    return model


def _missing_data(file: str, where: str) -> ModelError:
    return ModelError(
        f"the model's external data is missing: {file}",
        where=where,
        hint="put the file next to the .onnx file",
    )


def _weights_sha(folder: Path) -> str:
    sha = hashlib.sha256()
    file = folder / store.WEIGHTS
    if file.exists():
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                sha.update(block)
    return sha.hexdigest()
