"""diffusers model -> torch.export (an FX graph) -> ONNX by the dynamo exporter -> Program.

Checked at every import: the exported graph holds as many parameter bytes as the module, and its outputs agree with
torch at three timesteps.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from ..runtime.deployment import Deployment
from ..runtime.schedule import Schedule
from ..runtime.signature import Signature
from .errors import ModelError
from .execute import Executor
from .import_onnx import finish_import
from .program import Program
from .verify import relative_difference

OPSET = 21
OUTPUT = "out_sample"
PARITY = 2e-3  # of the largest output: float32 kernels of two libraries, some hundred layers deep
_SUPPORTED = ("UNet2DModel", "UNet2DConditionModel")


class _Denoiser(torch.nn.Module):
    """A diffusers model behind positional inputs, as torch.export wants them."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        named: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
        added = {n: named.pop(n) for n in ("text_embeds", "time_ids") if n in named}
        if added:
            named["added_cond_kwargs"] = added
        return self.model(**named, return_dict=False)[0]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Example:
    """Inputs by name, and which of their dimensions stay open."""

    tensors: dict[str, torch.Tensor]
    batch: Any
    multiple: int


def load_model(folder: Path) -> torch.nn.Module:
    """A diffusers UNet from a model folder (config.json and weights), in float32, in eval mode."""
    import diffusers

    config_file = folder / "config.json"
    try:
        name = json.loads(config_file.read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError) as error:  # the last for JSON that is no object
        raise ModelError(
            f"cannot read the model's configuration: {error}", where=str(config_file), hint="download the model again"
        ) from error
    if name not in _SUPPORTED:
        raise _unsupported(str(name), str(config_file))
    diffusers.logging.set_verbosity_error()
    try:
        model = getattr(diffusers, name).from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    except Exception as error:  # diffusers and safetensors raise many kinds for missing or truncated weights
        raise ModelError(
            f"diffusers cannot load the model: {str(error).splitlines()[0]}",
            where=str(folder),
            hint="check that config.json and the weights belong together and are complete",
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def import_folder(path: Path, folder: Path, **options: Any) -> Program:
    """Like `import_torch`, for a diffusers model folder; torch's copy of the weights is gone before onnxruntime's
    comes, so that only one of them is in memory."""
    reading = _read(load_model(path), options["schedule"], options["deployment"], options.get("size"), str(path))
    return _finish(reading, folder, **options)


def import_torch(
    model: torch.nn.Module,
    folder: Path,
    *,
    schedule: Schedule,
    deployment: Deployment,
    size: tuple[int, int] | None = None,
    name: str = "module",
    threads: int | None = None,
) -> Program:
    """Export a `UNet2DModel` or `UNet2DConditionModel` into a Program.

    The inputs keep their diffusers names; the batch stays open, height and width too where the model allows.
    Raises ModelError for other classes, and when the export lost weights or disagrees with torch.
    """
    reading = _read(model, schedule, deployment, size, name)
    return _finish(reading, folder, schedule=schedule, deployment=deployment, name=name, threads=threads)


@dataclass(frozen=True, eq=False)
class _Reading:
    """A module as its export saw it, and what torch computed with it at three timesteps."""

    model: ir.Model
    fx_text: str
    class_name: str
    example: _Example
    parity: dict[int, npt.NDArray[np.float32]]
    parameters: int


def _read(
    model: torch.nn.Module, schedule: Schedule, deployment: Deployment, size: tuple[int, int] | None, name: str
) -> _Reading:
    if type(model).__name__ not in _SUPPORTED:
        raise _unsupported(type(model).__name__, name)
    if wrong := next((f"{n} is {p.dtype}" for n, p in model.named_parameters() if p.dtype != torch.float32), None):
        raise ModelError(f"the module is not in float32: {wrong}", where=name, hint="call .float() on it first")
    training = model.training
    model.eval()
    try:
        # A sampler of interpolated timesteps needs an input that can say them.
        example = _example(model, size, torch.int64 if deployment.whole else torch.float32)
        parity = _torch_outputs(model, example, schedule)
        onnx_model, fx_text = _export(_Denoiser(model, tuple(example.tensors)), example)
        return _Reading(onnx_model, fx_text, type(model).__name__, example, parity, _distinct_bytes(model))
    finally:
        model.train(training)


def _finish(
    reading: _Reading,
    folder: Path,
    *,
    schedule: Schedule,
    deployment: Deployment,
    name: str = "module",
    threads: int | None = None,
    size: tuple[int, int] | None = None,
) -> Program:
    tensors = reading.example.tensors
    program = finish_import(
        reading.model,
        folder,
        signature=Signature("sample", "timestep", OUTPUT, tuple(tensors)[2:], schedule.prediction),
        schedule=schedule,
        deployment=deployment,
        size=size or (int(tensors["sample"].shape[2]), int(tensors["sample"].shape[3])),
        source={"kind": "diffusers", "name": name, "class": reading.class_name},
        where=name,
        fx_text=reading.fx_text,
    )
    held = int(program.source["parameter_bytes"])
    if held < reading.parameters:
        raise ModelError(f"the export holds {held} bytes of weights, the module {reading.parameters}", where=name)
    gc.collect()  # what the exporter knew of torch's weights is tied in cycles
    _check_parity(program, folder, reading.parity, reading.example, threads)
    return program


def _distinct_bytes(model: torch.nn.Module) -> int:
    """Bytes of the module's parameters, equal ones counted once: the exporter stores them once."""
    sizes: dict[tuple[int, bytes], int] = {}
    for parameter in model.parameters():
        data = parameter.detach().contiguous().numpy().reshape(-1).view(np.uint8)
        sizes[data.size, hashlib.sha256(data.data).digest()] = data.size
    return sum(sizes.values())


def _unsupported(name: str, where: str) -> ModelError:
    return ModelError(
        f"{name} cannot be exported yet; {' and '.join(_SUPPORTED)} can",
        where=where,
        hint="export it to ONNX yourself and compile the .onnx file",
    )


def _example(model: torch.nn.Module, size: tuple[int, int] | None, timestep: torch.dtype) -> _Example:
    config: Any = model.config
    side = config.sample_size or 32
    height, width = size or ((side, side) if isinstance(side, int) else tuple(side))
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"sample": normal(2, config.in_channels, height, width), "timestep": torch.tensor([7, 7], dtype=timestep)}
    for key, known in (
        ("addition_embed_type", "text_time"),
        ("class_embed_type", None),
        ("encoder_hid_dim_type", None),
    ):
        if (value := config.get(key)) not in (None, known):
            raise ModelError(
                f"a {type(model).__name__} with {key} {value!r} cannot be exported yet",
                hint="export it to ONNX yourself and compile the .onnx file",
            )
    if type(model).__name__ == "UNet2DConditionModel":
        tensors["encoder_hidden_states"] = normal(2, 77, _first(config.cross_attention_dim))
        if config.addition_embed_type == "text_time":
            width_in = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            tensors |= {"text_embeds": normal(2, width_in), "time_ids": normal(2, 6)}
    if config.num_class_embeds is not None:
        tensors["class_labels"] = torch.tensor([0, 1 % config.num_class_embeds])
    return _Example(tensors, torch.export.Dim("batch", max=63), 2 ** (len(config.block_out_channels) - 1))


