"""`mezzotint card`: a bundle's card, written again with measurements from after the compilation.

The manifest hashes the card and keeps the figures: both files change, and with them the bundle's digest. A second
bundle is made next to the first, of links to the same files, or of copies on a disk without links. It is sealed, and
replaces the first in one move. The files of the network are not touched.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mezzotint.compiler.bundle.card import CARD, card_text
from mezzotint.compiler.bundle.card_figures import bench_figures, eval_figures, eval_speed, evaluated
from mezzotint.compiler.bundle.staging import staged, write_text
from mezzotint.runtime.bundle.bundle import MANIFEST, Bundle, open_bundle, seal_bundle
from mezzotint.runtime.bundle.manifest_entries import input_entries
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import read_json

from .io.hub import checked_license, checked_model
from .io.processor import processor_name


def rewrite_card(
    folder: str | Path,
    *,
    evaluation: Path | None = None,
    bench: Path | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> Bundle:
    """Write the card of a bundle again, with these figures in addition to its own, and open the bundle.

    Raises InputError for files that do not hold such figures, BundleError for a bundle that was changed, OutputError
    where it cannot be written: the bundle is then as it was.
    """
    bundle = open_bundle(folder)
    manifest = bundle.manifest
    known = (*manifest.digests_before, manifest.digest)  # of the same network: figures may name an earlier one
    measured = dict(manifest.measured)
    if evaluation is not None:
        measured |= _evaluation(evaluation, known)
    if bench is not None:
        measured["bench"] = bench_figures(_read(bench), machine(), str(bench))
    fields = dict(manifest.card)
    if license is not None:
        fields = {key: value for key, value in fields.items() if not key.startswith("license")}
        fields |= {"license": checked_license(license), "license_from": "given"}
    if base_model is not None:
        fields["base_model"] = checked_model(base_model)
    if manifest.inputs is None:  # compiled by a version whose manifest has no inputs
        manifest = replace(manifest, inputs=input_entries(bundle.denoiser().inputs))
    manifest = replace(manifest, measured=measured, card=fields)
    target = bundle.path.resolve()
    if card_text(manifest, target) == (target / CARD).read_text(encoding="utf-8"):
        return bundle
    manifest = replace(manifest, digests_before=known)
    with staged(target, force=True, ours=_is_any) as (copy, _):
        shutil.copytree(target, copy, copy_function=_link, dirs_exist_ok=True)
        for name in (CARD, MANIFEST):  # new files: writing through a link would change the existing bundle
            (copy / name).unlink(missing_ok=True)
        write_text(copy / CARD, card_text(manifest, copy))
        seal_bundle(copy, manifest)
    return open_bundle(folder, verify=False)  # its files were hashed while they were sealed


def _is_any(folder: Path) -> bool:
    """Accept a bundle with further files in it: the copy has them too."""
    return True


def _evaluation(file: Path, known: Sequence[str]) -> dict[str, Any]:
    data = _read(file)
    measured = {"eval": eval_figures(data, str(file))}
    digest = evaluated(data)
    if digest is not None and digest not in known:
        raise InputError(
            f"these figures are of another bundle, {digest[:12]}",
            where=str(file),
            hint=f"evaluate this one, {known[-1][:12]}, or write the card of the other bundle",
        )
    speed = eval_speed(data, machine())
    return measured if speed is None else {**measured, "bench": speed}


def machine() -> str:
    """Return the processor in words, as far as the system names it."""
    return f"{processor_name()}, {os.cpu_count()} cores, {platform.system()}"


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)
    return target


def _read(file: Path) -> Any:
    hint = "write them with `mezzotint eval --json > FILE` or `mezzotint bench --json > FILE`"
    return read_json(file, "the file of figures", InputError, hint=hint)
