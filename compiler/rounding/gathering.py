"""The matrices H of a stage, gathered by running latents through a graph that ends at the inputs of its layers.

The quantized graph is rounded up to there; the float graph runs beside it where the difference of inputs is needed. A
batch of latents is a piece of work, here or in another process: its columns come back, and are added to H in order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from mezzotint.runtime.session import Level
from mezzotint.runtime.signature import Signature

from ..core.execute import Executor, NetworkSession, write_network
from ..core.pipeline import Context
from ..core.program import Program
from ..graph.nodes import name_of
from .column_cuts import ColumnCut, PlainReadings, column_cuts
from .layer_inputs import FloatInputs, Gathered, Inputs, Latents
from .weights import reading_directly

_QUANTIZED, _FLOAT = "quantized", "float"
_LEVELS: dict[str, Level] = {_QUANTIZED: "basic", _FLOAT: "all"}
"""Convolutions in float behind quantizers that are computed exactly: a prefix may not be fused (execute.py)."""


@dataclass(frozen=True)
class GatherWork:
    """What the batches of a stage share, without a graph."""

    stage: tuple[PlainReadings, ...]
    signature: Signature
    limit: int
    seed: int
    balance: bool
    shifts: bool

    def cuts(self, quantized: NetworkSession, exact: NetworkSession | None, batch: Latents) -> Iterator[ColumnCut]:
        """Yield the columns of a batch of latents, from prefixes of both graphs."""
        fed = {self.signature.sample: batch.x, **batch.conditions}
        arguments = (self.signature, batch.x, batch.timestep, batch.conditions)
        seen = {**fed, **quantized.call(*arguments)}
        wanted = {} if exact is None else {**fed, **exact.call(*arguments)}
        seed = [self.seed, batch.call, batch.batch]
        yield from column_cuts(self.stage, seen, wanted, self.limit, seed, self.balance)

    def open(self, folder: Path, threads: int) -> Callable[[Latents], list[ColumnCut]]:
        """Return the function from a batch to its columns. The folder has the prefixes."""

        def prefix(stem: str) -> NetworkSession:
            return NetworkSession(folder / f"{stem}.onnx", threads=threads, level=_LEVELS[stem], spinning=False)

        quantized, exact = prefix(_QUANTIZED), prefix(_FLOAT) if self.shifts else None
        return lambda batch: list(self.cuts(quantized, exact, batch))


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

    `rounded` names the constants that are grid points already. Workers run the batches where the context has some.
    """
    gathered = Gathered()
    for inputs in stage:
        gathered.expect(inputs, shifts)
    graph_inputs = {name_of(v) for v in program.graph.inputs}
    prefixes = {_QUANTIZED: (reading_directly(program.model, rounded), _taps(stage, graph_inputs, quantized=True))}
    if shifts:
        prefixes[_FLOAT] = program.require_float_model(), _taps(stage, graph_inputs, quantized=False)
    readings = tuple(PlainReadings.of(inputs) for inputs in stage)
    limit = max(columns // len(latents), 1)
    work = GatherWork(readings, program.signature, limit, context.seed, balance, shifts)
    for cuts in _cuts_of_batches(work, prefixes, latents, context):
        for cut in cuts:
            gathered.take(stage[cut.item], cut)
        step()
    return gathered


def _cuts_of_batches(
    work: GatherWork, prefixes: dict[str, tuple[ir.Model, list[str]]], latents: Sequence[Latents], context: Context
) -> Iterator[Iterator[ColumnCut] | list[ColumnCut]]:
    """Yield the columns of each batch, in order."""
    if context.spread is not None:
        with tempfile.TemporaryDirectory(dir=context.folder) as folder:
            for stem, (model, taps) in prefixes.items():
                write_network(model, Path(folder), stem, taps=taps, only_taps=True)
            yield from context.spread.in_order(work, Path(folder), latents, "inputs of layers", unit=None)
        return
    with ExitStack() as sessions:
        opened = {
            stem: sessions.enter_context(
                Executor(
                    model,
                    context.folder,
                    taps=taps,
                    threads=context.threads,
                    level=_LEVELS[stem],
                    spinning=False,
                    only_taps=True,
                )
            )
            for stem, (model, taps) in prefixes.items()
        }
        for batch in latents:
            yield work.cuts(opened[_QUANTIZED], opened.get(_FLOAT), batch)


def _taps(stage: Sequence[Inputs], graph_inputs: set[str], *, quantized: bool) -> list[str]:
    names = (name for inputs in stage for name in (inputs.taps if quantized else inputs.float_taps))
    return [name for name in dict.fromkeys(names) if name not in graph_inputs]


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
            for cut in column_cuts(stage, seen, {}, limit, [context.seed, batch.call, batch.batch], balance):
                gathered.take(stage[cut.item], cut)
            step()
    return gathered
