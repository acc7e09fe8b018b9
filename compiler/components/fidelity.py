"""How near a finished component is to the float one: decibels for each output, on data that it was not calibrated on.

A prompt's first token has a norm far above the others', so a ratio of sums would tell about that token alone. The error
of a prompt's embedding is therefore relative to each token, and averaged over them. Of the hidden states, and of
the residuals of a ControlNet, the worst one is reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mezzotint.runtime.compare import ratio_db
from mezzotint.runtime.session import open_session

from .export import ComponentArrays

LARGEST_DB = 200.0  # stands for no error at all: JSON has no infinity
_TOKEN_RANK = 3
Outputs = Sequence[Mapping[str, npt.NDArray[Any]]]


def compared(expected: Outputs, found: Outputs) -> dict[str, float]:
    """Return the SQNR in dB of each output over all batches; NaN where one has values that are not finite."""
    ratios: dict[str, float] = {}
    for name in expected[0]:
        pairs = [
            (np.asarray(a[name], np.float64), np.asarray(b[name], np.float64))
            for a, b in zip(expected, found, strict=True)
        ]
        db = min(_decibels(pairs), LARGEST_DB)
        key = re.sub(r"(\.|_)\d+$", "", name)  # hidden states by layer, residuals by skip connection
        ratios[key] = min(db, ratios.get(key, db)) if not np.isnan(db) else db
    return ratios


def file_outputs(
    file: Path, batches: Sequence[ComponentArrays], threads: int | None
) -> list[dict[str, npt.NDArray[Any]]]:
    """Return all outputs of a finished file in plain onnxruntime for each batch. Raises InputError."""
    session = open_session(file, threads=threads)
    names = [value.name for value in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(batch)), strict=True)) for batch in batches]


def _decibels(pairs: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]) -> float:
    if pairs[0][0].ndim == _TOKEN_RANK:
        shares = [((b - a) ** 2).sum(-1) / np.maximum((a**2).sum(-1), 1e-30) for a, b in pairs]
        return ratio_db(1.0, float(np.mean([share.mean() for share in shares])))
    signal = sum(float((a**2).sum()) for a, _ in pairs)
    noise = sum(float(((b - a) ** 2).sum()) for a, b in pairs)
    return ratio_db(signal, noise)
