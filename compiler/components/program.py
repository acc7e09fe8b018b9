"""A component as a Program, and the passes that run on it.

Passes, lowerings and islands work on a Program, which is made for denoisers: it has a timestep, a schedule and a
deployment. A component has none of them. Its signature names no timestep (`NO_TIMESTEP`), and the schedule is a
placeholder that no pass of a component reads: passes that do (freeze_time, observe, the scale tables) are not run on
components. Exactness is checked on the component's own example instead of noise at several timesteps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Signature

from ..calibration.collect import Collector
from ..core import verify
from ..core.execute import Executor
from ..core.memory import PeakMemory
from ..core.pipeline import Context, Pass
from ..core.program import Program, Record
from ..core.stats import Stats
from ..errors import NotExact
from ..graph import nodes as graphs
from ..graph.nodes import name_of
from ..graph.ops import layers
from .export import ComponentArrays, ExportedComponent

NO_TIMESTEP = ""


def component_program(exported: ExportedComponent, part: str, folder: Path) -> Program:
    """Return the Program of an exported component, whose weights are stored in `folder` already."""
    sample, *others = exported.inputs
    schedule = Schedule.named("ddpm-linear")
    return Program(
        model=exported.model,
        signature=Signature(sample, NO_TIMESTEP, exported.outputs[0], tuple(others)),
        schedule=schedule,
        deployment=Deployment.of(schedule, "ddim", 1, 0.0, 1.0),
        shape=exported.example[sample].shape[1:],
        source={"kind": "component", "name": part, "parameter_bytes": exported.parameter_bytes},
    )


def run_on(program: Program, passes: Sequence[Pass], context: Context, example: ComponentArrays) -> Program:
    """Return the program after these passes. Each one is verified; an exact one must keep the outputs of `example`."""
    for step in passes:
        start, nodes = time.perf_counter(), program.graph.num_nodes()
        with PeakMemory() as memory:
            after = step.run(replace(program, model=program.model.clone(), note=""), context)
            verify.structure(after, step.name, before=program)
            if step.tolerance is not None and graphs.digest(after.model) != graphs.digest(program.model):
                _check_exact(program, after, step, context, example)
        record = Record(
            step.name,
            step.options(),
            nodes,
            after.graph.num_nodes(),
            time.perf_counter() - start,
            memory.peak_mb,
            after.note,
        )
        program = replace(after, history=(*program.history, record), note="")
    return program


def measured(program: Program, context: Context, batches: Sequence[ComponentArrays]) -> Program:
    """Return the program with statistics of every value that a layer reads or computes, over all batches."""
    graph = program.graph
    inputs = {name_of(v) for v in graph.inputs}
    values = list(dict.fromkeys(name_of(v) for layer in layers(graph) for v in (*layer.activations, layer.output)))
    taps = [value for value in values if value not in inputs]
    folder, threads = context.folder, context.threads
    with Collector() as collector, Executor(program.model, folder, taps=taps, threads=threads) as executor:
        for batch in batches:
            seen = {**batch, **executor.run(batch)}
            collector.add(0, 0, {name: seen[name] for name in values})
        collector.settle()
    stats = Stats(graphs.digest(program.model), 1, len(batches), dict(collector.summaries), (0,))
    return replace(program, stats=stats)


def outputs_of(
    program: Program, context: Context, batches: Sequence[ComponentArrays]
) -> list[Mapping[str, npt.NDArray[Any]]]:
    """Return all outputs of the program's graph for each batch."""
    with Executor(program.model, context.folder, threads=context.threads) as executor:
        return [executor.run(batch) for batch in batches]


def _check_exact(before: Program, after: Program, step: Pass, context: Context, example: ComponentArrays) -> None:
    [expected], [found] = outputs_of(before, context, [example]), outputs_of(after, context, [example])
    for name, array in expected.items():
        worst = verify.relative_difference(np.asarray(array), np.asarray(found[name]))
        if not worst <= (step.tolerance or 0.0):
            raise NotExact(
                f"{step.name} changed the function: relative difference {worst:.2e} of {name}, allowed "
                f"{step.tolerance:.0e}",
                where=str(before.source["name"]),
            )
