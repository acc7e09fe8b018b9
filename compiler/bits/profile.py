"""The error profile of an allocation's units: squared errors of the output at each width and each network call.

Measured on the trajectory of the float network (a few samples, a few of the deployment's calls), with one unit
quantized and all others in float:

    noise(u, c, t) = sum |eps_{u,c}(x_t) - eps(x_t)|^2              signal(t) = sum |eps(x_t)|^2

sqnr    this noise, for every unit and width: units * (widths + activation widths) runs over the scenes
layer   the layers' own outputs in place of epsilon, all in the same run: widths * (weights / 256 MB) runs, each about
        twice as expensive as a plain one, for any number of layers; effects behind a layer are left out

Scores from gradients, which take one backward pass for all units, are in compiler/gradients: hawq, lrp.
A run over the scenes is calls * samples / batch network calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mezzotint.runtime.arrays import AnyArray, Doubles

from ..core.execute import Executor, Feeds
from ..core.pipeline import Context
from ..core.program import Program
from ..graph.nodes import Builder, Names, name_of, numpy_of
from ..scales.weights import rounded_weight
from .simulate import Scene, Simulator, signal
from .units import FLOAT, BitChoice, Unit, WeightQuantizers

Weighting = Literal["relative", "absolute"]
CHUNK_BYTES = 256 << 20  # of weights that a graph of layer errors holds at a time


@dataclass(frozen=True, eq=False)
class Trace:
    """The trace of the Gauss-Newton matrix of one weight at each call `[calls]`, the mean of several probes.

    `spread` is the standard error of its mean over the calls (each relative to the signal), as a share of that mean;
    None for too few probes to tell.
    """

    values: Doubles
    probes: int
    spread: float | None

    def to_json(self) -> dict[str, Any]:
        return {"values": self.values.tolist(), "probes": self.probes, "spread": self.spread}


@dataclass(frozen=True, eq=False)
class Profile:
    """`weights` and `activations` are noise `[calls]` by unit and bits, `signal` is `[calls]`; `traces` are of hawq."""

    calls: tuple[int, ...]
    signal: Doubles
    weights: Mapping[str, Mapping[int, Doubles]]
    activations: Mapping[str, Mapping[int, Doubles]]
    traces: Mapping[str, Trace] = field(default_factory=dict)

    def noise(self, unit: str, choice: BitChoice) -> Doubles:
        """Return the noise of a unit at each call. Errors of weights and activations are independent and add up."""
        if choice == FLOAT:
            return np.zeros(len(self.calls))
        parts = [self.weights.get(unit, {}).get(choice.weight), self.activations.get(unit, {}).get(choice.activation)]
        return sum((part for part in parts if part is not None), np.zeros(len(self.calls)))

    def note(self) -> str:
        """Return what the traces took, as the end of a line; nothing for other scores."""
        traces = self.traces.values()
        if not traces:
            return ""
        probes = f"; {sum(trace.probes for trace in traces) / len(traces):.1f} probes for each trace"
        known = [trace.spread for trace in traces if trace.spread is not None]
        return f"{probes}, with a standard error of {max(known):.0%} at most" if known else probes

    def error(self, unit: str, choice: BitChoice, weighting: Weighting) -> float:
        return self.share(self.noise(unit, choice), weighting)

    def share(self, noise: Doubles, weighting: Weighting) -> float:
        """Return noise `[calls]` as a share of the signal: the mean over calls, or that of the sums."""
        if weighting == "relative":
            return float(np.mean(noise / self.signal))
        return float(noise.sum() / self.signal.sum())


@dataclass(frozen=True, eq=False)
class Profiler:
    """Measures profiles of units of one program at the given widths."""

    program: Program
    context: Context
    quantizers: WeightQuantizers
    units: Sequence[Unit]
    widths: tuple[int, ...]
    activation_widths: tuple[int, ...]

    @property
    def by(self) -> str:
        return self.quantizers.by

    def rounded(self, unit: Unit, bits: int) -> npt.NDArray[np.float32]:
        return rounded_weight(numpy_of(unit.require_weight()), self.quantizers(unit.layers[0], bits))

    def simulator(self) -> Simulator:
        return Simulator(
            self.program,
            self.context,
            weights=[name_of(unit.weight) for unit in self.units if unit.weight is not None],
            layers=[layer for unit in self.units for layer in unit.layers] if self.activation_widths else (),
            plan=self.quantizers.plan,
        )

    def outputs(self, simulator: Simulator, scenes: Sequence[Scene]) -> Profile:
        """The score `sqnr`."""

        def at_widths(unit: Unit) -> dict[int, Doubles]:
            name = name_of(unit.weight)
            return {b: simulator.noise(scenes, {name: self.rounded(unit, b)}) for b in self.widths}

        return self.profile_of(simulator, scenes, at_widths)

    def own_outputs(self, simulator: Simulator, scenes: Sequence[Scene]) -> Profile:
        """The scope `layer`: the share of noise in each layer's own output."""
        weighted = [unit for unit in self.units if unit.weight is not None]
        found: dict[str, dict[int, Doubles]] = {unit.name: {} for unit in weighted}
        chunks = _chunks(weighted)
        for k, (bits, chunk) in enumerate((b, c) for b in self.widths for c in chunks):
            self.context.progress(self.by, k, len(self.widths) * len(chunks))
            for name, share in self._own_shares(chunk, bits, scenes).items():
                found[name][bits] = share * signal(scenes)
        return self.profile_of(simulator, scenes, lambda unit: found[unit.name])

    def profile_of(
        self, simulator: Simulator, scenes: Sequence[Scene], at_widths: Callable[[Unit], Mapping[int, Doubles]]
    ) -> Profile:
        """Return the profile with the noise of weights that `at_widths` gives, and measured noise of activations."""
        calls = tuple(sorted({scene.call for scene in scenes}))
        weights: dict[str, Mapping[int, Doubles]] = {}
        activations: dict[str, Mapping[int, Doubles]] = {}
        for k, unit in enumerate(self.units):
            if unit.weight is not None:
                weights[unit.name] = at_widths(unit)
            activations[unit.name] = {
                bits: simulator.noise(scenes, partial(self.switched, simulator, unit, bits))
                for bits in self.activation_widths
            }
            self.context.progress(self.by, k + 1, len(self.units))
        return Profile(calls, signal(scenes), weights, activations)

    def switched(self, simulator: Simulator, unit: Unit, bits: int, call: int) -> Feeds:
        """Return the feeds that quantize all activations of a unit at a call."""
        fed: dict[str, AnyArray] = {}
        for layer in unit.layers:
            fed |= simulator.activations(layer.name, bits, call)
        return fed

    def quantized(self, simulator: Simulator, unit: Unit, choice: BitChoice, call: int) -> Feeds:
        """Return the feeds that quantize a whole unit at a call."""
        fed = self.switched(simulator, unit, choice.activation, call) if self.activation_widths else {}
        return fed if unit.weight is None else {**fed, name_of(unit.weight): self.rounded(unit, choice.weight)}

    def _own_shares(self, chunk: Sequence[Unit], bits: int, scenes: Sequence[Scene]) -> dict[str, Doubles]:
        """Return, by unit, noise over signal of its first layer's output `[calls]`. A copy of it gives the noise."""
        model = self.program.model.clone()
        names = Names(model.graph)
        nodes = {node.name or name_of(node.outputs[0]): node for node in model.graph}
        taps: dict[str, tuple[str, str]] = {}
        for unit in chunk:
            node = nodes[unit.name]
            build = Builder(model.graph, names, after=node)
            error = build.constant(f"{unit.name}_error", self.rounded(unit, bits) - numpy_of(unit.require_weight()))
            stem, copied = f"{unit.name}_noise", _copied(node)
            noise = build.op(node.op_type, [node.inputs[0], error], stem, like=node.outputs[0], attributes=copied)
            sums = [
                name_of(build.op("ReduceSumSquare", [v], "power", dtype=ir.DataType.FLOAT, attributes={"keepdims": 0}))
                for v in (noise, node.outputs[0])
            ]
            taps[unit.name] = (sums[0], sums[1])
        totals: dict[str, dict[int, Doubles]] = {name: {} for name in taps}
        flat = [name for pair in taps.values() for name in pair]
        with Executor(model, self.context.folder, taps=flat, threads=self.context.threads) as executor:
            for scene in scenes:
                seen = executor.call(self.program.signature, scene.x, scene.timestep, scene.conditions)
                for name, pair in taps.items():
                    powers = np.array([float(seen[tap]) for tap in pair])
                    totals[name][scene.call] = totals[name].get(scene.call, np.zeros(2)) + powers
        shares = {n: np.array([by_call[c] for c in sorted(by_call)]) for n, by_call in totals.items()}
        return {name: pair[:, 0] / np.maximum(pair[:, 1], 1e-30) for name, pair in shares.items()}


def _copied(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _chunks(units: Sequence[Unit]) -> list[list[Unit]]:
    """Split the units into chunks of at most CHUNK_BYTES of weights; a chunk has at least one unit."""
    chunks: list[list[Unit]] = []
    size = 0
    for unit in units:
        if not chunks or size + 4 * unit.size > CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(unit)
        size += 4 * unit.size
    return chunks
