"""The audit of a bundle or a file for one engine, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mezzotint.compiler.stages import scratch
from mezzotint.runtime.errors import BundleError, InputError

from ..text import console

if TYPE_CHECKING:
    from mezzotint.compiler.audit.fusion import Fusion, Verdict
    from mezzotint.compiler.audit.tensorrt import Legality
    from mezzotint.compiler.audit.tensorrt_violation import Violation

AUDITED = ("cpu", "openvino", "tensorrt", "nv_tensorrt_rtx")
"""The providers that `audit` knows: two are asked what they built, two have rules only."""


def target_note(model: Path, provider: str = "cpu") -> str:
    """Return what a reader must know of a bundle for another engine: these are not its kernels. Else nothing."""
    from mezzotint.runtime.bundle.bundle import open_bundle

    manifest = open_bundle(model, verify=False).manifest if model.is_dir() and provider == "cpu" else None
    if manifest is None or not manifest.measured_in:
        return ""
    hint = f" (--provider {manifest.target})" if manifest.target in AUDITED else ""
    return f"the kernels are those {manifest.measured_in}{hint}"


def audits(model: Path, provider: str = "cpu", *, threads: int | None = None) -> dict[str, Fusion | Legality]:
    """Return the audit of an ONNX file, or of each network file of a bundle, by file name.

    The islands are those of the bundle's manifest. Raises BundleError, ModelError or InputError.
    """
    from mezzotint.compiler.graph.model_file import check_model_file

    if provider not in AUDITED:
        raise InputError(f"there is no audit of {provider!r}", hint=f"--provider is one of {', '.join(AUDITED)}")
    files, islands = _files(model)
    for file in files.values():
        check_model_file(file)
    return {name: _audit(file, provider, threads, islands) for name, file in files.items()}


def _files(model: Path) -> tuple[dict[str, Path], Mapping[str, str]]:
    """Return the ONNX files of a bundle or a path, by name, and the islands."""
    from mezzotint.runtime.bundle.bundle import open_bundle

    if model.is_dir():
        bundle = open_bundle(model)
        names = bundle.precisions.files.values() if bundle.precisions else ()
        files = {name: bundle.path / name for name in names} or {
            bundle.model_path.relative_to(bundle.path).as_posix(): bundle.model_path
        }
        return files, bundle.manifest.islands
    if model.exists() and model.suffix != ".onnx":
        raise BundleError(
            "neither a bundle's folder nor an .onnx file",
            where=str(model),
            hint="give the folder that `compile` wrote, or a file that ends in .onnx",
        )
    return {model.name: model}, {}


def _audit(file: Path, provider: str, threads: int | None, islands: Mapping[str, str]) -> Fusion | Legality:
    if provider == "openvino":
        from mezzotint.compiler.audit.openvino import audit_openvino

        return audit_openvino(file, threads=threads, islands=islands)
    if provider in ("tensorrt", "nv_tensorrt_rtx"):
        from mezzotint.compiler.audit.tensorrt import check_tensorrt

        return check_tensorrt(file, "nv_tensorrt_rtx" if provider == "nv_tensorrt_rtx" else "tensorrt")
    from mezzotint.compiler.audit.fusion import audit_fusion

    with scratch() as folder:
        return audit_fusion(file, folder, threads=threads, islands=islands)


def to_json(model: Path, provider: str, found: Mapping[str, Fusion | Legality]) -> dict[str, Any]:
    """Return the audits as plain data. `ok` is true where no rule is broken and no quantized group left in float."""
    return {
        "model": str(model),
        "provider": provider,
        "ok": not any(result.failed for result in found.values()),
        "files": {name: result.to_json() for name, result in found.items()},
    }


def print_audits(found: Mapping[str, Fusion | Legality], *, everything: bool = False) -> None:
    """Print each file's audit; see `print_audit` and `print_legality`."""
    from mezzotint.compiler.audit.tensorrt import Legality

    for name, result in found.items():
        if isinstance(result, Legality):
            print_legality(name, result, everything=everything)
        else:
            print_audit(name, result, everything=everything)


def print_legality(name: str, found: Legality, *, everything: bool = False) -> None:
    """Print the totals, that nothing was run, and for each broken rule its first node, or every node, with the fix."""
    counts = f"{found.layers.integer} quantized, {found.layers.floating} float"
    illegal = len(found.illegal)
    totals = {"layers": counts, "quantizers": found.quantizers, "illegal": illegal}
    console.print_pairs(name, {**totals, "badly placed": len(found.violations) - illegal, "engine": found.engine})
    console.print_line(f"Checked against the rules of {found.engine}; nothing was run, since an engine needs its GPU.")
    by_rule: dict[str, list[Violation]] = {}
    for violation in found.violations:
        by_rule.setdefault(violation.rule, []).append(violation)
    if by_rule:
        rows = [(rule, them[0].kind, len(them)) for rule, them in by_rule.items()]
        console.print_table("rules that are broken", ("rule", "", "nodes"), rows)
    for them in by_rule.values():
        for violation in them if everything else them[:1]:
            name = f"{violation.name} ({violation.op})" if violation.name else "the file"
            console.print_line(f"{name}: {violation.why}. What helps: {violation.fix}")
    if not everything and len(found.violations) > len(by_rule):
        console.print_line("The first node of each rule is shown; --all and --json list every one.")


def print_audit(name: str, fusion: Fusion, *, everything: bool = False) -> None:
    """Print totals and each node without an integer kernel, with the rule and the fix; `everything` adds the others."""
    counts = f"{fusion.layers.integer} integer, {fusion.layers.floating} float"
    groups = {f"groups {key}": number for key, number in fusion.totals.items()}
    console.print_pairs(name, {"layers": counts, **groups, fusion.engine: fusion.version})
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
