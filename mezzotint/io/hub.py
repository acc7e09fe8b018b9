"""What a model's own card tells: the fields in front of its README.md, as the Hugging Face hub has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from mezzotint.runtime.errors import InputError

from .sources import DIGITS, NETWORKS

INHERITED = ("license", "license_name", "license_link", "pipeline_tag")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MODEL = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def card_fields(model: str | Path | None, license: str | None = None) -> dict[str, str]:
    """What a bundle's card may say of the float model, by the names of INHERITED, and `license_from`.

    A licence that was given (an identifier of the hub, such as `apache-2.0`) outweighs that of the model's card; a
    README.md without such fields, or whose fields cannot be read, tells nothing. Raises InputError for a licence that
    is no identifier.
    """
    found = {} if model is None else _own_fields(model)
    if license is None:
        return found
    checked_license(license)
    kept = {key: value for key, value in found.items() if not key.startswith("license")}
    return {"license": license, "license_from": "given", **kept}


def checked_license(license: str) -> str:
    if not _LICENSE.fullmatch(license):
        raise InputError(
            f"not an identifier of a licence: {license!r}",
            where="--license",
            hint="the hub's are like apache-2.0, mit, openrail, cc-by-nc-4.0, other",
        )
    return license


def checked_model(name: str) -> str:
    if not _MODEL.fullmatch(name):
        raise InputError(f"not a model of the hub: {name!r}", where="--base-model", hint="the form is OWNER/NAME")
    return name


def _own_fields(model: str | Path) -> dict[str, str]:
    path = DIGITS if str(model) == "digits" else Path(model)
    if not path.is_dir():
        return {}  # an .onnx file: what lies around it need not belong to it
    folders = (path, path.absolute().parent) if path.absolute().name in NETWORKS else (path,)
    fields = next((f for folder in folders if (f := front_matter(folder / "README.md"))), {})
    found = {key: str(fields[key]) for key in INHERITED if isinstance(fields.get(key), str) and fields[key]}
    return {**found, "license_from": "source"} if "license" in found else found


def front_matter(file: Path) -> dict[str, Any]:
    """The YAML between the two lines `---` at the top of a file; empty where there is none that can be read."""
    try:
        found = _FRONT.match(file.read_text(encoding="utf-8"))
        fields = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}
