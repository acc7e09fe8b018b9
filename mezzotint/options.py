"""The options of a compilation, in groups. `compile_model` and `mezzotint compile` both build these values.

The file loads neither numpy nor torch; defaults that have a home elsewhere are repeated here, and a test compares them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.errors import ConditionError, RecipeError
from mezzotint.runtime import bounds
from mezzotint.runtime.targets import ONNXRUNTIME, TARGETS, target_named

if TYPE_CHECKING:
    from mezzotint.compiler.core.pipeline import Recipe
    from mezzotint.runtime.sampling.condition_network import ConditionNetwork
    from mezzotint.runtime.sampling.deployment import Deployment
    from mezzotint.runtime.sampling.guidance import Conditions
    from mezzotint.runtime.sampling.schedule import Schedule
    from mezzotint.runtime.signature import Prediction, TimestepUnit

    ConditionSource = Conditions | str | Path | None  # arrays, RANDOM, or an .npz file
    LoraSource = Sequence[str | Path | tuple[str | Path, float]]

RECIPE = "w8a8-best"
RANDOM = "random"


@dataclass(frozen=True)
class RecipeOptions:
    """A recipe (its name, a YAML file, or the value), settings for it ("pass.option" to a value), and the target.

    None is the best recipe of ours for the target, and the recipe's own target, which is onnxruntime for most. Raises
    RecipeError for an unknown target.
    """

    recipe: str | Recipe | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    target: str | None = None

    def __post_init__(self) -> None:
        if self.target is not None and target_named(self.target) is None:
            raise RecipeError(
                f"there is no target called {self.target!r}"[:200],
                where="--target",
                hint=f"choose one of {', '.join(TARGETS)}",
            )

    def chosen(self) -> Recipe:
        """Return the recipe with its settings, as the target needs it. Raises RecipeError."""
        from mezzotint.passes.recipes.files import load_recipe, with_options
        from mezzotint.passes.recipes.targets import default_recipe, for_target

        target = None if self.target is None else target_named(self.target)
        recipe = self.recipe or default_recipe(target or ONNXRUNTIME)
        recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
        return for_target(with_options(recipe, dict(self.settings)), target or recipe.target)


@dataclass(frozen=True)
class DeploymentOptions:
    """The sampler that the bundle is compiled for. None is the schedule's usual sampler, and the model's scheduler."""

    sampler: str | None = None
    steps: int = 50
    eta: float = 0.0
    guidance: float = 1.0
    scheduler: str | Path | Schedule | None = None

    def on(self, schedule: Schedule) -> Deployment:
        """Return the deployment on a schedule. Raises ScheduleError."""
        from mezzotint.runtime.sampling.deployment import Deployment, usual_sampler

        return Deployment.of(schedule, self.sampler or usual_sampler(schedule), self.steps, self.eta, self.guidance)


def check_prompt_options(prompts: object, negative: str | None, conditions: object, unconditional: object) -> None:
    """Raise ConditionError for prompts beside arrays, and for a negative prompt without prompts."""
    given = {"--conditions": conditions, "--unconditional": unconditional}
    if prompts is None:
        if negative is not None:
            raise ConditionError("a negative prompt is for prompts", where="--negative", hint="give --prompts as well")
    elif both := next((option for option, value in given.items() if value is not None), None):
        raise ConditionError(
            f"prompts and {both} were given, and both are the conditions",
            where="--prompts",
            hint="give one of them; --negative TEXT is the unconditional half of prompts",
        )


@dataclass(frozen=True, eq=False)
class CalibrationOptions:
    """The data of the calibration, and the folder that keeps its statistics. Raises ConditionError for no data.

    `prompts` (a text file, or "default") and `negative` make the conditions, instead of arrays. `condition_network`
    computes conditions that change from call to call, from rows among these and its own. `cluster` is one of
    cluster/connection.py, whose workers compute the pieces of passes; the bundle is the same.
    """

    samples: int = 32
    batch: int = 8
    conditions: ConditionSource = None
    unconditional: ConditionSource = None
    seed: int = 0
    cache: str | Path | None = None
    prompts: str | Path | None = None
    negative: str | None = None
    condition_network: ConditionNetwork | None = None
    cluster: str | None = None

    def __post_init__(self) -> None:
        check_prompt_options(self.prompts, self.negative, self.conditions, self.unconditional)
        if self.cluster is not None and self.condition_network is not None:
            raise ConditionError(
                "a network that computes conditions cannot travel to the workers of a cluster",
                where="--cluster",
                hint="calibrate on one machine: leave --cluster out",
            )
        if self.samples < 1 or self.batch < 1:
            raise ConditionError(
                f"nothing to calibrate on: {self.samples} samples in batches of {self.batch}",
                hint="both must be at least 1",
            )
        bounds.check_number("samples to calibrate on", self.samples, bounds.MOST_CALIBRATION_SAMPLES, ConditionError)
        bounds.check_number("samples in one call", self.batch, bounds.MOST_BATCH, ConditionError)
        bounds.check_seed(self.seed, ConditionError)


@dataclass(frozen=True)
class ImportRoles:
    """Facts that the front end cannot infer from an ONNX file, and the sizes that a graph leaves open.

    `inputs` maps a role ("sample", "timestep") to the name of an input. `timestep_unit` is what the timestep counts;
    None is what the model's class is known for, else training timesteps. `channels` is the number of channels of the
    image where the network takes or predicts others, too. `size` is (height, width) of an image, and of another sample
    its sizes beside batch and channels. `channel_axis` is the axis of the sample's channels: 1, or the last one.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    output_name: str | None = None
    prediction: Prediction | None = None
    size: tuple[int, ...] | None = None
    timestep_unit: TimestepUnit | None = None
    channels: int | None = None
    channel_axis: int | None = None

    @property
    def named(self) -> bool:
        """Whether a role, the prediction or the unit is given. Models of diffusers take none of these."""
        axis = self.channel_axis is not None
        return bool(self.inputs or self.output_name or self.prediction or self.timestep_unit or self.channels or axis)


