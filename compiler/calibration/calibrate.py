"""The sampling loop with a denoiser of the compiler: calibration and fitting run the loop of production."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mezzotint.runtime import streams
from mezzotint.runtime.arrays import AnyArray
from mezzotint.runtime.sampling import samplers
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.guidance import Conditions, combine, doubled, doubled_conditions
from mezzotint.runtime.sampling.steps import State
from mezzotint.runtime.signature import Images, Timestep

from ..core.pipeline import Context
from ..core.program import Program
from ..errors import ConditionError, ModelError

OPEN_TOKENS = 77  # tokens of a prompt of CLIP, for random conditions of an open length
CalibrationDenoiser = Callable[[Images, Timestep, Conditions], Images]


def follow_trajectories(
    program: Program,
    context: Context,
    denoiser: CalibrationDenoiser,
    stage: str,
    callback: samplers.Callback | None = None,
    correction: Correction | None = None,
) -> int:
    """Sample `context.samples` images with the deployed sampler from seeded noise; return the number of calls.

    A graph with a fixed batch gets whole batches, and so perhaps a few images more. The denoiser is called as
    `(x [B, C, H, W], timestep, conditions of the same rows) -> output`; no image is kept. Under guidance B counts both
    halves, and their outputs are combined for the sampler. `callback` and `correction` are those of the sampling loop.
    Raises ConditionError, ModelError.
    """
    deployment = program.deployment
    check_conditions(program, context)
    require_same_channels(program)
    spans = batch_spans(program, context)
    total = len(spans) * len(deployment.calls)
    calls = 0
    for first, rows in spans:
        conditions = batch_conditions(program, context, first, rows)

        def call(x: Images, t: Timestep, conditions: Conditions = conditions) -> Images:
            nonlocal calls
            output = denoiser(both_halves(program, x), t, conditions)
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
    """Return the conditions of one call for these samples, under guidance with the unconditional rows before them."""
    conditions = context.condition_rows(first, rows)
    return doubled_conditions(conditions, context.unconditional) if program.deployment.guided else conditions


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
        """Yield (input of the network `[B, C, H, W]`, conditions of the same rows) of each batch for the next call."""
        for (first, rows), state in zip(self._spans, self._states, strict=True):
            yield both_halves(self._program, state["x"]), batch_conditions(self._program, self._context, first, rows)

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
    for name, value in program.conditions().items():
        rows = context.conditions.get(name)
        if rows is None:
            raise ConditionError(
                f"the model has a condition {name!r} ({value.dtype}{value.shape}), and no data to calibrate it on",
                where=f"input {name}",
                hint="give --conditions FILE.npz with an array of that name, [rows, ...]; or --conditions random",
            )
        if value.dtype is not None and rows.dtype != value.dtype.numpy():
            raise ConditionError(
                f"the data for {name!r} is {rows.dtype}; the model wants {value.dtype.numpy()}",
                where=f"input {name}",
                hint=f"convert it: array.astype(numpy.{value.dtype.numpy()})",
            )
        fixed = [] if value.shape is None else list(value.shape)[1:]
        fits = rows.ndim == len(fixed) + 1 and all(
            not isinstance(size, int) or size == actual for size, actual in zip(fixed, rows.shape[1:], strict=False)
        )
        if not fits or not len(rows):
            raise ConditionError(
                f"the data for {name!r} has the shape {list(rows.shape)}; the model wants {value.shape}",
                where=f"input {name}",
                hint="the first dimension counts rows, the others must be the model's",
            )
    if program.deployment.guided and not program.conditions():
        raise ConditionError("guidance is for models with a condition", hint="leave out --guidance")
    if program.deployment.guided and not context.unconditional:
        raise ConditionError(
            f"guidance {program.deployment.guidance:g} needs unconditional rows (the empty prompt, the null class)",
            hint="give --unconditional FILE.npz with one row for each condition that differs",
        )
    if extra := set(context.unconditional) - set(program.conditions()):
        raise ConditionError(f"the model has no condition {sorted(extra)[0]!r}", where="--unconditional")
    if extra := set(context.conditions) - set(program.conditions()):
        raise ConditionError(
            f"the model has no condition {sorted(extra)[0]!r}",
            hint=f"its conditions are: {', '.join(program.conditions()) or 'none'}",
        )


def require_same_channels(program: Program) -> None:
    """Raise ModelError for a model that predicts fewer channels than it takes (inpainting: mask and masked image)."""
    output = next(v for v in program.graph.outputs if v.name == program.signature.output)
    channels = output.shape[1] if output.shape is not None and len(output.shape) == 4 else None
    if isinstance(channels, int) and channels != program.shape[0]:
        raise ModelError(
            f"the model takes {program.shape[0]} channels and predicts {channels}: no sampler can follow it alone",
            where=f"output {program.signature.output}",
            hint="only --recipe float does without calibration",
        )


def random_conditions(program: Program, rows: int, seed: int) -> Conditions:
    """Return standard normal rows for every float condition: enough for speed and size, not for quality.

    A condition that the model declares with one row, or as a number, gets one row. Open dimensions are OPEN_TOKENS.
    Raises ConditionError for integer conditions (class labels), whose range is unknown.
    """
    rng = streams.CONDITIONS.generator(seed)
    conditions: dict[str, AnyArray] = {}
    for name, value in program.conditions().items():
        if value.dtype is None or value.shape is None or not value.dtype.is_floating_point():
            raise ConditionError(
                f"no random values can be drawn for the condition {name!r} ({value.dtype}{value.shape})",
                hint="give --conditions FILE.npz with real ones",
            )
        first, *rest = list(value.shape) or [1]
        shape = [1 if first == 1 else rows, *(size if isinstance(size, int) else OPEN_TOKENS for size in rest)]
        conditions[name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return conditions
