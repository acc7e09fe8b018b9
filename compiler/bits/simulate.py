"""A float graph in one session; single weights and activations can be quantized for one call.

A weight is both an initializer and an input: a fed array replaces it. onnxruntime then cannot pack the weight when it
builds the session: a call of the digits takes 15 to 20 % longer, but a session for each candidate would take longer
than its calls. An activation has a pair of Q and DQ next to it, and a switch (Where) that selects one of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import AnyArray, Doubles
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep

from ..calibration.calibrate import follow_trajectories
from ..core.execute import Executor, Feeds, feeds
from ..core.pipeline import Context
from ..core.program import Plan, Program, Quantizer
from ..graph.nodes import Builder, Names, consumers, name_of, replace_use
from ..graph.ops import Layer
from ..graph.require import required
from .units import narrowed


@dataclass(frozen=True, eq=False)
class Scene:
    """One batch at one network call of the float trajectory: `call` is its index, `output` the float output."""

    call: int
    timestep: Timestep
    x: Images
    conditions: Conditions
    output: Images


@dataclass(frozen=True)
class _View:
    """The switch of one quantizer in the graph, the value behind it, and its parameters: names of inputs."""

    switch: str
    value: str
    scale: str
    zero: str
    top: str
    quantizer: Quantizer

    def feeds(self, quantizer: Quantizer, row: int) -> Feeds:
        """Return what switches to a quantizer, with this row if it is a table."""
        at = row if quantizer.table else ...
        return {
            self.switch: np.array(True),
            self.scale: np.asarray(quantizer.scale[at]),
            self.zero: np.asarray(quantizer.zero_point[at]),
            self.top: np.array(quantizer.format.qmax, quantizer.format.dtype),
        }


class Simulator:
    """`weights` (values) can be replaced, the activations of `layers` switched to their quantizers in `plan`.

    With `inputs_only`, outputs of convolutions have no quantizers, as in the lowering `constant`. A context manager: it
    writes files.
    """

    def __init__(
        self,
        program: Program,
        context: Context,
        *,
        weights: Sequence[str] = (),
        layers: Sequence[Layer] = (),
        plan: Plan | None = None,
        model: ir.Model | None = None,
        inputs_only: bool = False,
    ) -> None:
        self._program = program
        self._inputs_only = inputs_only
        clone = (model or program.model).clone()
        self._groups = plan.groups if plan is not None else ()
        self._views: dict[str, list[_View]] = {}
        if plan is not None and layers:
            self._add_switches(clone, layers, plan)
        for name in weights:
            clone.graph.inputs.append(clone.graph.initializers[name])
        self._executor = Executor(clone, context.folder, threads=context.threads)
        self._inputs = self._executor.inputs

    def output(self, x: Images, t: Timestep, conditions: Conditions, changes: Feeds | None = None) -> Images:
        """Return the network's output of one call. `changes` are feeds that replace weights or switch activations."""
        plain = feeds(self._inputs, self._program.signature, x, t, conditions)
        outputs = self._executor.run({**plain, **(changes or {})})
        return np.asarray(outputs[self._program.signature.output], np.float32)

    def activations(self, layer: str, bits: int, call: int) -> Feeds:
        """Return the feeds that switch the activations of a layer to `bits`, with the table rows of the call."""
        switched: dict[str, AnyArray] = {}
        for view in self._views[layer]:
            switched |= view.feeds(narrowed(view.quantizer, bits, view.quantizer.by), self._row(call))
        return switched

    def quantized(self, plan: Plan, call: int) -> Feeds:
        """Return the feeds that switch every activation to its quantizer in a plan, with the table rows of the call.

        The formats are those of the plan that this simulator was made for.
        """
        switched: dict[str, AnyArray] = {}
        for layer, views in self._views.items():
            for view in views:
                quantizer = required(plan.of(view.value, layer), f"the quantizer of {view.value!r}", layer)
                switched |= view.feeds(quantizer, self._row(call))
        return switched

    def _row(self, call: int) -> int:
        return self._groups[call] if self._groups else 0

    def follow(self, context: Context, calls: Sequence[int], samples: int, stage: str) -> list[Scene]:
        """Return the scenes of the float trajectory of a few samples at these network calls."""
        found: list[Scene] = []
        timesteps = self._program.deployment.timesteps

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            output = self.output(x, t, conditions)
            if (call := timesteps.index(t)) in calls:
                found.append(Scene(call, t, x.copy(), conditions, output.copy()))
            return output

        follow_trajectories(self._program, replace(context, samples=samples), denoiser, stage)
        return found

    def noise(self, scenes: Sequence[Scene], changes: Feeds | Callable[[int], Feeds]) -> Doubles:
        """Return the summed squared error of the output at each call of the scenes, in call order `[calls]`.

        `changes` are the same feeds at every call, or a function of the call.
        """
        sums: dict[int, float] = {}
        for scene in scenes:
            fed = changes(scene.call) if callable(changes) else changes
            got = self.output(scene.x, scene.timestep, scene.conditions, fed).astype(np.float64)
            sums[scene.call] = sums.get(scene.call, 0.0) + float(np.sum((got - scene.output) ** 2))
        return np.array([sums[call] for call in sorted(sums)])

    def close(self) -> None:
        self._executor.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _add_switches(self, model: ir.Model, layers: Sequence[Layer], plan: Plan) -> None:
        graph = model.graph
        names = Names(graph)
        nodes = {node.name or name_of(node.outputs[0]): node for node in graph}
        for layer in layers:
            node = nodes[layer.name]
            views = []
            for seen in layer.activations:
                quantizer = required(plan.of(name_of(seen), layer.name), f"the quantizer of {name_of(seen)!r}", node)
                value = next(v for v in node.inputs if v is not None and name_of(v) == name_of(seen))
                out, view = self._switch(Builder(graph, names, before=node), value, name_of(seen), quantizer)
                replace_use(node, value, out)
                views.append(view)
            output_quantizer = plan.of(name_of(layer.output), layer.name)
            kept = self._inputs_only or not layer.output_quantized or layer.output.is_graph_output()
            if not kept and output_quantizer is not None:
                value = node.outputs[0]
                readers = consumers(value)
                out, view = self._switch(
                    Builder(graph, names, after=node), value, name_of(layer.output), output_quantizer
                )
                for reader in readers:
                    replace_use(reader, value, out)
                views.append(view)
            self._views[layer.name] = views

    def _switch(self, build: Builder, value: ir.Value, seen: str, quantizer: Quantizer) -> tuple[ir.Value, _View]:
        """Write the pair and the switch behind a value; `seen` is its name in the graph of the layers."""
        first = quantizer.scale[0] if quantizer.table else quantizer.scale
        zero = quantizer.zero_point[0] if quantizer.table else quantizer.zero_point
        stem = name_of(value)
        made = [
            build.constant(f"{stem}_{part}", array)
            for part, array in (
                ("switch", np.array(False)),
                ("scale", np.asarray(first)),
                ("zero", np.asarray(zero)),
                ("top", np.array(quantizer.format.qmax, quantizer.format.dtype)),
            )
        ]
        build.graph.inputs.extend(made)
        switch, scale, zero_point, top = made
        axis = {} if quantizer.axis is None else {"axis": quantizer.axis}
        dtype = ir.DataType.from_numpy(quantizer.zero_point.dtype)
        q = build.op(
            "QuantizeLinear", [value, scale, zero_point], f"{stem}_q", like=value, dtype=dtype, attributes=axis
        )
        bottom = build.constant(f"{stem}_bottom", np.array(quantizer.format.qmin, quantizer.format.dtype))
        q = build.op("Clip", [q, bottom, top], f"{stem}_clipped", like=q)
        dq = build.op("DequantizeLinear", [q, scale, zero_point], f"{stem}_dq", like=value, attributes=axis)
        out = build.op("Where", [switch, dq, value], f"{stem}_seen", like=value)
        return out, _View(name_of(switch), seen, name_of(scale), name_of(zero_point), name_of(top), quantizer)


def signal(scenes: Sequence[Scene]) -> Doubles:
    """Return the sum of squares of the float output at each call of the scenes, in call order."""
    sums: dict[int, float] = {}
    for scene in scenes:
        sums[scene.call] = sums.get(scene.call, 0.0) + float(np.sum(scene.output.astype(np.float64) ** 2))
    return np.array([sums[call] for call in sorted(sums)])
