"""Trajectories of the float network, and the sampler in torch, with gradients through several of its calls.

The sampler's steps are linear but for the clipping of the image (runtime/sampling/steps.py), so every sampler of the
runtime can be unrolled. A prediction is that of the sampler: behind guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.guidance import Conditions
from mezzotint.runtime.sampling.steps import Solver, Step
from mezzotint.runtime.signature import Images, Timestep

from ..calibration.calibrate import batch_conditions, batch_spans, both_halves, check_conditions, guided_output
from ..core.execute import Executor, feeds
from ..core.pipeline import Context
from ..core.program import Program
from ..errors import ConditionError, PassError
from ..graph.nodes import name_of
from ..torch_graph.convert import TorchGraph
from .array_files import ArrayFiles
from .torch_device import Precision, autocast

TorchState = dict[str, torch.Tensor]
"""`x` and what the sampler remembers, each `[B, C, H, W]`."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What the float network does with one batch of samples.

    conditions  the rows of both halves under guidance, as the network reads them
    states      the sampler's state before each call, and the last one
    outputs     the prediction of each call `[B, C, H, W]`
    noise       the sampler's noise of each call, scaled; None where it adds none
    """

    conditions: Conditions
    states: tuple[TorchState, ...]
    outputs: tuple[torch.Tensor, ...]
    noise: tuple[torch.Tensor | None, ...]

    @property
    def samples(self) -> int:
        return len(self.outputs[0])


def float_trajectories(
    program: Program, context: Context, files: ArrayFiles, step: Callable[[], None]
) -> list[Trajectory]:
    """Sample the images of `context` with the float network; the arrays lie in `files`.

    `step` is called after each network call.
    Raises PassError for a prediction that is not finite.
    """
    check_conditions(program, context)
    if context.condition_network is not None:
        raise ConditionError(
            "training follows the sampler through latents of its own, for which conditions that another network "
            "computes at each call are not known",
            hint="compile with a recipe without training, such as w8a8-best",
        )
    with Executor(program.require_float_model(), context.folder, threads=context.threads) as exact:
        return [
            _trajectory(program, context, exact, first, rows, files, step)
            for first, rows in batch_spans(program, context)
        ]


def _trajectory(
    program: Program,
    context: Context,
    exact: Executor,
    first: int,
    rows: int,
    files: ArrayFiles,
    step: Callable[[], None],
) -> Trajectory:
    """Sample the images first .. first + rows - 1."""
    signature, solver = program.signature, program.deployment.solver(program.schedule)
    conditions = batch_conditions(program, context, first, rows)
    states: list[TorchState] = []
    outputs: list[torch.Tensor] = []

    def kept(array: Images) -> torch.Tensor:
        return torch.from_numpy(files.keep(array))

    def predict(x: Images, t: Timestep) -> Images:
        output = exact.call(signature, both_halves(program, x), t, conditions)[signature.output]
        step()
        return np.array(guided_output(program, np.asarray(output, np.float32)))

    def keep(info: samplers.StepInfo) -> None:
        if not np.isfinite(info.output).all():
            raise PassError("the float network predicts numbers that are not finite", hint="debug the float model")
        states.append({name: kept(array) for name, array in info.state.items()})
        outputs.append(kept(info.output))

    noise = samplers.seeded_noise(context.seed, first=first)
    x = samplers.initial_noise(context.seed, (rows, *program.shape), first=first)
    last = samplers.run_solver(predict, x, solver, noise=noise, callback=keep)
    sigmas = enumerate(s.sigma for s in solver.steps)
    added = tuple(kept(noise(i, x.shape) * np.float32(sigma)) if sigma > 0 else None for i, sigma in sigmas)
    return Trajectory(conditions, (*states, {"x": kept(last)}), tuple(outputs), added)


class TorchDenoiser:
    """A torch graph as the denoiser of the sampler. `values` take the places of parameters of its module."""

    def __init__(self, program: Program, model: ir.Model, graph: TorchGraph, precision: Precision = "float32") -> None:
        self._program, self._model, self._graph, self._precision = program, model, graph, precision
        self._inputs = {name_of(value): value for value in model.graph.inputs}
        self.device = graph.device

    def computing_in(self, precision: Precision) -> TorchDenoiser:
        """Return the same denoiser with forward passes in a precision."""
        return TorchDenoiser(self._program, self._model, self._graph, precision)

    def __call__(
        self, x: torch.Tensor, t: Timestep, conditions: Conditions, values: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Return the prediction for x, and the values that the graph taps (of both halves under guidance)."""
        program, deployment = self._program, self._program.deployment
        rows = torch.cat([x, x]) if deployment.guided else x
        fed = feeds(self._inputs, program.signature, np.empty(tuple(rows.shape), np.float32), t, conditions)
        fed.pop(program.signature.sample)
        others = {name: torch.from_numpy(np.array(array)).to(self.device) for name, array in fed.items()}
        given = {program.signature.sample: rows, **others}
        arguments = tuple(given[name] for name in self._graph.inputs)
        with autocast(self.device, self._precision):
            output, *tapped = functional_call(self._graph.module, dict(values), arguments)
        if deployment.guided:
            without, conditional = output.chunk(2)
            output = without + deployment.guidance * (conditional - without)
        return (output, *tapped)


def unroll(
    predict: Callable[[torch.Tensor, Timestep], torch.Tensor],
    solver: Solver,
    trajectory: Trajectory,
    first: int,
    last: int,
    samples: slice,
    device: torch.device,
) -> torch.Tensor:
    """Return x before call `last`, from the float state before call `first`, with the calls in between by `predict`.

    With gradients each call is computed again in the backward pass, so memory holds one call.
    """
    state = {name: array[samples].to(device) for name, array in trajectory.states[first].items()}
    for index in range(first, last):
        step, noise = solver.steps[index], trajectory.noise[index]
        if torch.is_grad_enabled() and last - first > 1:
            out = checkpoint(predict, state["x"], step.timestep, use_reentrant=False)
        else:
            out = predict(state["x"], step.timestep)
        state = advance(step, state, out)
        if noise is not None:
            state["x"] = state["x"] + noise[samples].to(device)
    return state["x"]


def advance(step: Step, state: TorchState, out: torch.Tensor) -> TorchState:
    """Return the state after a call, without the sampler's noise: `Step.advance` in torch."""
    arrays = {**state, "out": out}
    rows = {**step.keep, "x": step.next}
    if any("image" in row for row in rows.values()):
        image = step.image_x * state["x"] + step.image_out * out
        arrays["image"] = image if step.clip is None else image.clamp(-step.clip, step.clip)
    zero = torch.zeros_like(out)
    return {
        name: sum((weight * arrays[key] for key, weight in row.items() if weight), zero) for name, row in rows.items()
    }
