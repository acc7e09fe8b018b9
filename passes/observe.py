"""observe: the sampler runs on the float graph, and statistics of every activation that could be quantized stream in.

Calibration follows the deployed sampler from noise to picture, so that every timestep is seen with the latents that
really occur there (Q-Diffusion, arXiv 2302.04304, samples calibration data along the trajectory for the same reason).
Each call's activations go into mergeable summaries and are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from ..compiler import graph as graphs
from ..compiler.calibrate import Conditions, Images, follow_trajectories
from ..compiler.errors import RecipeError, StatsError
from ..compiler.execute import Executor
from ..compiler.graph import name_of
from ..compiler.ops import layers
from ..compiler.pipeline import Context, Pass
from ..compiler.program import Program
from ..compiler.stats import Stats, Summary


@dataclass(frozen=True)
class Observe(Pass):
    """`groups` contiguous groups of network calls get summaries of their own; 0 means every call."""

    groups: int = 1

    needs: ClassVar[frozenset[str]] = frozenset({"normal"})
    before: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"stats"})

    def __post_init__(self) -> None:
        if self.groups < 0:
            raise RecipeError(
                f"observe.groups is {self.groups}", where="observe", hint="choose 0 (one group for every call) or more"
            )

    def run(self, program: Program, context: Context) -> Program:
        inputs = {name_of(v) for v in program.graph.inputs}
        values = list(
            dict.fromkeys(name_of(v) for layer in layers(program.graph) for v in (*layer.activations, layer.output))
        )
        position = {t: i for i, t in enumerate(program.deployment.timesteps)}
        groups = min(self.groups or len(position), len(position))
        summaries: dict[tuple[str, int], Summary] = {}
        signature = program.signature

        with Executor(
            program.model, context.folder, taps=[v for v in values if v not in inputs], threads=context.threads
        ) as executor:

            def denoiser(x: Images, t: int, conditions: Conditions) -> Images:
                outputs = executor.call(signature, x, t, conditions)
                group = position[t] * groups // len(position)
                for name in values:
                    array = {signature.sample: x, **conditions, **outputs}[name]
                    summary = summaries.setdefault((name, group), Summary())
                    summary.add(np.asarray(array, np.float32))
                    if not summary.finite:
                        raise StatsError(
                            f"the float model computes NaN or infinite values at timestep {t}",
                            where=f"value {name}",
                            hint="check the model in float32 before quantizing it",
                        )
                return np.asarray(outputs[signature.output], np.float32)

            calls = follow_trajectories(program, context, denoiser, "observe")
        stats = Stats(graphs.digest(program.model), groups, calls, summaries)
        note = f"{len(values)} values over {calls} calls, {context.samples} samples at each step"
        return replace(program, stats=stats, note=note)
