"""A component in torch becomes an ONNX graph: torch.export, the dynamo exporter, and a comparison with torch.

It runs without gradients: with them, torch traces the fused attention of T5 in another layout, and the exporter fails:
"Cannot view a tensor with shape ... and strides ..." (torch 2.13).
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from mezzotint.runtime.bundle.controlnet import SHARED_ROWS
from mezzotint.runtime.errors import MezzotintError

from ..core.execute import Executor
from ..core.verify import relative_difference, weights_finite
from ..errors import ModelError
from ..frontend.torch_example import quiet_exporter
from ..graph import weight_store as store
from ..graph.require import required
from .classes import DECODER, ComponentClass, output_names
from .controlnet import called_controlnet

_OPSET = 21
_PARITY = 2e-3  # as that of denoisers
_MOST_ROWS = 63
_IMAGE_RANK = 4
_LONGEST = 4096  # tokens
ComponentArrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, eq=False)
class ExportedComponent:
    """A graph with float weights, the example that it was compared with, and torch's outputs for that."""

    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    example: ComponentArrays
    expected: ComponentArrays
    parameter_bytes: int

    def check(self, folder: Path, threads: int | None, where: str) -> None:
        """Store the weights in `folder`, and raise ModelError where the graph and torch disagree."""
        store.adopt(self.model, folder)
        if name := weights_finite(self.model):
            raise ModelError(f"the weight {name!r} holds NaN or infinite values", where=where)
        with Executor(self.model, folder, threads=threads) as executor:
            found = executor.run(self.example)
        for name, expected in self.expected.items():
            worst = relative_difference(expected, np.asarray(found[name], np.float32))
            if not worst <= _PARITY:
                raise ModelError(
                    f"the exported graph disagrees with torch at {name}: relative difference {worst:.1e}, allowed "
                    f"{_PARITY:.0e}",
                    where=where,
                    hint="report this model's class and configuration",
                )


class ComponentCall(torch.nn.Module):
    """A component with positional inputs, which torch.export needs, and a tuple of tensors as its answer."""

    def __init__(self, module: torch.nn.Module, row: ComponentClass, part: str, names: Sequence[str]) -> None:
        super().__init__()
        self.module: Any = module
        self.row, self.part, self.names = row, part, tuple(names)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.row.kind == "text encoder":
            arguments: dict[str, Any] = dict(zip(self.names, tensors, strict=True))
            hidden = self.row.hidden == "all" or bool(self.row.states)
            if "use_cache" in inspect.signature(self.module.forward).parameters:
                arguments["use_cache"] = False  # a cache of keys is for generating text
            answer = self.module(**arguments, output_hidden_states=hidden)
            if self.row.states:
                return tuple(answer.hidden_states[i] for i in self.row.states)
            return (*(getattr(answer, name) for name in self.row.outputs), *(answer.hidden_states if hidden else ()))
        if self.row.kind == "controlnet":
            return called_controlnet(self.module, dict(zip(self.names, tensors, strict=True)))
        if self.part == DECODER:
            return (self.module.decode(tensors[0], return_dict=False)[0],)
        answer = self.module.encode(tensors[0])
        return (answer.latent_dist.parameters if self.row.moments else answer.latent,)