def _first(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])


def _torch_outputs(model: torch.nn.Module, example: _Example, schedule: Schedule) -> dict[int, npt.NDArray[np.float32]]:
    last = schedule.num_train_timesteps - 1
    denoiser = _Denoiser(model, tuple(example.tensors))
    outputs = {}
    with torch.no_grad():
        for t in sorted({0, last // 2, last}):
            timestep = torch.full((2,), t, dtype=example.tensors["timestep"].dtype)
            tensors = {**example.tensors, "timestep": timestep}
            outputs[t] = denoiser(*tensors.values()).numpy()
    return outputs


def _export(denoiser: _Denoiser, example: _Example) -> tuple[ir.Model, str]:
    exported = _export_fx(denoiser, example)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                exported,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
                input_names=list(denoiser.names),
                output_names=[OUTPUT],
            )
    finally:
        quiet.setLevel(level)
    assert program is not None
    return program.model, _readable(exported)


def _export_fx(denoiser: _Denoiser, example: _Example) -> torch.export.ExportedProgram:
    """With open height and width, or, where the model's arithmetic forbids that, with the example's."""
    height, width = torch.export.Dim("height", min=1, max=512), torch.export.Dim("width", min=1, max=512)
    spatial = {2: example.multiple * height, 3: example.multiple * width}
    tensors = tuple(example.tensors.values())
    error: Exception | None = None
    for extra in (spatial, {}):
        shapes = tuple({0: example.batch, **(extra if name == "sample" else {})} for name in example.tensors)
        try:
            return torch.export.export(denoiser, tensors, dynamic_shapes=(shapes,), strict=False)
        except Exception as problem:  # torch.export reports guards that fail by many kinds of errors
            error = problem
    raise ModelError(f"torch.export cannot trace the model: {str(error).splitlines()[0]}") from error


def _readable(exported: torch.export.ExportedProgram) -> str:
    """The FX graph as code, without the comments that name files of this machine."""
    code = exported.graph_module.print_readable(print_output=False)
    return "\n".join(line.rstrip() for line in code.splitlines() if not line.lstrip().startswith("#")) + "\n"


def _check_parity(
    program: Program,
    folder: Path,
    parity: Mapping[int, npt.NDArray[np.float32]],
    example: _Example,
    threads: int | None,
) -> None:
    conditions = {n: v.numpy() for n, v in example.tensors.items() if n not in ("sample", "timestep")}
    with Executor(program.model, folder, threads=threads) as executor:
        for t, want in parity.items():
            outputs = executor.call(program.signature, example.tensors["sample"].numpy(), t, conditions)
            worst = relative_difference(want, outputs[OUTPUT])
            if not worst <= PARITY:
                raise ModelError(
                    f"the exported graph disagrees with torch at timestep {t}: relative difference {worst:.1e}, "
                    f"allowed {PARITY:.0e}",
                    hint="report this model's class and configuration",
                )
