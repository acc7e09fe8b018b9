"""The inputs of quantized layers as matrices H = X X^T, gathered by running latents through the rounded prefix.

Latents are those of the float trajectory, kept for a few of its calls. For each stage a graph that ends at the inputs
of its layers is run on them, next to the float graph if their difference is needed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.session import Level
from mezzotint.runtime.signature import Images, Timestep

from ..calibration.calibrate import follow_trajectories
from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of
from ..graph.ops import Layer
from ..graph.require import shape_of
from .gram import Extent, Gram, Unfold, choose_positions
from .weights import QuantizedWeight, layer_name, reading_directly, weight_rows

GramKey = tuple[tuple[str, Unfold], ...]


@dataclass(frozen=True, eq=False)
class Latents:
    """The inputs of one network call for one batch of samples."""

    call: int
    timestep: Timestep
    batch: int
    x: Images
    conditions: Conditions


@dataclass(frozen=True, eq=False)
class FloatInputs:
    """A weight of the float graph, with its outputs along `axis`, and the inputs of the layers that read it.

    `key` identifies H: layers that read the same value in the same way share one.
    """

    floats: ir.Value
    axis: int
    taps: tuple[str, ...]
    unfolds: tuple[Unfold, ...]
    inputs: int

    def rows(self) -> Floats:
        """Return the weights, `[outputs, inputs of an output]`."""
        return weight_rows(self.floats, self.axis)

    @property
    def read_as_float(self) -> tuple[str, ...]:
        """The names of the inputs in the float graph."""
        return self.taps

    @property
    def key(self) -> GramKey:
        return tuple(zip(self.taps, self.unfolds, strict=True))

    @property
    def groups(self) -> int:
        return self.unfolds[0].groups

    @property
    def gram_bytes(self) -> float:
        return 4.0 * self.groups * self.inputs**2


@dataclass(frozen=True, eq=False)
class Inputs(FloatInputs):
    """A weight with the inputs of its layers: `taps` in the quantized graph, `float_taps` in the float one.

    `floats` is the weight in the float graph: in the quantized one it may be cut off where the grid of a narrow row
    ends.
    """

    weight: QuantizedWeight
    float_taps: tuple[str, ...]
    float_weights: tuple[str, ...]

    @staticmethod
    def of(weight: QuantizedWeight, float_layers: Mapping[str, Layer], where: str) -> Inputs:
        """Return the inputs of a weight. Raise PassError for a layer that the float graph does not have."""
        value = weight.value
        shape = shape_of(value).numpy()
        found = [float_layers.get(layer_name(node)) for node in weight.readers]
        if None in found:
            name = layer_name(weight.readers[found.index(None)])
            raise PassError(
                f"the float graph has no layer {name!r}", where=where, hint="keep the layers' names behind insert_qdq"
            )
        known = [layer for layer in found if layer is not None]
        inputs = prod(shape) // shape[weight.axis]
        unfolds = tuple(Unfold.of(node, shape) for node in weight.readers)
        if len({unfold.groups for unfold in unfolds}) > 1:
            raise PassError("one weight is read by convolutions of different groups", where=weight.name)
        floats = known[0].weight
        if floats is None or floats.shape is None or floats.shape.numpy() != shape:
            raise PassError("the weight of a layer has another shape in the float graph", where=weight.name)
        return Inputs(
            floats,
            weight.axis,
            tuple(name_of(node.inputs[0]) for node in weight.readers),
            unfolds,
            int(inputs),
            weight,
            tuple(name_of(layer.activations[0]) for layer in known),
            tuple(name_of(layer.weight) for layer in known),
        )

    @property
    def read_as_float(self) -> tuple[str, ...]:
        return self.float_taps


@dataclass(eq=False)
class Gathered:
    """The matrices of one stage. Each is freed when its last weight is rounded."""

    _grams: dict[GramKey, Gram] = field(default_factory=dict)
    _shifts: dict[int, Floats] = field(default_factory=dict)
    _users: dict[GramKey, int] = field(default_factory=dict)

    def expect(self, inputs: FloatInputs, shifts: bool) -> None:
        if inputs.key not in self._grams:
            self._grams[inputs.key] = Gram(inputs.groups, inputs.inputs)
        self._users[inputs.key] = self._users.get(inputs.key, 0) + 1
        if shifts:
            self._shifts[id(inputs)] = np.zeros(inputs.rows().shape, np.float32)

    def add(self, key: GramKey, columns: Floats, factor: float) -> None:
        self._grams[key].add(columns, factor)

    def add_shift(self, inputs: FloatInputs, rows: Floats, difference: Floats, columns: Floats) -> None:
        """Sum W (X_f - X) X^T over `columns` `[positions, groups, d]`."""
        each = len(rows) // inputs.groups
        for g in range(inputs.groups):
            part = slice(g * each, (g + 1) * each)
            self._shifts[id(inputs)][part] += (difference[:, g] @ rows[part].T).T @ columns[:, g]

    def gram(self, inputs: FloatInputs) -> Floats:
        """H `[groups, d, d]`."""
        return self._grams[inputs.key].matrix()

    def side(self, inputs: FloatInputs) -> Floats | None:
        """Return H_O of a weight whose error counts along its outputs too (compiler/gradients/curvature.py)."""
        return None

    def extent(self, inputs: FloatInputs) -> Extent:
        """The range of the inputs whose products H has."""
        return self._grams[inputs.key].extent

    def shift(self, inputs: FloatInputs) -> Floats | None:
        return self._shifts.get(id(inputs))

    def forget(self, inputs: FloatInputs) -> None:
        self._shifts.pop(id(inputs), None)
        self._users[inputs.key] -= 1
        if not self._users[inputs.key]:
            del self._grams[inputs.key]


def chosen_latents(program: Program, context: Context, calls: int) -> list[Latents]:
    """The float trajectory's latents at so many network calls, spread evenly, in the order of the calls."""
    float_model = program.require_float_model()
    all_calls = program.deployment.calls
    wanted = set(np.rint(np.linspace(0, len(all_calls) - 1, min(calls, len(all_calls)))).astype(int).tolist())
    found: list[Latents] = []
    seen = 0
    with Executor(float_model, context.folder, threads=context.threads) as executor:

        def denoiser(x: Images, t: Timestep, conditions: Conditions) -> Images:
            nonlocal seen
            batch, call = divmod(seen, len(all_calls))
            seen += 1
            if call in wanted:
                found.append(Latents(call, t, batch, np.array(x), conditions))
            output = executor.call(program.signature, x, t, conditions)[program.signature.output]
            return np.asarray(output, np.float32)

        follow_trajectories(program, context, denoiser, "latents of the trajectory")
    return sorted(found, key=lambda latents: (latents.call, latents.batch))


