"""The fusion audit of a bundle or a file, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.stages import scratch
from mezzotint.runtime.errors import BundleError

from ..text import console

if TYPE_CHECKING:
    from mezzotint.compiler.audit.fusion import Fusion, Verdict


def audits(model: Path, *, threads: int | None = None) -> dict[str, Fusion]:
    """Return the audit of an ONNX file, or of each network file of a bundle, by file name.

    The islands are those of the bundle's manifest. Raises BundleError, ModelError or InputError.
    """
    from mezzotint.compiler.audit.fusion import audit_fusion
    from mezzotint.compiler.graph.model_file import check_model_file
    from mezzotint.runtime.bundle.bundle import open_bundle

    islands: Mapping[str, str] = {}
    files = {model.name: model}
    if model.is_dir():
        bundle = open_bundle(model)
        islands = bundle.manifest.islands
        names = bundle.precisions.files.values() if bundle.precisions else ()
        files = {name: bundle.path / name for name in names} or {
            bundle.model_path.relative_to(bundle.path).as_posix(): bundle.model_path
        }
    elif model.exists() and model.suffix != ".onnx":
        raise BundleError(
            "neither a bundle's folder nor an .onnx file",
            where=str(model),
            hint="give the folder that `compile` wrote, or a file that ends in .onnx",
        )
    for file in files.values():
        check_model_file(file)
    with scratch() as folder:
        return {name: audit_fusion(file, folder, threads=threads, islands=islands) for name, file in files.items()}


def to_json(model: Path, fusions: Mapping[str, Fusion]) -> dict[str, Any]:
    """Return the audits as plain data. `ok` is true where no quantized group was left in float."""
    return {
        "model": str(model),
        "ok": not any(fusion.failed for fusion in fusions.values()),
        "files": {name: fusion.to_json() for name, fusion in fusions.items()},
    }


def print_audit(fusions: Mapping[str, Fusion], *, everything: bool = False) -> None:
    """Print totals and each node without an integer kernel, with the rule and the fix; `everything` adds the others."""
    for name, fusion in fusions.items():
        counts = f"{fusion.layers.integer} integer, {fusion.layers.floating} float"
        groups = {f"groups {key}": number for key, number in fusion.totals.items()}
        console.print_pairs(name, {"layers": counts, **groups, "onnxruntime": fusion.onnxruntime})
        failed = [(v.name, *_kernels(v), v.rule) for v in fusion.failed]
        if failed:
            console.print_table("quantized, but not on an integer kernel", ("node", "is", "runs as", "rule"), failed)
        for v in fusion.failed:
            console.print_line(f"{v.name}: {v.why}. What helps: {v.fix}")
        meant = [(v.name, *_kernels(v), v.rule, v.why) for v in fusion.verdicts if not v.integer and not v.failed]
        if meant:
            console.print_table("in float as the file says", ("node", "is", "runs as", "rule", "why"), meant)
        if everything:
            rows = [(v.name, *_kernels(v), v.why) for v in fusion.verdicts if v.integer]
            console.print_table("on integer kernels", ("node", "is", "runs as", ""), rows)
        if fusion.strays:
            console.print_line("kernels that no node of the file explains: " + ", ".join(fusion.strays))


def _kernels(verdict: Verdict) -> tuple[str, str]:
    return verdict.op, verdict.kernel or "nothing"
