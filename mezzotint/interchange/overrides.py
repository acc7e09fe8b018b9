"""A bundle's scales as TensorQuantOverrides of onnxruntime's own quantizer, `quantize_static`.

The scales are read from the shipped graph of the bundle, at every deployed timestep, layer by layer. They belong to the
tensors of the float graph before the quantizers were inserted, which has the names of the float model, but not always
its values: a convolution into which the time embedding was folded computes another sum under its old name. So the
passes on the float graph are run again (debug/diagnose.py), both graphs are run on the same input, and a tensor counts
as unchanged where extremes, mean and norm agree at two timesteps. Weights are compared number by number.

    one scale and zero point         {"quant_type", "scale", "zero_point"}
    tables, or a scale a channel     {"quant_type", "rmin", "rmax"}: the widest range that any row, channel or reader
                                     has. onnxruntime's quantizer knows neither timesteps nor channels of activations
    weights                          {"axis", "quant_type", "scale", "zero_point"} and one entry for each channel more

Other tensors are left to onnxruntime, and listed with the reason: changed values, weights that are not constants in the
float file, formats that its quantizer does not support. The grid of 8-bit weights leaves -128 out; onnxruntime's
quantizer uses it where a scale clips a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.compiler.stages import scratch
from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.bundle.bundle import Bundle
from mezzotint.runtime.bundle.manifest_entries import QuantizerEntry
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.sampling.samplers import initial_noise
from mezzotint.runtime.signature import Timestep
from mezzotint.runtime.streams import FIXED

from ..bench.reference import ReferenceModel
from ..debug.replay import checked_recipe, replayed
from . import OVERRIDES, OVERRIDES_FORMAT
from .overrides_read import ScaleReader, Scales

OPERATIONS = ("Conv", "Gemm", "MatMul")
WEIGHT_TYPES = {8: "QInt8", 4: "QInt4"}
NOTE = (
    "scales that depend on the timestep, or on the channel of an activation, cannot be written here: these tensors "
    "have the widest range instead, and are listed as widened"
)
_SAME = 1e-3  # relative; exact passes stay within 1e-4


@dataclass(frozen=True)
class Overrides:
    """Overrides by tensor name, as plain data. `widened` tensors had several ranges; `skipped` has the reason for each
    tensor left out; `excluded` are nodes of the float file that the bundle computes in float, or not at all."""

    bundle: str
    tensors: Mapping[str, list[dict[str, Any]]]
    widened: Sequence[str]
    skipped: Mapping[str, str]
    excluded: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": OVERRIDES_FORMAT,
            "bundle": self.bundle,
            "note": NOTE,
            "arguments": {
                "quant_format": "QDQ",
                "activation_type": "QUInt8",
                "weight_type": "QInt8",
                "per_channel": True,
                "op_types_to_quantize": list(OPERATIONS),
                "nodes_to_exclude": list(self.excluded),
            },
            OVERRIDES: dict(self.tensors),
            "widened": list(self.widened),
            "skipped": dict(self.skipped),
        }


def make_overrides(
    bundle: Bundle,
    float_model: Path,
    *,
    conditions: Mapping[str, AnyArray] | None = None,
    threads: int | None = None,
) -> Overrides:
    """Return the overrides for the float .onnx that a bundle was compiled from. Works in a temporary folder.

    Raises InputError for a bundle whose layers cannot be separated (debug/diagnose.py), and for the file of another.
    """
    from mezzotint.compiler.core.pipeline import Context
    from mezzotint.compiler.graph.model_file import read_model
    from mezzotint.compiler.graph.nodes import name_of
    from mezzotint.compiler.graph.ops import layers

    reference = ReferenceModel(bundle, float_model, threads=threads)
    reference.check()
    recipe = checked_recipe(bundle)
    raw = read_model(float_model).graph
    with scratch() as work:
        context = Context(work, seed=bundle.manifest.calibration.seed, threads=threads)
        before = reference.program(context.folder)
        after = replayed(bundle, before, recipe, context, conditions)
        float_layers = list(layers(after.graph))
        reader = ScaleReader(read_model(bundle.model_path), bundle)
        activations, weights, quantized = reader.read(float_layers, work, threads)
        names = [name for name in activations if _in_graph(raw, name)]
        changed = _changed(before, after, names, bundle, conditions, context)
        tensors, widened, skipped = _activations(activations, names, changed)
        formats = {q.value: q for q in bundle.manifest.quantizers}
        for layer in float_layers:  # in here: the weights are in the temporary folder
            if layer.weight is None or (name := name_of(layer.weight)) not in weights:
                continue
            why = _weight_problem(raw.initializers.get(name), layer.weight, formats.get(name))
            if why:
                skipped[name] = why
            else:
                kind = WEIGHT_TYPES[formats[name].bits]
                tensors[name] = _weight(weights[name], kind, layer.weight_axis)
    if not tensors:
        raise InputError(
            "no quantized tensor of the bundle is one of the float file",
            where=str(float_model),
            hint="is it the file that the bundle was compiled from? `mezzotint export` writes it",
        )
    excluded = [
        node.name or ""
        for node in raw
        if node.op_type in OPERATIONS and name_of(node.outputs[0]) not in quantized and node.name
    ]
    return Overrides(bundle.manifest.digest, tensors, widened, skipped, excluded)


def _activations(
    read: Mapping[str, Scales], names: Sequence[str], changed: set[str]
) -> tuple[dict[str, list[dict[str, Any]]], list[str], dict[str, str]]:
    """Return (the entries, the names of those with several ranges, the reasons for the others)."""
    tensors: dict[str, list[dict[str, Any]]] = {}
    widened, skipped = [], {}
    for name, row in read.items():
        if name not in names:
            skipped[name] = "the float file has no tensor of this name"
        elif name in changed:
            skipped[name] = "a pass changed its value: the float file has another value of this name"
        elif row.narrow:
            skipped[name] = "it has fewer than 8 bits, and onnxruntime's quantizer has no such activations"
        else:
            tensors[name], wide = _activation(row)
            widened += [name] if wide else []
    return tensors, widened, skipped


def _in_graph(graph: Any, name: str) -> bool:
    return any(v.name == name for v in graph.inputs) or any(v.name == name for node in graph for v in node.outputs)


def _activation(row: Scales) -> tuple[list[dict[str, Any]], bool]:
    """Return (the entry of a tensor, whether several ranges were merged)."""
    pairs = [np.broadcast_arrays(scale, zero) for scale, zero in zip(row.scales, row.zeros, strict=True)]
    scales = np.concatenate([scale.reshape(-1) for scale, _ in pairs]).astype(np.float64)
    zeros = np.concatenate([zero.reshape(-1) for _, zero in pairs])
    kind = "QInt8" if zeros.dtype == np.int8 else "QUInt8"
    limits = np.iinfo(zeros.dtype)
    if np.all(scales == scales[0]) and np.all(zeros == zeros[0]):
        return [{"quant_type": kind, "scale": float(scales[0]), "zero_point": int(zeros[0])}], False
    low = scales * (int(limits.min) - zeros.astype(np.float64))
    high = scales * (int(limits.max) - zeros.astype(np.float64))
    return [{"quant_type": kind, "rmin": float(low.min()), "rmax": float(high.max())}], True


def _weight(scale: AnyArray, kind: str, axis: int | None) -> list[dict[str, Any]]:
    """Return one entry, or one for each channel, the first with the axis; zero points of weights are 0."""
    rows: list[dict[str, Any]] = [{"scale": float(s), "zero_point": 0} for s in scale.reshape(-1)]
    if len(rows) == 1:
        return [{"quant_type": kind, **rows[0]}]
    return [{"axis": axis, "quant_type": kind, **rows[0]}, *rows[1:]]


def _weight_problem(raw: Any, weight: Any, quantizer: QuantizerEntry | None) -> str | None:
    from mezzotint.compiler.graph.nodes import numpy_of

    if quantizer is None:
        return "the manifest has no quantizer for it"
    width = quantizer.bits
    if quantizer.row_bits:
        return "its channels have several widths"
    if quantizer.levels or quantizer.vectors:
        return "its integers are those of a codebook"
    if width not in WEIGHT_TYPES:
        return f"it has {width} bits, and onnxruntime's quantizer has 8 and 4"
    if raw is None:
        return "it is not a constant in the float file (onnxruntime's quant_pre_process folds it into one)"
    if list(raw.shape) != list(weight.shape) or not np.allclose(numpy_of(raw), numpy_of(weight), rtol=1e-6, atol=0):
        return "a pass changed it: the float file has other numbers"
    return None


def _changed(
    before: Any,
    after: Any,
    names: Sequence[str],
    bundle: Bundle,
    conditions: Mapping[str, AnyArray] | None,
    context: Any,
) -> set[str]:
    """Return the tensors whose values differ between the two graphs."""
    from ..bench.bench import make_conditions

    net = bundle.denoiser(context.threads)
    batch = net.fixed_batch or 1
    rows = {name: array for name, (array, _) in make_conditions(net, bundle, batch).items()}
    rows |= {name: np.repeat(array[:1], batch, axis=0) for name, array in (conditions or {}).items()}
    x = initial_noise(FIXED, (batch, *bundle.sample_shape))
    calls = bundle.deployment.timesteps
    times = (calls[0], calls[len(calls) // 2])
    first, second = (_prints(program, names, x, times, rows, context) for program in (before, after))
    return {
        name
        for name in names
        if name not in second or not np.allclose(first[name], second[name], rtol=_SAME, atol=_SAME * _size(first[name]))
    }


def _size(prints: AnyArray) -> float:
    return float(np.abs(prints[..., :2]).max())


def _prints(
    program: Any,
    names: Sequence[str],
    x: AnyArray,
    times: Sequence[Timestep],
    rows: Mapping[str, AnyArray],
    context: Any,
) -> dict[str, AnyArray]:
    """Return float64 `[times, 4]` for each tensor of the graph: lowest, highest, mean, root of the sum of squares."""
    from mezzotint.compiler.core.execute import Executor
    from mezzotint.compiler.graph.nodes import Builder, Names, name_of

    model = program.model.clone()
    values = {name_of(v): v for v in (*model.graph.inputs, *(out for node in model.graph for out in node.outputs))}
    build = Builder(model.graph, Names(model.graph), after=list(model.graph)[-1])
    taps: dict[str, list[str]] = {}
    for name in names:
        if (value := values.get(name)) is not None:
            taps[name] = [
                name_of(build.op(op, [value], f"{name}_print", like=value, shape=[], attributes={"keepdims": 0}))
                for op in ("ReduceMin", "ReduceMax", "ReduceMean", "ReduceL2")
            ]
    with Executor(
        model, context.folder, taps=[t for four in taps.values() for t in four], threads=context.threads, level="basic"
    ) as run:
        outputs = [run.call(program.signature, x, t, rows) for t in times]
    return {name: np.array([[float(one[t]) for t in four] for one in outputs]) for name, four in taps.items()}
