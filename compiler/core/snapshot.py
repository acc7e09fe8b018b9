"""A Program as a folder, to resume its passes without importing or calibrating again.

program.json          signature, schedule, deployment, shape, source, history, pending passes, plan
program.onnx          the graph; float.onnx too when the program has a float model
weights.data          the stored weights of both
stats.safetensors     summaries (exact integers and float64)
plan.safetensors      scales and zero points
correction.safetensors
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors.numpy import load_file, save

from mezzotint.runtime.bundle.json_fields import Fields
from mezzotint.runtime.bundle.training import TrainedUnit
from mezzotint.runtime.json_text import parse_json
from mezzotint.runtime.sampling.correction import Correction
from mezzotint.runtime.sampling.deployment import Deployment
from mezzotint.runtime.sampling.schedule import Schedule
from mezzotint.runtime.signature import Signature

from ..errors import ModelError
from ..graph import weight_store as store
from .formats import Format
from .program import Plan, Program, Quantizer, Record, Site
from .stats import Stats, Summary

STATS_ARRAYS = "stats.safetensors"
SAVED_FILES = frozenset(
    {
        *("program.json", "program.onnx", "program.onnx.data", "float.onnx", "float.onnx.data", store.WEIGHTS),
        *(STATS_ARRAYS, "plan.safetensors", "correction.safetensors"),
    }
)

Arrays = dict[str, npt.NDArray[Any]]


def save_program(program: Program, folder: Path, pending: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write a program to a folder, with the passes that are still to run."""
    folder.mkdir(parents=True, exist_ok=True)
    models = [model for model in (program.model, program.float_model) if model is not None]
    home = next((home for home in map(home_of, models) if home is not None), None)  # a lowered graph may have none
    if home is not None and home != folder and not (folder / store.WEIGHTS).exists():
        store.copy(home / store.WEIGHTS, folder / store.WEIGHTS)
    for stem, model in (("program", program.model), ("float", program.float_model)):
        if model is not None:
            store.write(store.rehomed(model, folder), folder, stem)
    data: dict[str, Any] = {
        "signature": program.signature.to_json(),
        "schedule": dict(program.schedule.config),
        "deployment": program.deployment.to_json(),
        "shape": list(program.shape),
        "source": dict(program.source),
        "frozen": None if program.frozen is None else list(program.frozen),
        "lowering": program.lowering,
        "target": program.target,
        "allocation": list(program.allocation),
        "widths": dict(program.widths),
        "refused": dict(program.refused),
        "noise_report": dict(program.noise_report),
        "training": [unit.to_json() for unit in program.training],
        "history": [r.entry().to_json() for r in program.history],
        "fx_text": program.fx_text,
        "pending": [dict(p) for p in pending],
    }
    if program.stats is not None:
        data["stats"] = save_stats(program.stats, folder)
    if program.plan is not None:
        data["plan"] = _save_plan(program.plan, folder)
    if program.correction is not None:
        program.correction.save(folder / "correction.safetensors")
    (folder / "program.json").write_text(json.dumps(data, indent=1), encoding="utf-8", newline="\n")


