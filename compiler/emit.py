"""Program -> bundle folder. Written beside its target and moved into place, so that nothing is ever half there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil

from ..runtime.bundle import CORRECTION, MANIFEST, MODEL, SCHEDULER, seal_bundle
from ..runtime.configuration import CONFIG
from ..runtime.ranges import RANGES
from . import store
from .audit import audit
from .card import CARD, NOISE_PLOT, card
from .card_code import described
from .errors import OutputError
from .graph import counts, name_of
from .lowering import lower
from .ops import layers
from .program import Program, numpy_of
from .range_rows import range_rows
from .storage import storage

EXTERNAL_BYTES = 256 << 20  # above this the weights lie in a file of their own, which onnxruntime maps into memory
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def staged(
    target: Path, *, force: bool = False, ours: Callable[[Path], bool] | None = None
) -> Iterator[tuple[Path, Path]]:
    """Yield (bundle, work): two empty folders beside the target. On success the first becomes the target.

    Raises OutputError when the target exists (unless `force`, and then it must be `ours`: a bundle or a demo when left
    out), or cannot be written. A crash leaves a hidden folder that the next compile to the same place removes; the
    target is never touched before all is written.
    """
    check_target(target, force=force, ours=ours)
    target = target.absolute()
    with _stage(target) as stage:
        bundle, work = stage / "bundle", stage / "work"
        bundle.mkdir()
        work.mkdir()
        yield bundle, work
        _swap(bundle, target, stage / "old")


@contextlib.contextmanager
def staged_file(target: Path, *, force: bool = False) -> Iterator[tuple[Path, Path]]:
    """Yield (file, work): a path to write to, of the target's name, and an empty folder. The same promises as `staged`.

    What is written beside the file (its external data) moves with it.
    """
    if target.exists() and not (force and target.is_file()):
        raise OutputError("the output exists already", where=str(target), hint="choose another file, or add --force")
    target = target.absolute()
    with _stage(target) as stage:
        made, work = stage / "made", stage / "work"
        made.mkdir()
        work.mkdir()
        yield made / target.name, work
        for file in sorted(made.iterdir(), reverse=True):  # the data before the graph that reads it
            file.replace(target.parent / file.name)


@contextlib.contextmanager
def _stage(target: Path) -> Iterator[Path]:
    """An empty hidden folder beside the target; failures to write become OutputError."""
    stage = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        yield stage
    except OSError as error:
        what = "the disk is full" if error.errno in _FULL else f"cannot write: {error.strerror or error}"
        raise OutputError(
            what, where=str(error.filename or target), hint="free some space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_target(target: Path, *, force: bool, ours: Callable[[Path], bool] | None = None) -> None:
    """Refuse an output that exists; with `force`, only one that Mezzotint did not write. Raises OutputError."""
    if not target.exists():
        return
    if not force:
        raise OutputError("the output exists already", where=str(target), hint="choose another folder, or add --force")
    if not (ours or _is_ours)(target):
        raise OutputError(
            "the output exists, and Mezzotint did not write it",
            where=str(target),
            hint="choose another folder; --force replaces only what Mezzotint wrote",
        )


def _is_ours(target: Path) -> bool:
    """A bundle, a folder of the demo, or an empty one: what `force` may replace. Never somebody's documents."""
    if not target.is_dir():
        return False
    return (target / MANIFEST).is_file() or (target / "bundle" / MANIFEST).is_file() or not any(target.iterdir())


def remove_stale(target: Path) -> None:
    """Remove what compiles that were killed left beside the target; one killed within `_swap` is undone."""
    for folder in target.parent.glob(f".{target.name}.partial-*"):
        pid = folder.name.rpartition("-")[2]
        if not pid.isdigit() or not psutil.pid_exists(int(pid)):
            if (folder / "old").exists() and not target.exists():
                (folder / "old").rename(target)
            shutil.rmtree(folder, ignore_errors=True)


def _swap(bundle: Path, target: Path, old: Path) -> None:
    if target.exists():
        target.rename(old)
        try:
            bundle.rename(target)
        except OSError:
            old.rename(target)
            raise
    else:
        bundle.rename(target)


def save_model(model: ir.Model, path: Path) -> None:
    """One ONNX file, its weights beside it when there are many."""
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
    """A constant says its own type and shape: the file need not do so twice."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and not value.is_graph_input() and not value.metadata_props:
            value.type = value.shape = None


def emit(program: Program, bundle: Path, work: Path, facts: Mapping[str, Any], *, threads: int | None = None) -> None:
    """Write a bundle: the lowered graph, the configurations of model and scheduler, the correction, the ranges, the
    FX text, the manifest with all hashes.

    `facts` is what only the caller knows (recipe, calibration, versions). `bundle` may hold pass dumps already.
    """
    islands = program.plan.islands if program.plan else {}
    quantized = program.float_model is not None
    lowered = lower(program) if quantized else program.model
    save_model(lowered, bundle / MODEL)
    files = sorted((bundle / MODEL).parent.glob(f"{Path(MODEL).name}*"))
    write_text(bundle / SCHEDULER, json.dumps(dict(program.schedule.config), indent=2) + "\n")
    source = dict(program.source)
    if (config := source.pop("config", None)) is not None:
        write_text(bundle / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if program.correction is not None:
        program.correction.save(bundle / CORRECTION)
    if (ranges := range_rows(program)) is not None:
        ranges.save(bundle / RANGES)
    if program.noise_report:
        from .noise_plot import plot_noise  # matplotlib takes a second to load

        plot_noise(program.noise_report, bundle / NOISE_PLOT)
    if program.fx_text is not None:
        write_text(bundle / "passes" / "000_fx.txt", program.fx_text)
    source_layers = list(layers((program.float_model or program.model).graph))
    kernels = audit(bundle / MODEL, source_layers, work, threads=threads).to_json(islands if quantized else {})
    manifest = {
        **facts,
        "source": source,
        "signature": program.signature.to_json(),
        "inputs": described({name_of(v): _declared(v) for v in lowered.graph.inputs}),
        "deployment": program.deployment.to_json(),
        "deployed_timesteps": None if program.frozen is None else list(program.frozen),
        "sample_shape": list(program.shape),
        "history": [record.to_json() for record in program.history],
        "kernels": kernels,
        "storage": storage(program, lowered, files),
        "quantizers": [
            {"site": str(site), **quantizer.to_json()}
            for site, quantizer in (program.plan.quantizers.items() if program.plan else ())
        ],
        "islands": dict(islands),
        "refused": dict(program.refused),
        **({"noise": dict(program.noise_report)} if program.noise_report else {}),
        **({"bits": dict(program.plan.report)} if program.plan and program.plan.report else {}),
        "nodes": dict(sorted(counts(lowered.graph).items())),
    }
    write_text(bundle / CARD, card(manifest, bundle))
    seal_bundle(bundle, manifest)


def _declared(value: ir.Value) -> tuple[Any, list[int | str | None]]:
    """dtype and declared shape of a graph input."""
    assert value.dtype is not None and value.shape is not None
    return value.dtype.numpy(), [d if isinstance(d, int) else d.value for d in value.shape]


def write_text(path: Path, text: str) -> None:
    """A text file of a bundle; its bytes are the same on every system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
