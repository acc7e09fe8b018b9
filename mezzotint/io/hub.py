"""The fields of a model's own card: the YAML at the top of its README.md, as on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mezzotint.compiler.yaml_text import parse_yaml
from mezzotint.runtime.errors import InputError
from mezzotint.runtime.json_text import read_text
from mezzotint.runtime.visible import one_line

from .sources import NETWORKS, embedded_or_path

INHERITED = ("license", "license_name", "license_link", "pipeline_tag")
LONGEST_FIELD = 300
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,99}")
_MODEL = re.compile(r"[\w.-]{1,100}(/[\w.-]{1,100})?")
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def card_fields(model: str | Path | None, license: str | None = None) -> dict[str, str]:
    """Return the fields of a bundle's card about the float model, by the names of INHERITED, and `license_from`.

    `license` (an identifier of the hub, such as `apache-2.0`) replaces that of the model's card. A README.md without
    such fields, or with unreadable ones, contributes nothing. Raises InputError for a licence that is not an
    identifier.
    """
    own = {} if model is None else _own_fields(model)
    if license is None:
        return own
    checked_license(license)
    kept = {key: value for key, value in own.items() if not key.startswith("license")}
    return {"license": license, "license_from": "given", **kept}


def checked_license(license: str) -> str:
    """Return the licence. Raises InputError unless it has the form of an identifier."""
    if not _LICENSE.fullmatch(license):
        raise InputError(
            f"not an identifier of a licence: {license!r}",
            where="--license",
            hint="the hub's are like apache-2.0, mit, openrail, cc-by-nc-4.0, other",
        )
    return license


def checked_model(name: str) -> str:
    """Return the name. Raises InputError unless it has the form OWNER/NAME or NAME."""
    if not _MODEL.fullmatch(name):
        raise InputError(f"not a model of the hub: {name!r}", where="--base-model", hint="the form is OWNER/NAME")
    return name


def _own_fields(model: str | Path) -> dict[str, str]:
    path = embedded_or_path(model)
    if not path.is_dir():
        return {}  # an .onnx file: a README.md next to it may belong to something else
    folders = (path, path.absolute().parent) if path.absolute().name in NETWORKS else (path,)
    fields = next((f for folder in folders if (f := front_matter(folder / "README.md"))), {})
    texts = {key: fields[key] for key in INHERITED if isinstance(fields.get(key), str) and fields[key]}
    kept = {key: one_line(text, LONGEST_FIELD) for key, text in texts.items()}
    return {**kept, "license_from": "source"} if "license" in kept else kept


def front_matter(file: Path) -> dict[str, Any]:
    """Return the YAML between the two lines `---` at the top of a file, empty if it is missing or unreadable."""
    try:
        match = _FRONT.match(read_text(file, "the card", InputError))
        fields = parse_yaml(match[1]) if match else None
    except (InputError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}