@dataclass(frozen=True)
class WeightOptions:
    """Which weights of a diffusers model are read, and what is fused into them before the export.

    `loras` are safetensors files, or pairs of a file and the weight that it is fused with. `variant` is the part of
    the file names of a folder that has several, as "fp16"; None is the plain one, or the only one. `config` is a
    diffusers folder with the configuration of a checkpoint's network, None for one next to the checkpoint.
    """

    loras: LoraSource = ()
    variant: str | None = None
    config: str | Path | None = None


@dataclass(frozen=True)
class OutputOptions:
    """What is written besides the bundle's usual files, and whether an existing bundle is replaced."""

    dump_passes: bool = False
    export: str | Path | None = None
    license: str | None = None
    force: bool = False


@dataclass(frozen=True)
class AcceptanceOptions:
    """What the finished file must reach beside the float model: SQNR in dB at each group of timesteps.

    Below `min_sqnr` there is a warning, with `strict` an error. `acceptance_seconds` is the budget of the run.
    """

    min_sqnr: float = 15.0
    strict: bool = False
    acceptance_seconds: float = 120.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.min_sqnr):
            raise RecipeError(f"--min-sqnr is {self.min_sqnr}", hint="give decibels, such as 15")
        if not 0 <= self.acceptance_seconds < math.inf:
            raise RecipeError(
                f"--acceptance-seconds is {self.acceptance_seconds}", hint="give seconds, 0 for the least run"
            )


@dataclass(frozen=True)
class CompileOptions:
    """Every option of a compilation that can change its result or its files."""

    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    deployment: DeploymentOptions = field(default_factory=DeploymentOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    roles: ImportRoles = field(default_factory=ImportRoles)
    output: OutputOptions = field(default_factory=OutputOptions)
    acceptance: AcceptanceOptions = field(default_factory=AcceptanceOptions)
    weights: WeightOptions = field(default_factory=WeightOptions)
