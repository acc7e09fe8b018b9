"""The configuration of the model that a bundle was made from, as diffusers writes it.

A bundle keeps it as `unet/config.json`, so that the bundle can replace that model inside a diffusers pipeline, and two
models can be compared: `config_hash` covers exactly the keys that describe the architecture.

The same architecture is written in several ways. A file of an older diffusers lacks later keys; a module in memory has
tuples instead of lists, and no class name; an integer may have become a float. Therefore

- private keys (`_name_or_path`, `_diffusers_version`, ...) do not count, except `_class_name`;
- a key that is None counts as absent: diffusers writes None for a missing part;
- `sample_size` counts for transformers, whose table of positions has that size; to a UNet it is a default that no
  weight depends on (pipelines change it in very old models);
- numbers are compared as numbers, sequences as lists.

Missing keys with a default other than None are filled in before a comparison, for both sides by the same version of
diffusers (`runtime/diffusers/unet.py`, `completed`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import BundleError
from ..json_text import read_json
from .layout import CONFIG, located

if TYPE_CHECKING:
    from .bundle import Bundle

__all__ = ["CLASS", "CONFIG", "architecture", "bundle_config", "config_hash", "differing_keys", "public_config"]
CLASS = "_class_name"
_KEPT = (CLASS, "_diffusers_version")
_ABSENT = "absent"


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a configuration that a bundle keeps, sorted: without those that name the model's origin."""
    return {key: config[key] for key in sorted(config) if not key.startswith("_") or key in _KEPT}


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that describe the architecture, in one spelling (see above)."""
    counts = {key: _plain(value) for key, value in config.items() if key == CLASS or not key.startswith("_")}
    if str(counts.get(CLASS, "")).startswith("UNet"):
        counts.pop("sample_size", None)
    return {key: counts[key] for key in sorted(counts) if counts[key] is not None}


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of `architecture` as canonical JSON, in hexadecimal."""
    text = json.dumps(architecture(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys of the architecture that differ, with both values, or "absent"."""
    left, right = architecture(one), architecture(other)
    pairs = {key: (left.get(key, _ABSENT), right.get(key, _ABSENT)) for key in sorted({*left, *right})}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def bundle_config(bundle: Bundle) -> dict[str, Any] | None:
    """Return the configuration in a bundle; None for one that was made from an ONNX file. Raises BundleError."""
    name = located(CONFIG, bundle.manifest.files)
    if name not in bundle.manifest.files:
        return None
    file = bundle.path / name
    config = read_json(file, "the model's configuration", BundleError)
    if not isinstance(config, dict) or not isinstance(config.get(CLASS), str):
        raise BundleError("the model's configuration does not name its class", where=str(file), hint="compile it again")
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
