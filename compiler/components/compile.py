"""One component from torch to its folder: exported, rewritten, quantized if asked for, written, and measured.

An int8 component is static W8A8: constants only, the QDQ form that onnxruntime fuses. Layers stay in float by role
(classes.py), and by measurement: while the fidelity on held-out data is below `floor_db`, the unit that costs most
joins them (fragile.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.runtime.bundle.model_config import CLASS, public_config
from mezzotint.runtime.bundle.pipeline import COMPONENT_MODEL, ComponentEntry

from ..audit.kernels import audit_kernels
from ..bundle.staging import write_text
from ..bundle.writer import save_model
from ..core.pipeline import Context
from ..core.program import Plan
from ..graph.ops import layers
from ..lowering.lower import lower
from .classes import ComponentClass
from .data import ComponentData, ComponentForm, ComponentPasses
from .export import ComponentArrays, ExportedComponent, export_component, torch_outputs
from .fidelity import compared, file_outputs
from .fragile import quantize_robustly
from .program import component_program, run_on

if TYPE_CHECKING:
    import torch


def compile_component(
    module: torch.nn.Module,
    row: ComponentClass,
    part: str,
    data: ComponentData,
    passes: ComponentPasses,
    form: ComponentForm,
    folder: Path,
    context: Context,
    exported: ExportedComponent | None = None,
) -> ComponentEntry:
    """Write `folder` with model.onnx and config.json, and return what is known of the component.

    `context.folder` is an empty folder for files of this component, or that of `exported_component`, which made
    `exported`. Raises ModelError for a module that cannot be exported, PassError for a pass that fails.
    """
    if exported is None:
        exported = exported_component(module, row, part, data.calibration[0], context)
    imported = component_program(exported, part, context.folder)
    expected = torch_outputs(module, row, part, exported.outputs, data.held_out)
    program = run_on(imported, passes.exact, context, exported.example)
    every_layer = list(layers(program.graph))
    if form == "int8":
        program = quantize_robustly(program, row, passes, data, expected, context)
    file = folder / COMPONENT_MODEL
    save_model(lower(program) if form == "int8" else program.model, file)
    write_text(folder / "config.json", json.dumps(component_config(module, row), indent=2, sort_keys=True) + "\n")
    kernels = audit_kernels(file, every_layer, context.folder, threads=context.threads)
    return ComponentEntry(
        class_name=row.name,
        form=form,
        bytes=sum(part.stat().st_size for part in folder.glob(f"{COMPONENT_MODEL}*")),
        parameter_bytes=exported.parameter_bytes,
        integer=kernels.integer,
        floating=kernels.floating,
        islands=dict((program.plan or Plan()).islands),
        sqnr_db={
            name: round(db, 2)
            for name, db in compared(expected, file_outputs(file, data.held_out, context.threads)).items()
        },
        data=data.words,
    )


def exported_component(
    module: torch.nn.Module, row: ComponentClass, part: str, example: ComponentArrays, context: Context
) -> ExportedComponent:
    """Return a component's graph, compared with torch; its weights lie in `context.folder`. Raises ModelError."""
    where = f"{part} ({row.name})"
    exported = export_component(module, row, part, example, where)
    exported.check(context.folder, context.threads, where)
    return exported


def component_config(module: Any, row: ComponentClass) -> dict[str, Any]:
    """Return the configuration of a component as its library writes it, without keys that name its origin."""
    config = module.config
    if row.library == "diffusers":
        return public_config({**json.loads(module.to_json_string()), CLASS: row.name})
    data: Mapping[str, Any] = json.loads(config.to_json_string())
    return public_config(data)
