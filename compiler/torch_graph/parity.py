"""The torch module of a graph beside the executor, value by value, to prove that both compute the same.

A value that lies on the boundary of two integers is rounded up by one of them and down by the other, and behind a few
layers many values differ for that one. So each quantizer is compared on the executor's own inputs: the torch module
goes on with the integers of the executor, and a difference is that of the nodes since the last quantizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import fx

from ..core.execute import Executor, Feeds
from ..graph.nodes import is_op, name_of
from ..lowering.qdq import clip_behind
from .convert import VALUE, TorchGraph
from .quantizers import Quantizer

FLOAT_TOLERANCE = 1e-5  # of the largest element of a float value
UNEQUAL_SHARE = 1e-3  # share of a quantizer's integers


@dataclass(frozen=True)
class ValueGap:
    """How far one value of the torch module is from that of the executor.

    value     its name in the graph
    relative  the largest difference as a fraction of the value's largest element; 0 for integers
    steps     the largest difference of integers, and `unequal` the number of those that differ; 0 for floats
    size      the number of elements
    """

    value: str
    size: int
    relative: float = 0.0
    steps: int = 0
    unequal: int = 0

    @property
    def small(self) -> bool:
        """Return whether the difference is that of another order of additions."""
        return (
            self.relative <= FLOAT_TOLERANCE and self.steps <= 1 and self.unequal <= max(1, UNEQUAL_SHARE * self.size)
        )


def value_gaps(
    model: ir.Model, graph: TorchGraph, feeds: Feeds, folder: Path, *, only: Sequence[str] | None = None
) -> list[ValueGap]:
    """Return the difference of each value of a graph, in the order of the nodes, for one call.

    The executor runs without optimizations, on one thread. `only` are the names of the float values to compare, by
    default all; quantizers are always compared.
    """
    integers = {name_of(node.outputs[0]): _last(node) for node in model.graph if is_op(node, "QuantizeLinear")}
    floats = [name_of(out) for node in model.graph for out in node.outputs if _is_float(node, out)]
    chosen = [name for name in floats if only is None or name in only]
    with Executor(model, folder, taps=[*integers.values(), *chosen], threads=1, level="none") as executor:
        reference = executor.run(feeds)
    forced = {name: reference[last] for name, last in integers.items()}
    run = _Comparison(graph.module, {**{name: reference[name] for name in chosen}, **forced})
    with torch.no_grad():
        run.run(*(torch.from_numpy(np.asarray(feeds[name])) for name in graph.inputs))
    return run.found


def _last(quantize: ir.Node) -> str:
    """Return the name of the integers that a QuantizeLinear, or the Clip of its format, writes."""
    return name_of((clip_behind(quantize) or quantize).outputs[0])


def _is_float(node: ir.Node, value: ir.Value) -> bool:
    """Return whether a node computes floats. The float view of integers is not compared: they are."""
    floating = value.dtype is not None and value.dtype.is_floating_point()
    read = bool(value.uses()) or value.is_graph_output()
    return floating and read and not is_op(node, "DequantizeLinear", "Constant")


class _Comparison(fx.Interpreter):
    """A run of a module that compares each value with its reference, and takes over the reference's integers."""

    def __init__(self, module: fx.GraphModule, reference: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__(module)
        self.reference, self.found = reference, list[ValueGap]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        name = str(n.meta.get(VALUE))
        if name not in self.reference or not isinstance(result, torch.Tensor):
            return result
        wanted = self.reference[name]
        part = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if isinstance(part, Quantizer):
            arguments, given = self.fetch_args_kwargs_from_env(n)
            return self._integers(name, part, wanted, *arguments, **given)
        size = max(float(np.abs(wanted).max(initial=0)), float(np.finfo(np.float32).tiny))
        relative = float(np.abs(result.numpy() - wanted).max(initial=0)) / size
        self.found.append(ValueGap(name, wanted.size, relative=relative))
        return result

    def _integers(
        self,
        name: str,
        quantizer: Quantizer,
        wanted: npt.NDArray[Any],
        x: torch.Tensor,
        row: torch.Tensor | None = None,
    ) -> torch.Tensor:
        reference = torch.from_numpy(wanted.astype(np.float32))
        distance = (quantizer.integers(x, row) - reference).abs()
        unequal = int((distance > 0).sum())
        self.found.append(ValueGap(name, wanted.size, steps=int(distance.max()), unequal=unequal))
        scale, zero, _, _ = quantizer.parameters_for(x, row)
        return (reference - zero) * scale
