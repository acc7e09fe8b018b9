"""Everything about a compilation that can be known without running the model, or loading torch.

`compile`, `compile --dry-run` and `export` begin here, so the same input is refused by all, with the same error, before
any work is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mezzotint.compiler.bundle.staging import check_target, check_target_file
from mezzotint.compiler.calibration.conditions import check_rows, named_sizes, random_rows, spread_labels
from mezzotint.compiler.core.cache import Cache
from mezzotint.compiler.core.pipeline import CPU, Recipe
from mezzotint.compiler.errors import ConditionError, ModelError
from mezzotint.compiler.frontend.architectures.row import Input
from mezzotint.compiler.frontend.channels import network_channels
from mezzotint.compiler.frontend.conventions import known_prediction, known_unit, usual_guidance, with_known_labels
from mezzotint.compiler.frontend.from_onnx import load_onnx, settle_inputs
from mezzotint.compiler.frontend.network_inputs import network_inputs
from mezzotint.compiler.frontend.roles import infer_signature
from mezzotint.runtime.bundle.manifest_entries import Calibration
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.errors import CompileWarning
from mezzotint.runtime.progress import Progress
from mezzotint.runtime.sampling.condition_network import ConditionNetwork
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.guidance import Conditions, null_rows
from mezzotint.runtime.signature import EXTRA_CHANNELS, Signature
from mezzotint.runtime.streams import SeedOffset

from .deployed_size import schedule_of_size
from .io.settings import load_conditions
from .io.sources import CONFIG_FILE, FolderSource, ModelSource, ModuleSource, OnnxSource, resolve
from .model_weights import with_weights
from .options import RANDOM, CalibrationOptions, CompileOptions, DeploymentOptions, ImportRoles, WeightOptions
from .prompts.rows import PromptPlan, prompt_plan, prompt_rows
from .source_config import network_config, pipeline_sizes

if TYPE_CHECKING:
    import onnx_ir as ir

    from .io.sources import Model
    from .options import ConditionSource


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model whose options and data fit together.

    `source` has the schedule for what the network predicts. `signature` and `shape` are what the import will find.
    `sizes` are known sizes of conditions, `named` those of open dimensions by their names.
    """

    source: ModelSource
    deployment: Deployment
    roles: ImportRoles
    signature: Signature
    shape: tuple[int, ...]
    sizes: Mapping[str, tuple[int, ...]]
    named: Mapping[str, int]


@dataclass(frozen=True, eq=False)
class Prepared(PreparedModel):
    """A compilation that can begin. `conditions` and `unconditional` are None where random ones are asked for, and
    where `prompts` will be encoded. `condition_network` computes conditions that have no rows."""

    recipe: Recipe
    conditions: Conditions | None
    unconditional: Conditions | None
    prompts: PromptPlan | None = None
    prompt_facts: Mapping[str, Any] | None = None
    condition_network: ConditionNetwork | None = None

    def entry(self, calibration: CalibrationOptions, sizes: Mapping[str, int]) -> Calibration:
        """Return the entry of the manifest; `sizes` are those of the conditions' open dimensions."""
        return Calibration(calibration.seed, calibration.samples, calibration.batch, self.prompt_facts or {}, sizes)


def prepare(model: Model, target: Path, options: CompileOptions, device: str = CPU) -> Prepared:
    """Return a compilation that can begin. Raises every error that the options, the model's files and the data have."""
    conditions, unconditional = (
        _read(of) for of in (options.calibration.conditions, options.calibration.unconditional)
    )
    recipe = options.recipe.chosen()
    source, deployment = _source(model, options.deployment, options.roles, options.weights)
    recipe.check(deployment)
    recipe.check_device(device)
    check_target(target, force=options.output.force)
    if options.output.export is not None:
        check_target_file(Path(options.output.export), force=options.output.force)
    plan = _prompt_plan(source, options.calibration)
    if plan is not None:
        conditions = unconditional = None
    samples, computing = options.calibration.samples, options.calibration.condition_network
    found, rows = _settled(source, deployment, options.roles, conditions, unconditional, samples, computing)
    facts = {field.name: getattr(found, field.name) for field in fields(found)}
    facts |= {"prompts": plan, "condition_network": computing}
    return Prepared(recipe=recipe, conditions=rows[0], unconditional=rows[1], **facts)


