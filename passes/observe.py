"""observe: run the sampler on the float graph and collect statistics of every activation that can be quantized.

Calibration follows the deployed sampler from noise to image, so each timestep sees the latents that occur there
(Q-Diffusion, arXiv 2302.04304, samples calibration data along the trajectory for the same reason). The activations of
each call are added to mergeable summaries and then dropped.

After allocate_steps only the first n samples of each call enter the summaries, n being the call's allocation. The
others are sampled as well, so the trajectories do not depend on the allocation.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from mezzotint.compiler.calibration.calibrate import batch_spans, follow_trajectories
from mezzotint.compiler.calibration.collect import CollectedPart, Collector
from mezzotint.compiler.calibration.stats_cache import measured_once
from mezzotint.compiler.core import snapshot
from mezzotint.compiler.core.context import Spread
from mezzotint.compiler.core.execute import Executor
from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.core.stats import Stats
from mezzotint.compiler.errors import RecipeError
from mezzotint.compiler.graph import nodes as graphs
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rescaling.scaling import channel_axis
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.signature import Images, Timestep


@dataclass(frozen=True)
class Observe(Pass):
    """Measured statistics: how fine over the calls, and which of them by channel.

    - `groups`: the number of contiguous groups of network calls with summaries of their own; 0 gives each call its own.
    - `channels`: the values that are also measured by channel. `outputs`: extremes of the outputs of convolutions;
      `inputs`: extremes and mean squares of the inputs of layers with weights; `all`: both. True means `outputs`, as in
      older recipes.
    - `samples`: measure at most so many of the calibration images; None measures all of them.
    """

    groups: int = 1
    channels: bool | Literal["none", "outputs", "inputs", "all"] = "none"
    samples: int | None = None

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"stats"})

    def __post_init__(self) -> None:
        if self.groups < 0:
            raise RecipeError(
                f"observe.groups is {self.groups}", where="observe", hint="choose 0 (one group for every call) or more"
            )
        if self.samples is not None and self.samples < 1:
            raise RecipeError(f"observe.samples is {self.samples}", where="observe", hint="choose 1 or more")

    def axes(self, program: Program) -> tuple[dict[str, int], list[str]]:
        """Return (the axis of each value that is measured by channel, the names of those that layers read).

        A value that a convolution and a matmul read has two such axes; the axis of the first reader counts.
        """
        kind = "outputs" if self.channels is True else self.channels
        every_layer = list(layers(program.graph))
        read: dict[str, int] = {}
        axes: dict[str, int] = {}
        if kind in ("outputs", "all"):
            axes = {name_of(layer.output): 1 for layer in every_layer if layer.output_quantized}
        if kind in ("inputs", "all"):
            for layer in every_layer:
                if layer.weight is not None:
                    read.setdefault(name_of(layer.activations[0]), channel_axis(layer))
        return {**read, **axes}, list(read)

    def run(self, program: Program, context: Context) -> Program:
        most = min(self.samples or context.samples, context.samples)
        threads = context.threads if context.spread is None else context.spread.threads
        context = replace(context, samples=most, threads=threads)
        measured = replace(program, allocation=tuple(min(n, most) for n in program.allocation))
        stats, known = measured_once(measured, context, self.options(), lambda: self._measure(measured, context))
        values = len({value for value, _ in stats.summaries})
        each = measured.allocation or (context.samples,)
        samples = f"{min(each)} to {max(each)}" if min(each) < max(each) else f"{each[0]}"
        if known:  # reported here, and not in the note: the bundle does not depend on where its statistics come from
            context.progress("statistics from the cache", 0, 1)
            context.progress("statistics from the cache", 1, 1)
        note = f"{values} values over {stats.calls} calls, {samples} samples at each step"
        return replace(program, stats=stats, note=note)

    def _measure(self, program: Program, context: Context) -> Stats:
        inputs = {name_of(v) for v in program.graph.inputs}
        values = list(
            dict.fromkeys(name_of(v) for layer in layers(program.graph) for v in (*layer.activations, layer.output))
        )
        timesteps = program.deployment.timesteps
        groups = min(self.groups or len(timesteps), len(timesteps))
        axes, squared = self.axes(program)
        taps, others = tuple(v for v in values if v not in inputs), context.for_workers()
        work = _ObserveWork(tuple(values), taps, groups, axes, tuple(squared), others)
        if context.spread is not None:
            collector, calls = _observe_elsewhere(program, work, context, context.spread)
        else:
            with Collector(axes, squared) as collector, ExitStack() as sessions:
                follow = work.follower(program, context, sessions)
                calls = follow(collector, batch_spans(program, context))
        measured = collector.summaries, timesteps, collector.channels, collector.squares, axes
        return Stats(graphs.digest(program.model), groups, calls, *measured)


def _observe_elsewhere(program: Program, work: _ObserveWork, context: Context, spread: Spread) -> tuple[Collector, int]:
    """Return (a collector, the number of calls). Each batch is a piece; pieces are added in the order of batches."""
    bare = replace(program, float_model=None, stats=None, plan=None, correction=None, history=(), fx_text=None)
    calls = 0
    with tempfile.TemporaryDirectory(dir=context.folder) as folder, Collector(work.axes, work.squared) as collector:
        snapshot.save_program(bare, Path(folder))
        for part, count in spread.in_order(
            work, Path(folder), batch_spans(program, context), "observe", unit="batches"
        ):
            collector.replay(part)
            calls += count
    return collector, calls


@dataclass(frozen=True)
class _ObserveWork:
    """What is measured of a program: values (`taps` are those that are no inputs), in groups, some by channel."""

    values: tuple[str, ...]
    taps: tuple[str, ...]
    groups: int
    axes: Mapping[str, int]
    squared: tuple[str, ...]
    context: Context

    def follower(
        self, program: Program, context: Context, sessions: ExitStack
    ) -> Callable[[Collector, Sequence[tuple[int, int]]], int]:
        """Return the function that measures the samples of some batches, and returns the number of calls."""
        open_executor = partial(Executor, program.model, context.folder, threads=context.threads, spinning=False)
        tapped = sessions.enter_context(open_executor(taps=self.taps))
        untapped = sessions.enter_context(open_executor()) if program.allocation else tapped

        def follow(collector: Collector, spans: Sequence[tuple[int, int]]) -> int:
            observer = _Observer(program, collector, self.values, self.groups, tapped, untapped, spans[0][0])
            calls = follow_trajectories(program, context, observer, "observe", spans=spans)
            collector.settle()
            return calls

        return follow

    def open(self, folder: Path, threads: int) -> Callable[[tuple[int, int]], tuple[CollectedPart, int]]:
        """Return the function from a batch, (first sample, samples), to what was collected and the number of calls."""
        program, _ = snapshot.load_program(folder)
        sessions = ExitStack()  # open as long as the worker
        follow = self.follower(program, replace(self.context, folder=folder, threads=threads), sessions)

        def collect(span: tuple[int, int]) -> tuple[CollectedPart, int]:
            with Collector(self.axes, self.squared, recorded=True) as collector:
                calls = follow(collector, [span])
                return collector.part(), calls

        return collect


class _Observer:
    """A denoiser that collects statistics of the first samples of each call, as many as the allocation says.

    All samples follow their trajectories to the end. Samples that do not count run through a session without taps,
    which is faster. Rows are never cut out of activations, because the first dimension of an activation need not be the
    batch.
    """

    def __init__(
        self,
        program: Program,
        collector: Collector,
        values: Sequence[str],
        groups: int,
        tapped: Executor,
        untapped: Executor,
        first: int,
    ) -> None:
        self._signature, self._fixed = program.signature, program.fixed_batch is not None
        self._collector, self._values, self._groups = collector, values, groups
        self._tapped, self._untapped = tapped, untapped
        self._position = {t: i for i, t in enumerate(program.deployment.timesteps)}
        rows = 2 * first if program.deployment.guided else first  # of calls that came before
        self._left: dict[int, int] = {call: max(n - rows, 0) for call, n in enumerate(program.allocation)}

    def __call__(self, x: Images, t: Timestep, conditions: Conditions) -> Images:
        call = self._position[t]
        left = self._left.get(call, len(x))
        if call in self._left:
            self._left[call] = max(left - len(x), 0)
        if left >= len(x):
            return self._observe(x, t, conditions)
        if left == 0:
            return self._skip(x, t, conditions)
        if self._fixed:  # a fixed batch size: the samples that count are repeated to fill the batch
            rows = np.arange(len(x)) % left
            self._observe(x[rows], t, {n: a[rows] for n, a in conditions.items()})
            return self._skip(x, t, conditions)
        first = self._observe(x[:left], t, {n: a[:left] for n, a in conditions.items()})
        return np.concatenate([first, self._skip(x[left:], t, {n: a[left:] for n, a in conditions.items()})])

    def _observe(self, x: Images, t: Timestep, conditions: Conditions) -> Images:
        outputs = self._tapped.call(self._signature, x, t, conditions)
        seen = {self._signature.sample: x, **conditions, **outputs}
        group = self._position[t] * self._groups // len(self._position)
        self._collector.add(group, t, {name: seen[name] for name in self._values})
        return np.asarray(outputs[self._signature.output], np.float32)

    def _skip(self, x: Images, t: Timestep, conditions: Conditions) -> Images:
        return np.asarray(self._untapped.call(self._signature, x, t, conditions)[self._signature.output], np.float32)
