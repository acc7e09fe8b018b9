"""reconstruct: learn which way each weight rounds, against the outputs of its layer or block in the float graph.

AdaRound (arXiv 2004.10568) and BRECQ (arXiv 2102.05426), the reconstruction of PTQD, Q-Diffusion, TFMQ-DM and EDA-DM.
A weight rounds down or up by a variable in [0, 1] that is trained softly, with a regulariser that drives it to an end,
and is hard when it is written (compiler/training/fit_rounding.py has the loss). Units are trained in the graph's
order: their inputs come from the prefix that is trained already, their targets from the float graph. What is trained
is the graph behind the passes: split shortcuts, smoothed channels, tables of timesteps, quantizers of outputs.

The fit starts at the rounding that the graph has: behind round_weights at that of GPTQ. A unit whose hard rounding is
no better than its start keeps the start. The gap between soft and hard rounding is in the note.

Statistics: latents of the float trajectory at `calls` network calls spread evenly over it, of the first `samples`
calibration images. One step of the fit takes `rows` samples of one call. A unit's inputs and targets lie in files of
the working folder, so memory holds one unit and one batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import numpy as np

from mezzotint.compiler.core.pipeline import Context, Pass
from mezzotint.compiler.core.program import Program
from mezzotint.compiler.errors import RecipeError, StatsError
from mezzotint.compiler.graph.blocks import find_blocks
from mezzotint.compiler.graph.nodes import name_of
from mezzotint.compiler.graph.ops import layers
from mezzotint.compiler.rounding.layer_inputs import Inputs, chosen_latents
from mezzotint.compiler.rounding.weights import find_weights, layer_name


@dataclass(frozen=True)
class Reconstruct(Pass):
    """Weights rounded by training, layer by layer or block by block.

    - `unit`: `layer` (AdaRound) or `block` (BRECQ).
    - `iterations`, `rate`, `rows`: steps of Adam for a unit, their learning rate, and samples in a step.
    - `weight`: of the regulariser, beside a loss that is 1 at the start.
    - `calls`, `samples`: as above.
    - `blocks`: patterns of units' names (as in a shell: `*`, `?`); empty means all. Others keep their rounding.
    """

    unit: Literal["layer", "block"] = "block"
    iterations: int = 300
    rate: float = 3e-2
    weight: float = 10.0
    rows: int = 8
    calls: int = 10
    samples: int = 16
    blocks: tuple[str, ...] = ()

    needs: ClassVar[frozenset[str]] = frozenset({"qdq"})
    gives: ClassVar[frozenset[str]] = frozenset({"rounded"})

    def __post_init__(self) -> None:
        counts = ("iterations", "rows", "calls", "samples")
        bad = [name for name in counts if getattr(self, name) < 1]
        bad += [name for name in ("rate", "weight") if not 0 < getattr(self, name) < np.inf]
        if bad:
            raise RecipeError(
                f"reconstruct.{bad[0]} is {getattr(self, bad[0])}", where=self.name, hint="choose a positive number"
            )

    def run(self, program: Program, context: Context) -> Program:
        if program.float_model is None or program.plan is None:
            raise StatsError("the float graph to compare with is gone", where=self.name, hint="run insert_qdq first")
        from mezzotint.compiler.training.fit_rounding import Annealing
        from mezzotint.compiler.training.rounding_of_unit import ReconstructionUnit, learn_rounding

        units = [ReconstructionUnit(*unit) for unit in self._chosen(program)]
        few = replace(context, samples=min(self.samples, context.samples))
        latents = chosen_latents(program, few, self.calls)
        total = sum(len(latents) + self.iterations for _ in units)
        done = 0

        def step(stage: str) -> None:
            nonlocal done
            done += 1
            context.progress(stage, done, total)

        schedule = Annealing(self.iterations, self.rate, self.weight, rows=self.rows)
        curves = []
        for unit in units:
            curves.append(learn_rounding(program, context, unit, latents, schedule, self.name, step))
        better = [curve for curve in curves if curve.hard < curve.start]
        share = float(np.mean([min(c.hard / c.start, 1.0) for c in curves])) if curves else 1.0
        soft = float(np.mean([c.soft / c.start for c in curves])) if curves else 1.0
        note = f"{len(better)} of {len(curves)} units better; error {share:.0%} of the start's (soft {soft:.0%}), mean"
        return program.noted(note)

    def _chosen(self, program: Program) -> list[tuple[str, frozenset[str], tuple[Inputs, ...]]]:
        """Return (name, computed values, weights) of each unit. Raise RecipeError for a pattern that matches none."""
        floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
        every = [Inputs.of(weight, floats, self.name) for weight in find_weights(program.graph)]
        readers = [{name_of(node.outputs[0]) for node in inputs.weight.readers} for inputs in every]
        units = []
        for name, computed in self._parts(program):
            mine = tuple(inputs for inputs, names in zip(every, readers, strict=True) if names <= computed)
            if mine and any(fnmatchcase(name, pattern) for pattern in self.blocks or ("*",)):
                units.append((name, computed, mine))
        for pattern in self.blocks:
            if not any(fnmatchcase(name, pattern) for name, _, _ in units):
                raise RecipeError(
                    f"reconstruct.blocks: {pattern!r} matches no unit with quantized weights",
                    where=self.name,
                    hint="patterns are those of a shell: `*`, `?`; `inspect --blocks` lists the names",
                )
        return units

    def _parts(self, program: Program) -> Iterator[tuple[str, frozenset[str]]]:
        """Yield the name of each layer or block, and the names of what its nodes compute."""
        if self.unit == "block":
            for block in find_blocks(program.model, program.signature.sample):
                yield block.name, frozenset(name_of(node.outputs[0]) for node in block.nodes)
            return
        floats = {layer.name: layer for layer in layers(program.require_float_model().graph)}
        for weight in find_weights(program.graph):
            computed = [name_of(node.outputs[0]) for node in weight.readers]
            known = [floats[name] for node in weight.readers if (name := layer_name(node)) in floats]
            yield weight.name, frozenset([*computed, *(name_of(layer.output) for layer in known)])
