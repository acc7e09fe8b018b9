"""Scales and zero points of a bundle's graph, layer by layer, at every deployed timestep.

Constants are read; values that depend on the timestep are computed by the part of the graph that looks them up. An
integer convolution with a scale for each output channel has them in the scales of its weights, w / y: these are
multiplied by y again, which gives w up to the last bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.bundle.bundle import Bundle


@dataclass
class Scales:
    """Scales and zero points of one tensor, `[rows, channels]`, one array for each layer that reads or writes it."""

    scales: list[AnyArray] = field(default_factory=list)
    zeros: list[AnyArray] = field(default_factory=list)
    narrow: bool = False


class ScaleReader:
    """Reads scales and zero points of a lowered graph, at every timestep that it has rows for."""

    def __init__(self, lowered: Any, bundle: Bundle) -> None:
        self._model, self._bundle = lowered, bundle
        self._nodes = {node.name: node for node in lowered.graph if node.name}

    def read(
        self, float_layers: Sequence[Any], folder: Path, threads: int | None
    ) -> tuple[dict[str, Scales], dict[str, AnyArray], set[str]]:
        """Return (activations, scales `[C]` of weights, outputs of quantized layers), by the names of tensors."""
        from mezzotint.compiler.audit.grids import UnknownForm, input_grid, is_quantized, output_grid
        from mezzotint.compiler.graph.nodes import name_of

        grids: list[tuple[str, Any]] = []
        weights: list[tuple[str, Any, Any]] = []
        quantized: set[str] = set()
        for layer in float_layers:
            node = self._nodes.get(layer.name)
            if node is None or not is_quantized(node):
                continue
            quantized.add(name_of(layer.node.outputs[0]))
            try:
                inputs = [(name_of(v), input_grid(node, i)) for i, v in enumerate(layer.activations)]
                output = output_grid(node)
            except UnknownForm:
                continue
            grids += [(name, grid) for name, grid in inputs if grid is not None]
            grids += [(name_of(layer.node.outputs[0]), output)] if output is not None else []
            if layer.weight is not None:
                weights.append((name_of(layer.weight), *_weight_scale(node, output)))
        parameters = [v for _, g in grids for v in (g.read_scale, g.read_zero)]
        parameters += [v for _, *pair in weights for v in pair if v is not None]
        rows = self._rows(parameters, folder, threads)
        activations: dict[str, Scales] = defaultdict(Scales)
        for name, grid in grids:
            activations[name].scales.append(rows[name_of(grid.read_scale)])
            activations[name].zeros.append(rows[name_of(grid.read_zero)])
            activations[name].narrow |= grid.clip is not None
        scales = {}
        for name, scale, divisor in weights:
            weight_scale = rows[name_of(scale)] * (1 if divisor is None else rows[name_of(divisor)])
            scales[name] = weight_scale.astype(np.float64).mean(axis=0).astype(np.float32)
        return dict(activations), scales, quantized

    def _rows(self, values: Sequence[Any], folder: Path, threads: int | None) -> dict[str, AnyArray]:
        """Return each value at every deployed timestep `[rows, C]`; one row for a constant."""
        from mezzotint.compiler.graph import weight_store as store
        from mezzotint.compiler.graph.nodes import is_constant, name_of, numpy_of, remove_dead
        from mezzotint.runtime.session import open_session

        constants = {name_of(v): numpy_of(v).reshape(1, -1) for v in values if is_constant(v)}
        timed = list(dict.fromkeys(name_of(v) for v in values if not is_constant(v)))
        if not timed:
            return constants
        model = self._model.clone()
        by_name = {name_of(out): out for node in model.graph for out in node.outputs}
        model.graph.outputs[:] = [by_name[name] for name in timed]
        remove_dead(model.graph)
        signature = self._bundle.signature
        timestep = signature.timestep
        model.graph.inputs[:] = [v for v in model.graph.inputs if v.name == timestep]
        time = model.graph.inputs[0]
        session = open_session(store.write(model, folder), threads=threads, level="basic")
        shape = [1] * len(time.shape or ())
        dtype = time.dtype.numpy() if time.dtype else np.int64
        outputs = [
            session.run(timed, {timestep: np.full(shape, signature.network_time(t), dtype)})
            for t in self._bundle.deployed_timesteps or ()
        ]
        return constants | {name: np.stack([row[i].reshape(-1) for row in outputs]) for i, name in enumerate(timed)}


def _weight_scale(node: Any, output: Any) -> tuple[Any, Any]:
    """Return (the scale of a layer's weight, its divisor: the output's scales where each channel has one)."""
    if node.op_type == "QLinearConv":
        channels = output is not None and output.axis is not None
        return node.inputs[4], output.read_scale if channels else None
    if node.op_type == "MatMulIntegerToFloat":
        return node.inputs[3], None
    return node.inputs[1].producer().inputs[1], None
