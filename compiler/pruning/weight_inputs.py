"""Weights of the float graph one after the other, each with the matrix H of its inputs, as many as the memory holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from ..core.pipeline import Context
from ..core.program import Program
from ..rounding.gathering import gather_floats
from ..rounding.layer_inputs import Gathered, Latents, chosen_latents
from ..rounding.parts import parts_in_memory
from .prunable import PrunableWeight


class InputOptions(Protocol):
    """The options of a pass that measures H: its calls, samples, columns (positions), balance and memory."""

    @property
    def calls(self) -> int: ...
    @property
    def samples(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def balance(self) -> bool: ...
    @property
    def memory_gb(self) -> float: ...


@dataclass(frozen=True, eq=False)
class WeightInputs:
    """The float graph as it was before a pass changed weights, and the latents that H is measured on.

    `few` is the context with the samples of the latents. `columns`, `balance` and `memory_gb` are the pass's options.
    """

    source: Program
    context: Context
    few: Context
    latents: Sequence[Latents]
    columns: int
    balance: bool
    memory_gb: float

    @staticmethod
    def of(program: Program, context: Context, options: InputOptions) -> WeightInputs:
        """Keep a copy of the program's graph, and follow the trajectories of a few samples through it."""
        source = replace(program, model=program.model.clone())
        few = replace(context, samples=min(options.samples, context.samples))
        latents = chosen_latents(replace(program, float_model=source.model), few, options.calls)
        return WeightInputs(source, context, few, latents, options.columns, options.balance, options.memory_gb)

    def each(self, weights: Sequence[PrunableWeight], stage: str) -> Iterator[tuple[PrunableWeight, Gathered]]:
        """Yield each weight with the matrices that its own is among. `stage` names the progress."""
        parts = list(parts_in_memory(weights, lambda weight: weight.inputs, self.memory_gb))
        done, total = 0, len(parts) * len(self.latents) + len(weights)

        def step() -> None:
            nonlocal done
            done += 1
            self.context.progress(stage, done, total)

        for part in parts:
            inputs = [weight.inputs for weight in part]
            gathered = gather_floats(
                self.source, self.context, inputs, self.latents, columns=self.columns, balance=self.balance, step=step
            )
            for weight in part:
                yield weight, gathered
                gathered.forget(weight.inputs)
                step()
