"""The inputs of quantized layers, their matrices H = X X^T, and the latents that they are gathered from.

Latents are those of the float trajectory, kept for a few of its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from mezzotint.runtime.arrays import Floats
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep

from ..calibration.calibrate import follow_trajectories
from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of
from ..graph.ops import Layer
from ..graph.require import shape_of
from .column_cuts import ColumnCut, GramKey
from .gram import Extent, Gram, Unfold
from .weights import QuantizedWeight, layer_name, weight_rows


@dataclass(frozen=True, eq=False)
class Latents:
    """The inputs of one network call for one batch of samples."""

    call: int
    timestep: Timestep
    batch: int
    x: Images
    conditions: Conditions

    def __str__(self) -> str:
        return f"call {self.call}, batch {self.batch}"


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

    def take(self, inputs: FloatInputs, cut: ColumnCut) -> None:
        """Add columns of a weight's inputs."""
        if cut.counted:
            self.add(inputs.key, cut.columns, cut.factor)
        if cut.difference is not None:
            self.add_shift(inputs, inputs.rows(), cut.difference, cut.columns)

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