def is_saved_program(folder: Path) -> bool:
    """Return whether a folder holds a saved program and nothing else."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    return "program.json" in names and names <= SAVED_FILES


def load_program(folder: Path) -> tuple[Program, list[dict[str, Any]]]:
    """Return the program that `save_program` wrote, and the passes that are still to run. Raises ModelError."""
    try:
        data = parse_json((folder / "program.json").read_text(encoding="utf-8"))
        model = ir.load(folder / "program.onnx")
    except (OSError, ValueError) as error:
        raise ModelError(f"this folder holds no saved program: {error}", where=str(folder)) from error
    float_file, correction_file = folder / "float.onnx", folder / "correction.safetensors"
    program = Program(
        model=model,
        signature=Signature.from_json(data["signature"]),
        schedule=Schedule.from_config(data["schedule"]),
        deployment=Deployment.from_json(data["deployment"]),
        shape=tuple(data["shape"]),
        source=data["source"],
        stats=load_stats(data["stats"], folder) if "stats" in data else None,
        plan=_load_plan(data["plan"], folder) if "plan" in data else None,
        correction=Correction.load(correction_file) if correction_file.exists() else None,
        frozen=None if data["frozen"] is None else tuple(data["frozen"]),
        float_model=ir.load(float_file) if float_file.exists() else None,
        lowering=data["lowering"],
        target=data["target"],
        allocation=tuple(data["allocation"]),
        widths=data["widths"],
        refused=data["refused"],
        noise_report=data["noise_report"],
        fx_text=data["fx_text"],
        training=tuple(Fields(unit, str(folder)).finish(TrainedUnit.from_json) for unit in data["training"]),
        history=tuple(
            Record(
                r["pass"],
                r["options"],
                r["nodes_before"],
                r["nodes_after"],
                r["seconds"],
                r["peak_memory_mb"],
                r["note"],
            )
            for r in data["history"]
        ),
    )
    return program, list(data["pending"])


def home_of(model: ir.Model) -> Path | None:
    """Return the folder whose stored weights a model refers to, or None."""
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            return Path(value.const_value.base_dir)
    return None


def save_stats(stats: Stats, folder: Path) -> dict[str, Any]:
    """Write the arrays of statistics to a folder; return the rest as plain data, for `load_stats`."""
    arrays: Arrays = {}
    keys = []
    for i, ((name, group), s) in enumerate(stats.summaries.items()):
        keys.append([name, group])
        used = np.flatnonzero(s.histogram)
        arrays[f"{i}.moments"] = np.array([s.count, s.low, s.high, s.total, s.square], np.float64)
        arrays[f"{i}.bins"] = used.astype(np.int32)
        arrays[f"{i}.counts"] = s.histogram[used]
    for i, extremes in enumerate(stats.channels.values()):
        arrays[f"channels.{i}"] = extremes
    for i, sums in enumerate(stats.squares.values()):
        arrays[f"squares.{i}"] = sums
    (folder / STATS_ARRAYS).write_bytes(save(arrays))
    return {
        "digest": stats.digest,
        "groups": stats.groups,
        "calls": stats.calls,
        "timesteps": list(stats.timesteps),
        "keys": keys,
        "channels": [list(k) for k in stats.channels],
        "squares": [list(k) for k in stats.squares],
        "axes": dict(stats.axes),
    }


def load_stats(data: Mapping[str, Any], folder: Path) -> Stats:
    """Return the statistics that `save_stats` wrote."""
    arrays = load_file(folder / STATS_ARRAYS)
    summaries: dict[tuple[str, int], Summary] = {}
    for i, (name, group) in enumerate(data["keys"]):
        count, low, high, total, square = (float(v) for v in arrays[f"{i}.moments"])
        summary = Summary(int(count), low, high, total, square)
        summary.histogram[arrays[f"{i}.bins"]] = arrays[f"{i}.counts"]
        summaries[str(name), int(group)] = summary
    channels, squares = (
        {(str(name), int(group)): arrays[f"{part}.{i}"] for i, (name, group) in enumerate(data[part])}
        for part in ("channels", "squares")
    )
    facts = data["digest"], data["groups"], data["calls"]
    return Stats(*facts, summaries, tuple(data["timesteps"]), channels, squares, data["axes"])


def _save_plan(plan: Plan, folder: Path) -> dict[str, Any]:
    arrays: Arrays = {}
    entries = []
    for i, (site, q) in enumerate(plan.quantizers.items()):
        arrays[f"{i}.scale"], arrays[f"{i}.zero_point"] = np.atleast_1d(q.scale), np.atleast_1d(q.zero_point)
        if q.row_bits is not None:
            arrays[f"{i}.row_bits"] = q.row_bits
        if q.levels is not None:
            arrays[f"{i}.levels"] = q.levels
        if q.vectors is not None:
            arrays[f"{i}.vectors"] = q.vectors
        f = q.format
        grid = [f.bits, f.signed, f.symmetric]
        entries.append([site.value, site.consumer, grid, q.axis, q.by, q.scale.ndim, q.table])
    (folder / "plan.safetensors").write_bytes(save(arrays))
    return {
        "islands": dict(plan.islands),
        "quantizers": entries,
        "groups": list(plan.groups),
        "report": dict(plan.report),
    }


def _load_plan(data: Mapping[str, Any], folder: Path) -> Plan:
    arrays = load_file(folder / "plan.safetensors")
    quantizers = {}
    for i, (value, consumer, fmt, axis, by, rank, table) in enumerate(data["quantizers"]):
        scale, zero = arrays[f"{i}.scale"], arrays[f"{i}.zero_point"]
        if rank == 0:
            scale, zero = scale.reshape(()), zero.reshape(())
        grid = (arrays.get(f"{i}.{part}") for part in ("row_bits", "levels", "vectors"))
        quantizers[Site(value, consumer)] = Quantizer(Format(*fmt), scale, zero, by, axis, table, *grid)
    return Plan(quantizers, data["islands"], tuple(data["groups"]), data["report"])
