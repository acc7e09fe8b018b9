"""Manifests for tests: a complete small one as plain data, and changed copies of real ones."""

from __future__ import annotations

from typing import Any

from mezzotint.runtime.bundle.manifest import FORMAT_VERSION, Manifest


def manifest_data(**facts: Any) -> dict[str, Any]:
    """Return the plain data of an unsealed manifest without layers; `facts` replace its keys or add some."""
    data = {
        "format": FORMAT_VERSION,
        "mezzotint": "0.0",
        "recipe": {"name": "test", "description": "none"},
        "calibration": {"seed": 0, "samples": 4, "batch": 2},
        "versions": {},
        "source": {"kind": "test", "name": "test", "parameter_bytes": 4},
        "signature": {},
        "deployment": {},
        "deployed_timesteps": None,
        "sample_shape": [1, 8, 8],
        "history": [],
        "kernels": {"integer": 0, "float": 1, "operations": {"Conv": 1}, "layers": {}},
        "quantizers": [],
        "islands": {},
        "refused": {},
        "nodes": {"Conv": 1},
    }
    return {**data, **facts}


def changed_manifest(manifest: Manifest, **changes: Any) -> Manifest:
    """Return a manifest with other values of keys, as plain data; None as a value removes `inputs` and `storage`."""
    data = {**manifest.to_json(), **changes}
    return Manifest.from_json({k: v for k, v in data.items() if v is not None or k == "deployed_timesteps"}, "changed")
