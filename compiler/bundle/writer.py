"""Program -> bundle folder: the graph, the configurations, the tables, the manifest with all hashes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from mezzotint.runtime.bundle.acceptance import Acceptance
from mezzotint.runtime.bundle.bundle import CORRECTION, MODEL, SCHEDULER, seal_bundle
from mezzotint.runtime.bundle.lora_entry import LoraEntry
from mezzotint.runtime.bundle.manifest import Manifest
from mezzotint.runtime.bundle.manifest_entries import Calibration, RecipeEntry, Source, input_entries
from mezzotint.runtime.bundle.model_config import CONFIG
from mezzotint.runtime.bundle.network_call import CALL
from mezzotint.runtime.bundle.ranges import RANGES
from mezzotint.runtime.targets import ONNXRUNTIME

from ..audit.kernels import audit_kernels
from ..core.program import Plan, Program
from ..graph import weight_store as store
from ..graph.nodes import counts, name_of, numpy_of
from ..graph.ops import layers
from ..graph.require import dtype_of, shape_of
from ..lowering.any_timestep import take_any_timestep
from ..lowering.lower import lower, lower_float
from .card import CARD, NOISE_PLOT, card_text
from .range_rows import range_rows
from .staging import write_text
from .storage import storage

EXTERNAL_BYTES = 256 << 20  # onnxruntime maps a separate file of weights into memory


@dataclass(frozen=True)
class Compilation:
    """The facts of a compilation that its program does not have. `card` are the fields of the model card."""

    mezzotint: str
    recipe: RecipeEntry
    calibration: Calibration
    versions: Mapping[str, str]
    card: Mapping[str, Any] = field(default_factory=dict)


def save_model(model: ir.Model, path: Path) -> None:
    """Write an ONNX file; above EXTERNAL_BYTES of weights, these are in a file of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clone = model.clone()
    tensors = {value: value.const_value for value in clone.graph.initializers.values() if value.const_value is not None}
    forget_types(clone)
    if sum(tensor.nbytes for tensor in tensors.values()) > EXTERNAL_BYTES:
        ir.save(clone, path, external_data=f"{path.name}.data", size_threshold_bytes=store.SIZES_BYTES)
        return
    for value, tensor in tensors.items():
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.tensor(numpy_of(value), name=value.name)
    ir.save(clone, path)


def forget_types(model: ir.Model) -> None:
    """Remove type and shape of the values of constants, whose tensors have them."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input() and not value.metadata_props:
            value.type = value.shape = None


def write_bundle(
    program: Program,
    bundle: Path,
    work: Path,
    compilation: Compilation,
    *,
    threads: int | None = None,
    accept: Callable[[Path], Acceptance] | None = None,
) -> None:
    """Write a bundle: the lowered graph, the configurations of model and scheduler, the correction, the ranges, the
    FX text, the manifest with all hashes.

    `bundle` may hold pass dumps already. `accept` runs the finished file; what it returns is in the manifest, and what
    it raises leaves the bundle unsealed.
    """
    plan = program.plan or Plan()
    quantized = program.float_model is not None
    lowered = take_any_timestep(lower(program) if quantized else lower_float(program), program.signature)
    save_model(lowered, bundle / MODEL)
    files = sorted((bundle / MODEL).parent.glob(f"{Path(MODEL).name}*"))
    acceptance = None if accept is None else accept(bundle / MODEL)
    write_text(bundle / SCHEDULER, json.dumps(dict(program.schedule.config), indent=2) + "\n")
    source = dict(program.source)
    if (config := source.pop("config", None)) is not None:
        write_text(bundle / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (call := source.pop("call", None)) is not None:
        write_text(bundle / CALL, json.dumps(call, sort_keys=True) + "\n")
    if program.correction is not None:
        program.correction.save(bundle / CORRECTION)
    if (ranges := range_rows(program)) is not None:
        ranges.save(bundle / RANGES)
    if program.noise_report:
        from ..correction.noise_plot import plot_noise  # matplotlib takes a second to load

        plot_noise(program.noise_report, bundle / NOISE_PLOT)
    if program.fx_text is not None:
        write_text(bundle / "passes" / "000_fx.txt", program.fx_text)
    source_layers = list(layers((program.float_model or program.model).graph))
    kernels = audit_kernels(bundle / MODEL, source_layers, work, threads=threads)
    manifest = Manifest(
        mezzotint=compilation.mezzotint,
        recipe=compilation.recipe,
        calibration=compilation.calibration,
        versions=compilation.versions,
        card=compilation.card,
        source=Source(
            str(source["kind"]),
            str(source["name"]),
            int(source["parameter_bytes"]),
            source.get("weights_sha256"),
            source.get("class"),
            tuple(LoraEntry(**lora) for lora in source.get("loras", ())),
        ),
        signature=program.signature,
        inputs=input_entries({name_of(v): _declared(v) for v in lowered.graph.inputs}),
        deployment=program.deployment,
        deployed_timesteps=None if program.frozen is None else tuple(program.frozen),
        sample_shape=program.shape,
        history=tuple(record.entry() for record in program.history),
        kernels=kernels.entry(plan.islands if quantized else {}, program.target if quantized else ONNXRUNTIME),
        storage=storage(program, lowered, files),
        quantizers=tuple(quantizer.entry(site) for site, quantizer in plan.quantizers.items()),
        islands=dict(plan.islands),
        refused=dict(program.refused),
        noise=dict(program.noise_report),
        bits=dict(plan.report),
        training=program.training,
        warnings=program.warnings,
        acceptance=acceptance,
        target=program.target,
        nodes=dict(sorted(counts(lowered.graph).items())),
    )
    write_text(bundle / CARD, card_text(manifest, bundle))
    seal_bundle(bundle, manifest)


def _declared(value: ir.Value) -> tuple[Any, list[int | str | None]]:
    """Return dtype and declared shape of a graph input."""
    return dtype_of(value).numpy(), [d if isinstance(d, int) else d.value for d in shape_of(value)]
