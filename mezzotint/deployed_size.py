"""The schedule of a model for the size that it is compiled for (compiler/frontend/deployed_schedule.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mezzotint.compiler.frontend.deployed_schedule import inputs_of_graph, needs_length, with_length, with_sigmas
from mezzotint.compiler.frontend.from_onnx import load_onnx
from mezzotint.compiler.frontend.network_inputs import network_inputs
from mezzotint.compiler.frontend.roles import infer_signature
from mezzotint.compiler.frontend.sample_shape import settle_channel_axis, settle_sample_shape
from mezzotint.runtime.bundle.model_config import CLASS
from mezzotint.runtime.sampling.schedule import Schedule

from .io.sources import ModelSource, ModuleSource, OnnxSource
from .options import ImportRoles


def schedule_of_size(
    source: ModelSource, schedule: Schedule, config: Mapping[str, Any] | None, roles: ImportRoles
) -> Schedule:
    """Return the schedule with what the model's pipeline would pass to the scheduler. Raises ModelError."""
    schedule = with_sigmas(schedule, config)
    if not needs_length(schedule):
        return schedule
    if isinstance(source, OnnxSource):
        where, model = str(source.path), load_onnx(source.path)
        signature = infer_signature(model.graph, inputs=roles.inputs, output=roles.output_name, where=where)
        signature = settle_channel_axis(model.graph, signature, roles.channel_axis, where)
        shape = settle_sample_shape(model.graph, signature, roles.size, where)
        return with_length(schedule, config, inputs_of_graph(signature, shape, config, where))
    known_config = config or {}
    module = source.module if isinstance(source, ModuleSource) else None
    known = network_inputs(str(known_config.get(CLASS)), known_config, roles.size, {}, source.name, module)
    return with_length(schedule, config, known)
