"""The digest of a program and its calibration, by which results of long work are found again (cache.py)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mezzotint.runtime.bundle.bundle import file_sha256
from mezzotint.runtime.session import running_version

from ..graph import nodes as graph
from ..graph import weight_store as store
from . import snapshot
from .pipeline import Context
from .program import Program


def program_key(program: Program, context: Context, facts: Mapping[str, Any]) -> str:
    """Return the digest of a program, of its calibration and of these facts."""
    home = snapshot.home_of(program.model)
    weights = None if home is None else file_sha256(home / store.WEIGHTS)
    known = {
        "graph": graph.digest(program.model),
        "weights": weights,
        "signature": program.signature.to_json(),
        "schedule": dict(program.schedule.config),
        "deployment": program.deployment.to_json(),
        "shape": list(program.shape),
        "allocation": list(program.allocation),
        "calibration": [context.samples, context.batch, context.seed],
        "onnxruntime": [running_version(), context.threads],
        **({} if context.condition_network is None else {"condition_network": context.condition_network.digest}),
        **facts,
    }
    sha = hashlib.sha256(json.dumps(known, sort_keys=True).encode())
    for part in (context.conditions, context.unconditional):
        for name, rows in sorted(part.items()):
            sha.update(f"{name}{rows.dtype}{rows.shape}".encode())
            sha.update(np.ascontiguousarray(rows).tobytes())
    return sha.hexdigest()[:32]
