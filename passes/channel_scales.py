"""channel_scales: quantize the outputs of convolutions by channel and group of timesteps, at no cost at run time.

An integer convolution must round its output to 8 bits for all of its readers, which on the digits is two thirds of the
error of the last step: the channels have different ranges, and the timestep moves each of them. Quantizers of
activations are per tensor because a kernel cannot sum over channels of different scales. Nothing sums over the channels
of an output, however. The kernel has a factor for each output channel already, for the scales of the weights, so a
scale and a zero point for each output channel and group of timesteps fit into rows that are gathered anyway
(compiler/lowering/integer.py).

For group g and channel c with the extremes l and h, and the extremes L and H of the whole tensor, the range is

    low = -margin |l|^trust |L|^(1 - trust)          high = margin h^trust H^(1 - trust)

and at least a 32nd of the tensor's range, which costs nothing and leaves room for channels that were silent in
calibration. The extremes of one channel rest on far fewer values than a tensor's percentile, and a channel that is
quiet on the calibration images may be loud on another. Measured on the digits with the extremes alone (margin 1, trust
1): epsilon gains 0.7 dB, and clipping ruins single images.

A convolution gets a table only if the mean squared step falls by `gain` dB against the quantizer of the whole tensor.
Outputs that a layer reads directly keep that quantizer. So do outputs that are only joined and quantized again, which
onnxruntime does on integers.

Errors: StatsError if observe did not measure channels.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from mezzotint.runtime.sampling.deployment import Deployment

Extremes = npt.NDArray[np.float64]
SMALLEST_SHARE = 1 / 32


@dataclass(frozen=True)
class ChannelScales(Pass):
    """Quantizers of convolution outputs with a scale for each channel.

    - `margin` (1 or more), `trust` (0 to 1): as above.
    - `gain`: in dB, the least gain for which a convolution gets a table.

    The pass needs `observe.channels` = outputs or all.
    """

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

    def check(self, passes: Sequence[Pass], deployment: Deployment) -> None:
        measured = [step.options()["channels"] for step in passes if step.name == "observe"]
        if measured and measured[-1] in ("none", "inputs", False):
            raise self._unmeasured()

    def _unmeasured(self) -> StatsError:
        return StatsError(
            "no channel was measured by itself",
            where=self.name,
            hint="measure them: --set observe.channels=outputs",
        )

    def run(self, program: Program, context: Context) -> Program:
        stats, plan = program.require_stats(), program.require_plan()
        stats.check_every_call(program.deployment.timesteps, self.name)
        convolutions = [layer for layer in layers(program.graph) if layer.output_quantized]
        if any((name_of(layer.output), 0) not in stats.channels for layer in convolutions):
            raise self._unmeasured()
        nodes = {layer.node for layer in layers(program.graph)}
        quantizers = dict(plan.quantizers)
        chosen = 0
        for layer in convolutions:
            whole = plan.of(name_of(layer.output), layer.name)
            if whole is None or not _only_computed_with(layer, nodes):
                continue
            extremes = np.stack([stats.channels[name_of(layer.output), k] for k in range(stats.groups)])
            table = self._table(extremes.astype(np.float64), whole, plan.groups)
            if table is not None:
                quantizers[Site(name_of(layer.output), layer.name)] = table
                chosen += 1
        note = (
            f"{chosen} of {len(convolutions)} convolutions have a scale for each channel; {max(plan.groups) + 1} rows"
        )
        return replace(program, plan=replace(plan, quantizers=quantizers), note=note)

    def _table(self, extremes: Extremes, whole: Quantizer, groups: tuple[int, ...]) -> Quantizer | None:
        """Return a quantizer with rows from extremes `[calls, 2, C]`, or None if they do not pay."""
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
        """Return the magnitude of one end of the ranges `[groups, C]`, between the channel's own and the tensor's."""
        tensor = ends.max(axis=1, keepdims=True)
        mixed = self.margin * ends**self.trust * tensor ** (1 - self.trust)
        widened: Extremes = np.maximum(mixed, SMALLEST_SHARE * tensor)
        return widened


def _only_computed_with(layer: Layer, nodes: set[ir.Node]) -> bool:
    """Return whether all readers of a layer's output compute in float, and more than the next quantizer."""
    readers = consumers(layer.output)
    return not any(node in nodes or _only_quantized(node, nodes) for node in readers)


def _only_quantized(node: ir.Node, nodes: set[ir.Node]) -> bool:
    """Return whether only layers read a node's outputs, perhaps through data movers; Shape nodes do not count."""
    after = [r for out in node.outputs for r in consumers(out) if not is_op(r, "Shape")]
    return bool(after) and all(r in nodes or (is_mover(r) and _only_quantized(r, nodes)) for r in after)
