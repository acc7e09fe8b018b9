"""The configuration of the model that a bundle was made from: what its layers are, as diffusers writes it.

A bundle keeps it as `unet/config.json`, so that it can stand in for that model inside a diffusers pipeline, and so that
two models can be held against each other: `config_hash` covers all that describes the architecture, and nothing else.

The same architecture is written in several ways. A file of an older diffusers lacks the keys that came later; a module
in memory has tuples where a file has lists, and no class name; an integer may have become a float. Hence

- private keys (`_name_or_path`, `_diffusers_version`, ...) do not count, except `_class_name`;
- a key that is None counts as absent: None is how diffusers says that a part is not there;
- `sample_size` counts for transformers, whose table of positions has that size; to a UNet it is a default that no
  weight depends on (pipelines change it in very old models);
- numbers are compared as numbers, sequences as lists.

Keys that are missing and whose default is not None are filled in by whoever has the library at hand
(`diffusers_unet.completed`), for both sides by the same version, before anything is compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BundleError

if TYPE_CHECKING:
    from .bundle import Bundle

CONFIG = "unet/config.json"
CLASS = "_class_name"
_KEPT = (CLASS, "_diffusers_version")
_ABSENT = "absent"


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle keeps of a configuration: sorted, without the keys that say where the model came from."""
    return {key: config[key] for key in sorted(config) if not key.startswith("_") or key in _KEPT}


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that describe the architecture, in one spelling (see above)."""
    counts = {key: _plain(value) for key, value in config.items() if key == CLASS or not key.startswith("_")}
    if str(counts.get(CLASS, "")).startswith("UNet"):
        counts.pop("sample_size", None)
    return {key: counts[key] for key in sorted(counts) if counts[key] is not None}


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 over `architecture` as canonical JSON, in hexadecimal."""
    text = json.dumps(architecture(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys of the architecture in which two configurations differ: what each has, or "absent"."""
    left, right = architecture(one), architecture(other)
    pairs = {key: (left.get(key, _ABSENT), right.get(key, _ABSENT)) for key in sorted({*left, *right})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def bundle_config(bundle: Bundle) -> dict[str, Any] | None:
    """The configuration that a bundle keeps; None for one made from an ONNX file that came without. BundleError."""
    if CONFIG not in bundle.manifest.files:
        return None
    file = bundle.path / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"the model's configuration is not readable JSON: {error}", where=str(file)) from error
    if not isinstance(config, dict) or not isinstance(config.get(CLASS), str):
        raise BundleError("the model's configuration does not name its class", where=str(file), hint="compile it again")
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
