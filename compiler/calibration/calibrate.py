"""The sampling loop with a denoiser of the compiler: calibration and fitting run the loop of production."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.condition_network import call_conditions
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.guidance import Conditions, combine, doubled, doubled_conditions, rows_in_turn
from mezzotint.runtime.sampling.steps import State
from mezzotint.runtime.signature import Images, Timestep

from ..core.pipeline import Context
from ..core.program import Program
from ..errors import ConditionError, ModelError
from .conditions import check_rows, named_sizes, random_rows, spread_labels

CalibrationDenoiser = Callable[[Images, Timestep, Conditions], Images]


def follow_trajectories(
    program: Program,
    context: Context,
    denoiser: CalibrationDenoiser,
    stage: str,
    callback: samplers.Callback | None = None,
    correction: Correction | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
) -> int:
    """Sample `context.samples` images with the deployed sampler from seeded noise; return the number of calls.

    A graph with a fixed batch gets whole batches, and so perhaps a few images more. The denoiser is called as
    `(x [B, ...], timestep, conditions of the same rows) -> output`; no image is kept. Under guidance B counts both
    halves, and their outputs are combined for the sampler. `callback` and `correction` are those of the sampling loop.
    `spans` are some of `batch_spans`, all of them when left out: images do not depend on those of other spans.
    Raises ConditionError, and ModelError for an output that is not finite.
    """
    deployment = program.deployment
    check_conditions(program, context)
    require_same_channels(program)
    spans = batch_spans(program, context) if spans is None else spans
    total = len(spans) * len(deployment.calls)
    calls = 0
    for first, rows in spans:
        conditions = batch_conditions(program, context, first, rows)

        def call(x: Images, t: Timestep, conditions: Conditions = conditions) -> Images:
            nonlocal calls
            output = denoiser(*network_call(program, context, x, t, conditions))
            calls += 1
            context.progress(stage, calls, total)
            return guided_output(program, output)

        x = samplers.initial_noise(context.seed, (rows, *program.shape), first=first)
        noise = samplers.seeded_noise(context.seed, first=first)
        samplers.sample(call, x, program.schedule, deployment, noise=noise, callback=callback, correction=correction)
    return calls


def batch_spans(program: Program, context: Context) -> list[tuple[int, int]]:
    """Return (first sample, number of samples) of each calibration batch. A batch that the graph fixes is whole."""
    fixed = program.fixed_batch
    if fixed and program.deployment.guided:
        if fixed % 2:
            raise ConditionError(
                f"the model's batch of {fixed} cannot hold both halves of guidance",
                where=f"input {program.signature.sample}",
                hint="export it with an open batch, or an even one",
            )
        fixed //= 2
    size = fixed or context.batch
    return [(first, fixed or min(size, context.samples - first)) for first in range(0, context.samples, size)]


def batch_conditions(program: Program, context: Context, first: int, rows: int) -> Conditions:
    """Return the rows of conditions for these samples, under guidance with the unconditional rows before them."""
    conditions = context.condition_rows(first, rows)
    if not program.deployment.guided:
        return conditions
    return doubled_conditions(conditions, rows_in_turn(context.unconditional, first, rows))


def network_call(
    program: Program, context: Context, x: Images, t: Timestep, rows: Conditions
) -> tuple[Images, Timestep, Conditions]:
    """Return what the network is called with for x of the sampler: (both halves under guidance, timestep, conditions).

    `rows` are those of `batch_conditions`; conditions that another network computes are computed here.
    """
    seen = both_halves(program, x)
    return seen, t, call_conditions(context.condition_network, seen, t, rows)


def both_halves(program: Program, x: Images) -> Images:
    """Return the input of the network for x: twice the batch under guidance."""
    return doubled(x) if program.deployment.guided else x


def guided_output(program: Program, output: Images) -> Images:
    """Return the prediction for the sampler: both halves combined under guidance."""
    return combine(output, program.deployment.guidance) if program.deployment.guided else output


class LockStep:
    """The latents of all calibration samples, advanced together through each step of the sampler.

    The noise is that of `follow_trajectories`, and with the same denoiser so are the images. Only latents are kept for
    each sample.
    """

    def __init__(self, program: Program, context: Context) -> None:
        check_conditions(program, context)
        require_same_channels(program)
        self._program, self._context = program, context
        self._stepper = samplers.Stepper(program.deployment.solver(program.schedule))
        self._spans = batch_spans(program, context)
        shape = program.shape
        noises = [samplers.initial_noise(context.seed, (n, *shape), first=first) for first, n in self._spans]
        self._states: list[State] = [self._stepper.begin(noise) for noise in noises]
        self._index = 0

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._spans)

    def batches(self) -> Iterator[tuple[Images, Conditions]]:
        """Yield (input of the network `[B, ...]`, conditions of the same rows) of each batch for the next call."""
        program, context = self._program, self._context
        timestep = self._stepper.solver.steps[self._index].timestep
        for (first, rows), state in zip(self._spans, self._states, strict=True):
            given = batch_conditions(program, context, first, rows)
            x, _, conditions = network_call(program, context, state["x"], timestep, given)
            yield x, conditions

    def advance(self, denoiser: CalibrationDenoiser) -> None:
        """Make the next network call of the sampler with every batch."""
        timestep = self._stepper.solver.steps[self._index].timestep
        for i, (x, conditions) in enumerate(self.batches()):
            noise = samplers.seeded_noise(self._context.seed, first=self._spans[i][0])
            output = guided_output(self._program, denoiser(x, timestep, conditions))
            self._states[i] = self._stepper.advance(self._index, self._states[i], output, noise)
        self._index += 1


def check_conditions(program: Program, context: Context) -> None:
    """Raise ConditionError when conditions or unconditional rows are missing, or do not fit the model's inputs."""
    rows = context.conditions, context.unconditional
    check_rows(program.conditions(), program.deployment, *rows, context.condition_network)


def require_same_channels(program: Program) -> None:
    """Raise ModelError for other channels than the sample's, which the import did not know yet."""
    output = next(v for v in program.graph.outputs if v.name == program.signature.output)
    axis, rank = program.signature.channel_axis, 1 + len(program.shape)
    channels = output.shape[axis] if output.shape is not None and len(output.shape) == rank else None
    if isinstance(channels, int) and channels != program.channels:
        raise ModelError(
            f"the model takes {program.channels} channels and predicts {channels}: no sampler can follow it alone",
            where=f"output {program.signature.output}",
            hint="export it with the shape of its output, or say how many channels the image has: --channels",
        )


def random_conditions(program: Program, rows: int, seed: int, lengths: Mapping[str, int] | None = None) -> Conditions:
    """Return `random_rows` for the conditions of a program, `spread_labels` for class labels among them.

    `lengths` are sizes of open dimensions that the sample does not have.
    """
    sample = next(v for v in program.graph.inputs if v.name == program.signature.sample)
    sizes = {**(lengths or {}), **named_sizes(sample, program.shape)}
    labels = spread_labels(program.signature, rows)
    return random_rows(program.conditions(), program.shape, rows, seed, sizes, labels)
