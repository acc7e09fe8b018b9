"""What enters a block behind the trained prefix and what leaves it in the float graph, kept in memory maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.signature import Timestep

from ..core.execute import Executor
from ..core.pipeline import Context
from ..core.program import Program
from ..errors import PassError
from ..graph.nodes import name_of
from ..rounding.layer_inputs import Latents
from .subgraph import Subgraph


@dataclass(frozen=True, eq=False)
class Batch:
    """One network call of some samples at a block: the values that enter it and its float outputs, by name.

    `divisible` says whether the first axis of every array is that of the samples, and the graph takes fewer of them.
    """

    timestep: Timestep
    samples: int
    divisible: bool
    inputs: Mapping[str, AnyArray]
    targets: Mapping[str, AnyArray]


@dataclass(eq=False)
class BlockData:
    """The batches of one block. The arrays lie in files of `folder` and are read when they are used."""

    batches: list[Batch]
    folder: Path
    _files: list[Path] = field(default_factory=list)

    def keep(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Write an array to a file of its own and return it as a memory map."""
        path = self.folder / f"{len(self._files)}.npy"
        mapped = np.lib.format.open_memmap(path, mode="w+", dtype=array.dtype, shape=array.shape)
        mapped[...] = array
        mapped.flush()
        self._files.append(path)
        kept: npt.NDArray[Any] = np.load(path, mmap_mode="r")
        return kept

    def close(self) -> None:
        """Remove the files."""
        self.batches.clear()
        for path in self._files:
            path.unlink()
        self.folder.rmdir()


def record(
    program: Program, context: Context, part: Subgraph, latents: Sequence[Latents], where: str, step: Callable[[], None]
) -> BlockData:
    """Run the quantized prefix and the float graph on the latents and keep what the block reads and should compute.

    `step` is called after each batch. Raise PassError for values that are not finite.
    """
    float_model = program.require_float_model()
    given = {name_of(v) for v in program.graph.inputs}
    inside = [name for name in part.inputs if name not in given]
    data = BlockData([], Path(mkdtemp(prefix="block-", dir=context.folder)))
    options: dict[str, Any] = {"threads": context.threads, "spinning": False, "only_taps": True}
    with ExitStack() as sessions:
        exact = sessions.enter_context(Executor(float_model, context.folder, taps=part.targets, **options))
        prefix = None
        if inside:  # the level is "basic", because a prefix may not be fused (compiler/core/execute.py)
            prefix = sessions.enter_context(
                Executor(program.model, context.folder, taps=inside, level="basic", **options)
            )
        for call in latents:
            fed = {program.signature.sample: call.x, **call.conditions}
            arguments = (program.signature, call.x, call.timestep, call.conditions)
            seen = {**fed, **({} if prefix is None else prefix.call(*arguments))}
            wanted = exact.call(*arguments)
            inputs = {name: data.keep(np.asarray(seen[name])) for name in part.inputs}
            targets = {
                out: data.keep(np.asarray(wanted[name])) for out, name in zip(part.outputs, part.targets, strict=True)
            }
            if not all(np.isfinite(array).all() for array in (*inputs.values(), *targets.values())):
                raise PassError("a block reads or should compute numbers that are not finite", where=where)
            divisible = all(len(array) == len(call.x) for array in (*inputs.values(), *targets.values()))
            divisible = divisible and program.fixed_batch is None
            data.batches.append(Batch(call.timestep, len(call.x), divisible, inputs, targets))
            step()
    return data
