"""A bundle's card, written anew with what was measured after the compilation.

The card is hashed in the manifest, and the manifest keeps the figures: both change, and with them the bundle's digest.
So a second bundle is made beside the first, of links to the same files where the disk has such, and of copies where
not; it is sealed, and takes the first one's place in one move. The files of the network are not touched.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.card import CARD, card
from mezzotint.compiler.bundle.card_code import described
from mezzotint.compiler.bundle.card_figures import bench_figures, eval_figures, eval_speed, evaluated
from mezzotint.compiler.bundle.staging import staged, write_text
from mezzotint.runtime.bundle.bundle import MANIFEST, Bundle, open_bundle, seal_bundle
from mezzotint.runtime.errors import InputError

from .io.hub import checked_license, checked_model

_BEFORE = "digests_before"  # what the bundle was called: figures may be of the same network under an earlier digest
_SEALED = ("format", "files", "digest")  # what sealing writes


def rewrite_card(
    folder: str | Path,
    *,
    evaluation: Path | None = None,
    bench: Path | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> Bundle:
    """Write the card of a bundle again, with these figures beside those that it has already, and open the bundle.

    Raises InputError for files that do not hold such figures, BundleError for a bundle that was changed, OutputError
    where it cannot be written: the bundle is then as it was.
    """
    bundle = open_bundle(folder)
    manifest = {key: value for key, value in bundle.manifest.items() if key not in _SEALED}
    known = [*manifest.get(_BEFORE, ()), bundle.manifest["digest"]]
    measured = dict(manifest.get("measured", {}))
    if evaluation is not None:
        measured |= _evaluation(evaluation, known)
    if bench is not None:
        measured["bench"] = bench_figures(_read(bench), machine(), str(bench))
    told = dict(manifest.get("card", {}))
    if license is not None:
        told = {key: value for key, value in told.items() if not key.startswith("license")}
        told |= {"license": checked_license(license), "license_from": "given"}
    if base_model is not None:
        told["base_model"] = checked_model(base_model)
    if "inputs" not in manifest:  # compiled before the manifest said them
        manifest["inputs"] = described(bundle.denoiser().inputs)
    manifest |= _unless_empty("measured", measured) | _unless_empty("card", told)
    target = bundle.path.resolve()
    if card(manifest, target) == (target / CARD).read_text(encoding="utf-8"):
        return bundle
    manifest[_BEFORE] = known
    with staged(target, force=True) as (made, _):
        shutil.copytree(target, made, copy_function=_link, dirs_exist_ok=True)
        for name in (CARD, MANIFEST):  # new files, for writing into a link would change the bundle that is there
            (made / name).unlink(missing_ok=True)
        write_text(made / CARD, card(manifest, made))
        seal_bundle(made, manifest)
    return open_bundle(folder, verify=False)  # hashed a moment ago


def _evaluation(file: Path, known: Sequence[str]) -> dict[str, Any]:
    data = _read(file)
    found = {"eval": eval_figures(data, str(file))}
    digest = evaluated(data)
    if digest is not None and digest not in known:
        raise InputError(
            f"these figures are of another bundle, {digest[:12]}",
            where=str(file),
            hint=f"evaluate this one, {known[-1][:12]}, or write the card of that one",
        )
    speed = eval_speed(data, machine())
    return found if speed is None else {**found, "bench": speed}


def machine() -> str:
    """The processor in words, as far as the system says."""
    words = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        words = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), words)
    return f"{words}, {os.cpu_count()} cores, {platform.system()}"


def _unless_empty(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value} if value else {}


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)
    return target


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the figures are not readable JSON: {error}",
            where=str(file),
            hint="write them with `mezzotint eval --json > FILE` or `mezzotint bench --json > FILE`",
        ) from error