def _prompt_plan(source: ModelSource, calibration: CalibrationOptions) -> PromptPlan | None:
    """Return the prompts with the pipeline around the model, None where no prompts are given. Raises ConditionError."""
    if calibration.prompts is None:
        return None
    if isinstance(source, ModuleSource):
        raise ConditionError(
            "prompts are encoded by the pipeline around a model's folder, and this is a module in memory",
            where="--prompts",
            hint="give the pipeline's folder, or conditions",
        )
    folder = source.path if source.path.is_dir() else source.path.parent
    return prompt_plan(folder, calibration.prompts, calibration.negative, calibration.samples)


def with_prompts(prepared: Prepared, cache: Cache | None, progress: Progress) -> Prepared:
    """Return a compilation with the conditions of its prompts, which are encoded here. Raises ConditionError."""
    if prepared.prompts is None:
        return prepared
    deployment = prepared.deployment
    rows = prompt_rows(
        prepared.prompts, guided=deployment.guided, size=prepared.roles.size, cache=cache, progress=progress
    )
    both = rows.conditions, rows.unconditional
    found, settled = _settled(prepared.source, deployment, prepared.roles, *both, 1, prepared.condition_network)
    facts = {field.name: getattr(found, field.name) for field in fields(found)}
    facts |= {"conditions": settled[0], "unconditional": settled[1]}
    return replace(prepared, prompts=None, prompt_facts=rows.facts, **facts)


def prepare_model(
    model: Model,
    target: Path,
    deployment: DeploymentOptions,
    roles: ImportRoles,
    conditions: ConditionSource,
    weights: WeightOptions,
    *,
    force: bool,
) -> PreparedModel:
    """Return a model that can be imported and written to a file. Raises the errors that `prepare` has for the same."""
    rows = _read(conditions)
    source, deployed = _source(model, deployment, roles, weights)
    check_target_file(target, force=force)
    return _settled(source, deployed, roles, rows or None, {}, 1)[0]


def _source(
    model: Model, options: DeploymentOptions, roles: ImportRoles, weights: WeightOptions
) -> tuple[ModelSource, Deployment]:
    """Return a model with the schedule for its prediction and size, and the deployment on that schedule."""
    source = with_weights(resolve(model, options.scheduler, weights.config), weights)
    config = network_config(source)
    schedule = source.schedule.predicting(roles.prediction or known_prediction(config, source.schedule))
    schedule = schedule_of_size(source, schedule, config, roles)
    return replace(source, schedule=schedule), options.on(schedule)


def _settled(
    source: ModelSource,
    deployment: Deployment,
    roles: ImportRoles,
    conditions: Conditions | None,
    unconditional: Conditions | None,
    samples: int,
    computing: ConditionNetwork | None = None,
) -> tuple[PreparedModel, tuple[Conditions | None, Conditions | None]]:
    """Return what the import will find, and the rows of conditions with those of class labels that were left out.

    Conditions that are None are not checked.
    """
    sizes: dict[str, tuple[int, ...]] = {
        **pipeline_sizes(source),
        **dict.fromkeys(() if computing is None else computing.outputs, ()),  # the network has them as inputs
        **{name: rows.shape[1:] for name, rows in (conditions or {}).items() if rows.ndim > 1},
    }
    if isinstance(source, OnnxSource):
        unit = roles.timestep_unit or known_unit(source.config, source.schedule)
        roles = replace(roles, timestep_unit=unit or "steps")
        signature, shape, inputs, named = _onnx_inputs(source, roles, deployment, unit is None)
    else:
        if roles.named:
            raise ModelError(
                "roles of inputs and outputs are for ONNX files",
                hint="a diffusers model knows its own; leave them out",
            )
        signature, shape, inputs, named = _torch_inputs(source, roles, sizes)
    if conditions is not None:
        known = {**spread_labels(signature, samples), **usual_guidance(signature, network_config(source))}
        conditions = {**known, **({} if computing is None else computing.rows), **conditions}
    if unconditional == {} and deployment.guided:
        unconditional = null_rows(signature)
    found = PreparedModel(source, deployment, roles, signature, shape, sizes, named)
    check_rows(
        inputs,
        deployment,
        _random(found, inputs, 1, 0, computing) if conditions is None else conditions,
        _random_null(found, inputs, 0, computing) if unconditional is None else unconditional,
        computing,
    )
    return found, (conditions, unconditional)


def calibration_rows(
    prepared: Prepared, inputs: Mapping[str, ir.Value], calibration: CalibrationOptions
) -> list[Conditions]:
    """Return (conditions, unconditional) for the inputs of the imported model, random where they were asked for."""
    samples, seed, computing = calibration.samples, calibration.seed, prepared.condition_network
    rows, without = prepared.conditions, prepared.unconditional
    null_seed = SeedOffset.UNCONDITIONAL.after(seed)
    return [
        _random(prepared, inputs, samples, seed, computing) if rows is None else rows,
        _random_null(prepared, inputs, null_seed, computing) if without is None else without,
    ]