def export_component(
    module: torch.nn.Module, row: ComponentClass, part: str, example: ComponentArrays, where: str
) -> ExportedComponent:
    """Return the graph of one part of a pipeline. `example` are inputs of two rows, as the pipeline gives them.

    The batch stays open, and so do the tokens of a prompt, and height and width of pictures where the model allows.
    Raises ModelError for a module that is not in float32, or cannot be run or exported.
    """
    if wrong := next((f"{n} is {p.dtype}" for n, p in module.named_parameters() if p.dtype != torch.float32), None):
        raise ModelError(f"the module is not in float32: {wrong}", where=where, hint="call .float() on it first")
    settings: Any = module.config
    names = output_names(row, part, settings.to_dict() if row.library == "transformers" else settings)
    call = ComponentCall(module, row, part, tuple(example))
    tensors = tuple(torch.from_numpy(np.array(array)) for array in example.values())
    training = module.training
    module.eval()
    try:
        with torch.no_grad(), ExitStack() as patched:
            expected = [tensor.numpy() for tensor in call(*tensors)]
            for patch in row.patches:
                patched.enter_context(patch(module))
            model = _export(call, tensors, tuple(example), names)
    except MezzotintError:
        raise
    except Exception as error:  # torch raises many kinds of errors
        line = (str(error).splitlines() or [""])[0][:300]
        raise ModelError(
            f"torch cannot run or export the {part}: {type(error).__name__}: {line}",
            where=where,
            hint="check that its configuration belongs to it, or compile the denoiser alone: --components none",
        ) from error
    finally:
        module.train(training)
    gc.collect()  # the exporter's references to torch's weights are in cycles
    size = sum(p.numel() * p.element_size() for p in _parameters_of(module, row, part))
    return ExportedComponent(model, tuple(example), names, example, dict(zip(names, expected, strict=True)), size)


def torch_outputs(
    module: torch.nn.Module, row: ComponentClass, part: str, names: Sequence[str], batches: Sequence[ComponentArrays]
) -> list[ComponentArrays]:
    """Return torch's outputs for each batch, by their names in the graph."""
    found: list[ComponentArrays] = []
    for batch in batches:
        tensors = [torch.from_numpy(np.array(array)) for array in batch.values()]
        with torch.no_grad():
            answer = ComponentCall(module, row, part, tuple(batch))(*tensors)
        found.append({name: tensor.numpy() for name, tensor in zip(names, answer, strict=True)})
    return found


def _parameters_of(module: Any, row: ComponentClass, part: str) -> list[torch.nn.Parameter]:
    if row.kind != "autoencoder":
        return list(module.parameters())
    halves = ("decoder", "post_quant_conv") if part == DECODER else ("encoder", "quant_conv")
    found = [getattr(module, half, None) for half in halves]
    return [parameter for half in found if half is not None for parameter in half.parameters()]


def _export(
    call: ComponentCall, tensors: tuple[torch.Tensor, ...], names: tuple[str, ...], outputs: tuple[str, ...]
) -> ir.Model:
    """Export with open sizes or, where the model's arithmetic forbids that, with those of the example."""
    error: Exception | None = None
    for axes in _open_axes(call, names, tensors[0].ndim):
        try:
            exported = torch.export.export(call, tensors, dynamic_shapes=(axes,), strict=False)
            with quiet_exporter():
                program = torch.onnx.export(
                    exported,
                    opset_version=_OPSET,
                    dynamo=True,
                    verbose=False,
                    input_names=list(names),
                    output_names=list(outputs),
                )
            return required(program, "the ONNX program", "torch.onnx.export").model
        except Exception as problem:  # torch.export reports failing guards by many kinds of errors
            error = problem
    raise ModelError(f"torch cannot export it: {str(error).splitlines()[0][:300]}") from error


def _open_axes(call: ComponentCall, names: tuple[str, ...], rank: int) -> list[tuple[dict[int, Any], ...]]:
    batch = torch.export.Dim("batch", max=_MOST_ROWS)
    if call.row.kind == "text encoder":
        tokens = torch.export.Dim("tokens", min=2, max=_LONGEST)
        return [tuple({0: batch, 1: tokens} for _ in names), tuple({0: batch} for _ in names)]
    if call.row.kind == "controlnet":
        words = torch.export.Dim("tokens", min=2, max=_LONGEST)
        longer = tuple({0: batch, 1: words} if name == SHARED_ROWS[0] else {0: batch} for name in names)
        return [longer, tuple({0: batch} for _ in names)]
    height, width = torch.export.Dim("height", min=1, max=1024), torch.export.Dim("width", min=1, max=1024)
    config = call.module.config
    blocks = getattr(config, "block_out_channels", None) or getattr(config, "encoder_block_out_channels", None)
    if blocks is None or rank != _IMAGE_RANK:
        return [({0: batch},), ({},)]
    factor = 1 if call.part == DECODER else 2 ** (len(blocks) - 1)
    return [({0: batch, 2: factor * height, 3: factor * width},), ({0: batch},)]
