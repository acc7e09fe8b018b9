"""Checks between two passes: a valid graph, and the same function after an exact pass.

`structure` runs after every pass. `ExactChecker` runs the float graph before and after an exact pass on the same inputs
at several timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from mezzotint.runtime import streams
from mezzotint.runtime.errors import MezzotintError
from mezzotint.runtime.sampling.condition_network import Conditions
from mezzotint.runtime.signature import Images, Timestep

from ..errors import ModelError, NotExact, PassError
from ..graph import nodes as graph
from ..graph import weight_store as store
from ..graph.nodes import name_of, numpy_of
from .execute import Executor
from .program import Program

CallConditions = Callable[[Images, Timestep], Conditions]
"""The conditions of one call, by its sample and timestep."""


def structure(after: Program, name: str, *, before: Program) -> None:
    """Raise PassError for a graph that is not valid ONNX, assigns a value twice, reads a value that no node computes,
    has other inputs or outputs than before, or lost a known shape. The error names the pass and the node.

    A graph that is that of `before`, node for node, was checked then.
    """
    if after.graph.num_nodes() == before.graph.num_nodes() and _facts(after.graph) == _facts(before.graph):
        return
    computed = {name_of(v) for v in after.graph.inputs} | set(after.graph.initializers)
    for node in after.graph:
        for value in node.inputs:
            if name_of(value) and name_of(value) not in computed:
                raise PassError(f"{name} left a value that no node computes: {name_of(value)!r}", where=str(node))
        for value in node.outputs:
            if name_of(value) and name_of(value) in computed:  # absent optional outputs have no name
                raise PassError(f"{name} left a value that is assigned twice: {name_of(value)!r}", where=str(node))
            computed.add(name_of(value))
    for side in ("inputs", "outputs"):
        old, new = _interface(before, side), _interface(after, side)
        if old != new:
            raise PassError(f"{name} changed the {side} of the graph from {old} to {new}", where=name)
    _shapes_kept(after, name, before)
    try:
        onnx.checker.check_model(ir.to_proto(store.bare(after.model)))
    except onnx.checker.ValidationError as error:
        raise PassError(f"{name} left an invalid ONNX model: {error}", where=name) from error


def _facts(model: ir.Graph) -> list[object]:
    """Return all that makes a graph. Two clones have the same tensors, which are compared by identity."""

    def value(v: ir.Value | None) -> object:
        return None if v is None else (v.name, v.dtype, None if v.shape is None else tuple(map(str, v.shape)))

    def attribute(a: ir.Attr) -> object:
        return a.name, a.type, id(a.value) if isinstance(a.value, ir.TensorProtocol | ir.Graph) else str(a.value)

    nodes = [
        (
            n.domain,
            n.op_type,
            n.name,
            *map(value, n.inputs),
            "->",
            *map(value, n.outputs),
            *map(attribute, n.attributes.values()),
        )
        for n in model
    ]
    tensors = [(value(v), id(v.const_value)) for v in model.initializers.values()]
    return [nodes, tensors, [*map(value, model.inputs)], [*map(value, model.outputs)]]


def _interface(program: Program, side: str) -> list[tuple[str, str]]:
    """Return names and types. An input with a default value is left out: it may become an initializer."""
    defaults = program.graph.initializers
    return [(name_of(v), str(v.dtype)) for v in getattr(program.graph, side) if name_of(v) not in defaults]


def _shapes_kept(after: Program, name: str, before: Program) -> None:
    known = {name_of(v): v.shape for node in before.graph for v in node.outputs if v.shape is not None}
    for node in after.graph:
        for value in node.outputs:
            shape = known.get(name_of(value))
            if shape is not None and value.shape is None:
                raise PassError(f"{name} lost the shape of {name_of(value)!r}, which was {shape}", where=str(node))


class ExactChecker:
    """Compares outputs of the graph before and after a pass. It keeps the last ones, so that each graph runs once."""

    BATCH = 2

    def __init__(self, folder: Path, *, threads: int | None = None, seed: int = 0) -> None:
        self._folder, self._threads, self._seed = folder, threads, seed
        self._last: tuple[str, dict[Timestep, npt.NDArray[np.float32]]] | None = None

    def compare(
        self,
        before: Program,
        after: Program,
        name: str,
        *,
        tolerance: float,
        conditions: CallConditions,
    ) -> None:
        """Raise NotExact when the largest difference exceeds `tolerance` times the largest output."""
        try:
            expected = self._outputs(before, conditions)
        except MezzotintError:
            raise
        except Exception as error:  # onnxruntime's errors have no common base
            if before.history:
                raise
            line = (str(error).splitlines() or [""])[0][:300]
            raise ModelError(f"the model cannot run: {line}", hint="export the model again") from error
        actual = self._outputs(after, conditions)
        for t in expected:
            worst = relative_difference(expected[t], actual[t])
            if not worst <= tolerance:
                raise NotExact(
                    f"{name} changed the function: relative difference {worst:.2e} at timestep {t}, "
                    f"allowed {tolerance:.0e}",
                    where=name,
                )

    def _outputs(self, program: Program, conditions: CallConditions) -> dict[Timestep, npt.NDArray[np.float32]]:
        digest = graph.digest(program.model)
        if self._last is None or self._last[0] != digest:
            timesteps = program.deployment.timesteps
            chosen = sorted({timesteps[0], timesteps[len(timesteps) // 2], timesteps[-1]})
            rng = streams.EXACTNESS.generator(self._seed)
            x = rng.standard_normal((program.fixed_batch or self.BATCH, *program.shape)).astype(np.float32)
            with Executor(program.model, self._folder, threads=self._threads) as executor:
                outputs = {
                    t: executor.call(program.signature, x, t, conditions(x, t))[program.signature.output]
                    for t in chosen
                }
            self._last = (digest, outputs)
        return self._last[1]


def relative_difference(expected: npt.NDArray[np.float32], actual: npt.NDArray[np.float32]) -> float:
    """Return the largest absolute difference over the largest absolute expected value; NaN anywhere gives NaN."""
    if expected.shape != actual.shape:
        return float("inf")
    return float(np.max(np.abs(actual - expected)) / max(float(np.max(np.abs(expected))), 1e-30))


def weights_finite(model: ir.Model) -> str | None:
    """Return the name of the first initializer with a NaN or infinite value, or None. Read one at a time."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point():
            continue
        if not np.isfinite(np.sum(numpy_of(value), dtype=np.float64)):
            return name
    return None
