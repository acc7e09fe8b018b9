"""channel_scales: the output of a convolution quantized per channel and group of timesteps, at no cost at run time.

An integer convolution must round its output to 8 bits, whoever reads it, and on the digits that is two thirds of the
error of the last step: the channels' ranges differ, and what the timestep adds to each moves them. Quantizers of
activations are per tensor because a kernel cannot sum over channels of different scale; but nobody sums over what
comes out. Every output channel of the kernel has a factor of its own already, for the scales of the weights, so a
scale and a zero point for each output channel and group of timesteps fit into rows that are gathered anyway
(compiler/lowering/integer.py).

For group g and channel c with the extremes l and h, and L and H those of the whole tensor, the range is

    low = -margin |l|^trust |L|^(1 - trust)          high = margin h^trust H^(1 - trust)

and at least a 32nd of the tensor's, which costs nothing and lets a channel speak that was silent in calibration.
Extremes of one channel rest on far fewer values than a tensor's percentile, and a channel that was quiet on the
calibration pictures may be loud on another. Measured on the digits with min-max alone (margin 1, trust 1): epsilon is
better by 0.7 dB, and single pictures are ruined by clipping.

Only where it pays: the mean squared step has to fall by `gain` dB over that of the quantizer for the whole tensor.
Outputs that a layer reads without anything in between keep that quantizer, and so do those that are only joined and
quantized again, which onnxruntime does on integers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.compiler.core.formats import scale_for_range
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program, Quantizer, Site
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.nodes import consumers, is_op, name_of
from mezzotint.compiler.graph.ops import Layer, is_mover, layers

Extremes = npt.NDArray[np.float64]
SMALLEST_SHARE = 1 / 32


@dataclass(frozen=True)
class ChannelScales(Pass):
    """`margin` (1 or more) and `trust` (0 to 1) as above, `gain` in dB; needs observe.channels."""

    margin: float = 1.1
    trust: float = 0.75
    gain: float = 1.0

    needs: ClassVar[frozenset[str]] = frozenset({"stats", "plan", "groups", "frozen"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"tables"})

    def __post_init__(self) -> None:
        if not 1 <= self.margin < np.inf:
            raise RecipeError(f"channel_scales.margin is {self.margin}", where=self.name, hint="choose 1 or more")
        if not 0 <= self.trust <= 1:
            raise RecipeError(
                f"channel_scales.trust is {self.trust}",
                where=self.name,
                hint="choose between 0 (the tensor's range) and 1 (the channel's own)",
            )

    def run(self, program: Program, context: Context) -> Program:
        stats, plan = program.require_stats(), program.require_plan()
        stats.check_every_call(program.deployment.timesteps, self.name)
        found = [layer for layer in layers(program.graph) if layer.output_quantized]
        if any((name_of(layer.output), 0) not in stats.channels for layer in found):
            raise StatsError(
                "no channel was measured by itself",
                where=self.name,
                hint="measure them: --set observe.channels=outputs",
            )
        nodes = {layer.node for layer in layers(program.graph)}
        quantizers = dict(plan.quantizers)
        chosen = 0
        for layer in found:
            whole = plan.of(name_of(layer.output), layer.name)
            if whole is None or not _only_computed_with(layer, nodes):
                continue
            extremes = np.stack([stats.channels[name_of(layer.output), k] for k in range(stats.groups)])
            table = self._table(extremes.astype(np.float64), whole, plan.groups)
            if table is not None:
                quantizers[Site(name_of(layer.output), layer.name)] = table
                chosen += 1
        note = f"{chosen} of {len(found)} convolutions have a scale for each channel; {max(plan.groups) + 1} rows"
        return replace(program, plan=replace(plan, quantizers=quantizers), note=note)

    def _table(self, extremes: Extremes, whole: Quantizer, groups: tuple[int, ...]) -> Quantizer | None:
        """Rows from extremes `[calls, 2, C]`, or None where they do not pay."""
        member = np.array(groups)
        count = max(groups) + 1
        low = np.stack([extremes[member == g, 0].min(axis=0) for g in range(count)])
        high = np.stack([extremes[member == g, 1].max(axis=0) for g in range(count)])
        ends = (self._widened(np.maximum(end, 0.0)) for end in (-low, high))
        scale, zero = scale_for_range(-next(ends), next(ends), whole.format)
        step = np.broadcast_to(whole.scale, count).astype(np.float64)
        gains = 10 * np.log10(step**2 / (scale.astype(np.float64) ** 2).mean(axis=1))
        if gains.mean() < self.gain:
            return None
        return Quantizer(whole.format, scale, zero, self.name, axis=1, table=True)

    def _widened(self, ends: Extremes) -> Extremes:
        """The magnitude of one end of the ranges `[groups, C]`, between the channel's own and the tensor's."""
        tensor = ends.max(axis=1, keepdims=True)
        mixed = self.margin * ends**self.trust * tensor ** (1 - self.trust)
        widened: Extremes = np.maximum(mixed, SMALLEST_SHARE * tensor)
        return widened


def _only_computed_with(layer: Layer, nodes: set[ir.Node]) -> bool:
    """Whether everything that reads a layer's output computes in float, and something else than the next quantizer."""
    readers = consumers(layer.output)
    return not any(node in nodes or _only_quantized(node, nodes) for node in readers)


def _only_quantized(node: ir.Node, nodes: set[ir.Node]) -> bool:
    """Whether layers alone read what a node computes, perhaps after it was moved; its size tells no values."""
    after = [r for out in node.outputs for r in consumers(out) if not is_op(r, "Shape")]
    return bool(after) and all(r in nodes or (is_mover(r) and _only_quantized(r, nodes)) for r in after)