def gather(
    program: Program,
    context: Context,
    stage: Sequence[Inputs],
    latents: Sequence[Latents],
    *,
    rounded: Collection[str] = (),
    columns: int,
    balance: bool,
    shifts: bool,
    step: Callable[[], None],
) -> Gathered:
    """Return H of every weight of a stage, from at most `columns` positions of its inputs; `step` after each batch.

    `rounded` names the constants that are grid points already.
    """
    float_model = program.require_float_model()
    gathered = Gathered()
    for inputs in stage:
        gathered.expect(inputs, shifts)
    graph_inputs = {name_of(v) for v in program.graph.inputs}
    taps = [t for t in dict.fromkeys(t for inputs in stage for t in inputs.taps) if t not in graph_inputs]
    float_taps = [t for t in dict.fromkeys(t for inputs in stage for t in inputs.float_taps) if t not in graph_inputs]
    with ExitStack() as sessions:

        def prefix(model: ir.Model, taps: Sequence[str], level: Level) -> Executor:
            return sessions.enter_context(
                Executor(
                    model,
                    context.folder,
                    taps=taps,
                    threads=context.threads,
                    level=level,
                    spinning=False,
                    only_taps=True,
                )
            )

        # Convolutions in float behind quantizers that are computed exactly: a prefix may not be fused (execute.py).
        quantized = prefix(reading_directly(program.model, rounded), taps, "basic")
        exact = prefix(float_model, float_taps, "all") if shifts else None
        limit = max(columns // len(latents), 1)
        for batch in latents:
            seed = [context.seed, batch.call, batch.batch]
            fed = {program.signature.sample: batch.x, **batch.conditions}
            arguments = (program.signature, batch.x, batch.timestep, batch.conditions)
            seen = {**fed, **quantized.call(*arguments)}
            wanted = {} if exact is None else {**fed, **exact.call(*arguments)}
            _add_batch(gathered, stage, seen, wanted, limit, seed, balance)
            step()
    return gathered


def gather_floats(
    program: Program,
    context: Context,
    stage: Sequence[FloatInputs],
    latents: Sequence[Latents],
    *,
    columns: int,
    balance: bool,
    step: Callable[[], None],
) -> Gathered:
    """Return H of every weight of a stage in a float graph, as `gather` does for a quantized one."""
    gathered = Gathered()
    for inputs in stage:
        gathered.expect(inputs, shifts=False)
    graph_inputs = {name_of(v) for v in program.graph.inputs}
    taps = [t for t in dict.fromkeys(t for inputs in stage for t in inputs.taps) if t not in graph_inputs]
    limit = max(columns // len(latents), 1)
    with Executor(
        program.model, context.folder, taps=taps, threads=context.threads, spinning=False, only_taps=bool(taps)
    ) as executor:
        for batch in latents:
            seen = executor.call(program.signature, batch.x, batch.timestep, batch.conditions)
            seen |= {program.signature.sample: batch.x, **batch.conditions}
            _add_batch(gathered, stage, seen, {}, limit, [context.seed, batch.call, batch.batch], balance)
            step()
    return gathered


def _add_batch(
    gathered: Gathered,
    stage: Sequence[FloatInputs],
    seen: Mapping[str, Floats],
    wanted: Mapping[str, Floats],
    limit: int,
    seed: Sequence[int],
    balance: bool,
) -> None:
    """One batch's columns; those of a float input are cut at the same positions."""
    added: set[GramKey] = set()
    for inputs in stage:
        if inputs.key in added and not wanted:
            continue
        rows = inputs.rows() if wanted else None
        for tap, float_tap, unfold in zip(inputs.taps, inputs.read_as_float, inputs.unfolds, strict=True):
            x = seen[tap]
            rng = streams.POSITIONS.generator(*seed, zlib.crc32(tap.encode()))
            chosen = choose_positions(unfold.positions(x.shape), limit, rng)
            found = unfold.columns(x, chosen)
            mean = float(np.mean(np.square(found), dtype=np.float64))
            factor = np.float32(1 / np.sqrt(mean)) if balance and mean > 0 else np.float32(1)
            found *= factor
            if inputs.key not in added:
                gathered.add(inputs.key, found, float(factor))
            if rows is not None:
                difference = unfold.columns(wanted[float_tap], chosen) * factor - found
                gathered.add_shift(inputs, rows, difference, found)
        added.add(inputs.key)