def _given(inputs: Mapping[str, ir.Value], computing: ConditionNetwork | None) -> Mapping[str, ir.Value]:
    """Return the inputs that no network computes."""
    computed = () if computing is None else computing.outputs
    return {name: value for name, value in inputs.items() if name not in computed}


def _random(
    found: PreparedModel, inputs: Mapping[str, ir.Value], rows: int, seed: int, computing: ConditionNetwork | None
) -> Conditions:
    """Return random rows of conditions; class labels, where they are known, are evenly spaced."""
    inputs = _given(inputs, computing)
    known = {**spread_labels(found.signature, rows), **usual_guidance(found.signature, network_config(found.source))}
    drawn = random_rows(inputs, found.shape, rows, seed, found.named, known)
    return drawn if computing is None else {**drawn, **computing.rows}


def _random_null(
    found: PreparedModel, inputs: Mapping[str, ir.Value], seed: int, computing: ConditionNetwork | None
) -> Conditions:
    """Return a random row of the unconditional half; that of class labels, where they are known, is no class."""
    inputs = _given(inputs, computing)
    known = {**null_rows(found.signature), **usual_guidance(found.signature, network_config(found.source))}
    return random_rows(inputs, found.shape, 1, seed, found.named, known)


def _onnx_inputs(
    source: OnnxSource, roles: ImportRoles, deployment: Deployment, assumed: bool
) -> tuple[Signature, tuple[int, ...], dict[str, ir.Value], dict[str, int]]:
    where, schedule = str(source.path), source.schedule
    model = load_onnx(source.path)
    signature = infer_signature(
        model.graph,
        inputs=roles.inputs,
        output=roles.output_name,
        prediction=schedule.prediction,
        timestep_unit=roles.timestep_unit or "steps",
        num_train_timesteps=schedule.num_train_timesteps,
        where=where,
    )
    signature, shape = settle_inputs(
        model, signature, schedule, deployment, roles.channels, roles.size, where, roles.channel_axis
    )
    by_name = {value.name: value for value in model.graph.inputs}
    time = by_name[signature.timestep].dtype
    if schedule.flow and assumed and time is not None and time.is_floating_point():
        warnings.warn(
            f"{where}: nothing says what the timestep of this flow network counts, and 0 to "
            f"{schedule.num_train_timesteps} is assumed; for one that takes 0 to 1 say --timestep-unit fraction",
            CompileWarning,
            stacklevel=2,
        )
    named = named_sizes(by_name[signature.sample], shape)
    signature = with_known_labels(signature, model.graph, source.config)
    return signature, shape, {name: by_name[name] for name in signature.conditions}, named


def _torch_inputs(
    source: ModelSource, roles: ImportRoles, sizes: Mapping[str, tuple[int, ...]]
) -> tuple[Signature, tuple[int, ...], dict[str, ir.Value], dict[str, int]]:
    config = network_config(source) or {}
    name = str(config.get(CLASS))
    where = str(source.path / CONFIG_FILE) if isinstance(source, FolderSource) else source.name
    module = source.module if isinstance(source, ModuleSource) else None
    known = network_inputs(name, config, roles.size, sizes, where, module)
    taken = known.channels
    image = known.kept or network_channels(taken, known.predicted, source.schedule, where=where).image
    inputs = {condition: value.value(condition) for condition, value in known.conditions.items()}
    if extra := taken - image:
        inputs[EXTRA_CHANNELS] = Input(known.shape_with(extra)).value(EXTRA_CHANNELS)
    schedule = source.schedule
    signature = Signature(
        known.sample,
        known.timestep,
        "out_sample",
        tuple(inputs),
        schedule.prediction,
        known_unit(config, schedule) or "steps",
        schedule.num_train_timesteps,
        known.channel_axis,
        known.labels,
    )
    return signature, known.shape_with(image), inputs, known.lengths


def _read(conditions: ConditionSource) -> Conditions | None:
    """Return the arrays of an .npz file or of a mapping; None for RANDOM ones. Raises ConditionError."""
    if isinstance(conditions, (str, Path)):
        if str(conditions) == RANDOM:
            return None
        conditions = load_conditions(Path(conditions))
    return {name: np.atleast_1d(np.asarray(array)) for name, array in (conditions or {}).items()}  # a number is one row
