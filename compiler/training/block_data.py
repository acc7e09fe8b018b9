"""What enters a block behind the trained prefix and what leaves it in the float graph, kept in memory maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.signature import Timestep

from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of
from ..rounding.layer_inputs import Latents
from .array_files import ArrayFiles
from .subgraph import Subgraph


class LossWatcher(Protocol):
    """What is called after each batch of the data, and after each iteration with its loss."""

    def __call__(self, loss: float | None = None) -> None: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """One network call of some samples at a block: the values that enter it and its float outputs, by name.

    `targets` are those of the values inside, too, that inner losses compare. `floats` are the values of the float graph
    that enter the block, if they were asked for. `weight` is the number of calibration samples that the allocation of
    the program gives to this call, or 1 without one.
    `divisible` says whether the first axis of every array is that of the samples, and the graph takes fewer of them.
    """

    timestep: Timestep
    samples: int
    divisible: bool
    inputs: Mapping[str, AnyArray]
    targets: Mapping[str, AnyArray]
    floats: Mapping[str, AnyArray] = field(default_factory=dict)
    weight: int = 1


def record(
    program: Program,
    context: Context,
    part: Subgraph,
    latents: Sequence[Latents],
    where: str,
    step: Callable[[], None],
    files: ArrayFiles,
    *,
    inner: bool = False,
    floats: Mapping[str, str] | None = None,
) -> list[Batch]:
    """Run the quantized prefix and the float graph on the latents; return what the block reads and should compute.

    The arrays lie in `files`.
    `inner` keeps what the layers inside should compute too. `floats` maps values that enter the block to the values of
    the float graph to keep for them. `step` is called after each batch. Raise PassError for values that are not finite.
    """
    floats = floats or {}
    wanted_values = dict(zip(part.outputs, part.targets, strict=True)) | (dict(part.inner) if inner else {})
    float_model = program.require_float_model()
    fed_names = {name_of(v) for v in program.graph.inputs}
    allocated = dict(zip(program.deployment.timesteps, program.allocation, strict=False))  # empty without one
    inside = [name for name in part.inputs if name not in fed_names]
    batches = []
    options: dict[str, Any] = {"threads": context.threads, "spinning": False, "only_taps": True}
    with ExitStack() as sessions:
        taps = tuple(
            dict.fromkeys([*wanted_values.values(), *(name for name in floats.values() if name not in fed_names)])
        )
        exact = sessions.enter_context(Executor(float_model, context.folder, taps=taps, **options))
        prefix = None
        if inside:  # the level is "basic", because a prefix may not be fused (compiler/core/execute.py)
            prefix = sessions.enter_context(
                Executor(program.model, context.folder, taps=inside, level="basic", **options)
            )
        for call in latents:
            fed = {program.signature.sample: call.x, **call.conditions}
            arguments = (program.signature, call.x, call.timestep, call.conditions)
            seen = {**fed, **({} if prefix is None else prefix.call(*arguments))}
            wanted = {**fed, **exact.call(*arguments)}
            inputs = {name: files.keep(np.asarray(seen[name])) for name in part.inputs}
            targets = {out: files.keep(np.asarray(wanted[name])) for out, name in wanted_values.items()}
            unquantized = {value: files.keep(np.asarray(wanted[name])) for value, name in floats.items()}
            arrays = (*inputs.values(), *targets.values(), *unquantized.values())
            if not all(np.isfinite(array).all() for array in arrays):
                raise PassError("a block reads or should compute numbers that are not finite", where=where)
            divisible = all(array.ndim > 0 and len(array) == len(call.x) for array in arrays)
            divisible = divisible and program.fixed_batch is None
            given = allocated.get(call.timestep, 1)
            batches.append(Batch(call.timestep, len(call.x), divisible, inputs, targets, unquantized, given))
            step()
    return batches
